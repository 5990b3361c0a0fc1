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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

ALEX = Path(__file__).parent / "assets" / "weights" / "alexnet_conv.safetensors"


def load_convolutions(net: nn.Module, path: str | Path) -> None:
    """Put the convolution weights of a file into the network behind an LPIPS module. Raises
    ValueError for a file that has others."""
    stages = [getattr(net.net, f"slice{s}") for s in range(1, 6)]
    convs = [m for stage in stages for m in stage if isinstance(m, nn.Conv2d)]
    try:
        weights = load_file(path)
        for i, conv in enumerate(convs):
            conv.weight.data.copy_(weights[f"conv{i}.weight"].float())
            conv.bias.data.copy_(weights[f"conv{i}.bias"].float())
    except (KeyError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"{path} holds no weights conv0.weight, … of such a network") from e


@lru_cache(maxsize=2)
def lpips_alex(device: str = "cpu") -> nn.Module:
    """The `lpips` module with its published AlexNet weights, frozen; see `distance`."""
    if not ALEX.exists():
        raise FileNotFoundError(f"{ALEX.name} is missing from the assets: reinstall realsr_r1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's notice about its own old argument names
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    load_convolutions(net, ALEX)
    return net.to(device).eval().requires_grad_(False)


def _check_alike(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 4 or not (x.is_floating_point() and y.is_floating_point()):
        got = ", ".join(f"{z.dtype} {tuple(z.shape)}" for z in (x, y))
        raise ValueError(f"expected two batches (b, 3, h, w) of floats in [0, 1], got {got}")


def distance(x: Tensor, y: Tensor) -> Tensor:
    """LPIPS-alex of two batches (b, 3, h, w) in [0, 1] → (b,), 0 is identical."""
    _check_alike(x, y)
    return lpips_alex(str(x.device))(x, y, normalize=True).flatten()


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR in dB over RGB of two batches (b, 3, h, w) in [0, 1] → (b,)."""
    _check_alike(x, y)
    return -10 * torch.log10(((x - y) ** 2).mean((1, 2, 3)).clamp_min(1e-10))
