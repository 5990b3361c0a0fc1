"""PSNR, and LPIPS-alex that works offline, as a training loss and as a metric (Zhang et al. 2018,
arXiv 1801.03924).

The `lpips` wheel ships its linear heads only; AlexNet's convolution weights (torchvision, BSD-3)
ship with our assets.
"""

import warnings
from functools import lru_cache
from pathlib import Path

import lpips
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

ALEX = Path(__file__).parents[1] / "assets" / "weights" / "alexnet_conv.safetensors"


@lru_cache(maxsize=2)
def lpips_alex(device: str = "cpu") -> nn.Module:
    """The `lpips` module with its published AlexNet weights, frozen; call `distance` instead of it
    directly."""
    if not ALEX.exists():
        raise FileNotFoundError(
            f"{ALEX.name} is missing from the package's assets: reinstall realsr_r1 from a "
            f"complete checkout"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's notice about its own old argument names
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    convs = [
        m for s in range(1, 6) for m in getattr(net.net, f"slice{s}") if isinstance(m, nn.Conv2d)
    ]
    weights = load_file(ALEX)
    for i, conv in enumerate(convs):
        conv.weight.data.copy_(weights[f"conv{i}.weight"].float())
        conv.bias.data.copy_(weights[f"conv{i}.bias"].float())
    return net.to(device).eval().requires_grad_(False)


def alex_layers(x: Tensor) -> list[Tensor]:
    """Images (b, 3, h, w) in [0, 1] → AlexNet's five ReLU layers, as LPIPS sees them: 64, 192, 384,
    256, 256 channels."""
    net = lpips_alex(str(x.device))
    return list(net.net(net.scaling_layer(x * 2 - 1)))


def distance(x: Tensor, y: Tensor) -> Tensor:
    """LPIPS-alex of two batches (b, 3, h, w) in [0, 1] → (b,), 0 is identical."""
    return lpips_alex(str(x.device))(x, y, normalize=True).flatten()


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR in dB over RGB of two batches (b, 3, h, w) in [0, 1] → (b,)."""
    return -10 * torch.log10(((x - y) ** 2).mean((1, 2, 3)).clamp_min(1e-10))


@lru_cache(maxsize=1)
def lpips_vgg() -> nn.Module | None:
    """LPIPS-vgg, if torchvision's VGG16 weights (528 MB, not shipped) lie in torch's hub folder;
    otherwise None."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth").exists():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)


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
