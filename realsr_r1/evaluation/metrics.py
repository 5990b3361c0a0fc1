"""Metrics of restored pictures: `(output, original or None) → (b,)`, pictures (b, 3, h, w) in
[0, 1]; one table of all of them.

with the original   PSNR and SSIM, on Y and on RGB, LPIPS, DISTS, FSIM
without             NIQE, BRISQUE, PIQE, MUSIQ, MANIQA, CLIPIQA, TOPIQ
of two whole sets   FID

    score = metrics.load("psnr_y")
    score(restored, original)  # dB, one number a picture

Y is the luma of BT.601 in its narrow range, 16 + 65.481 R + 128.553 G + 24.966 B of 255, as
super-resolution papers have it since MATLAB's rgb2ycbcr: the PSNR of a grey error is 1.32 dB higher
on Y than on RGB. No border is cut off. Networks read the pictures at full size. LPIPS is
`perceptual.distance` and works offline; the rest is pyiqa (PolyForm-Noncommercial). Nothing is
downloaded: a metric whose files are absent says which file goes where. What needs no file, or one
that ships here: all but DISTS, BRISQUE, MUSIQ, MANIQA, CLIPIQA, TOPIQ and FID.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from realsr_r1 import perceptual
from realsr_r1.evaluation import quality

Score = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Metric:
    """What a metric is called in pyiqa, which way is better, whether it compares with the original,
    and what it needs."""

    what: str
    pyiqa: str  # empty: ours
    higher: bool  # higher is better
    reference: bool  # needs the original
    smallest: int = 1  # pixels of the shorter side
    # As in quality.METRICS: in torch's hub folder, or timm/… in the Hugging Face cache.
    files: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    whole_set: bool = False  # one number for a set, not for a picture


def _blind(what: str, pyiqa: str, smallest: int = 32) -> Metric:
    """A metric without the original: its direction and its files are those of `quality.METRICS`."""
    zero, one, files = quality.METRICS[pyiqa]
    return Metric(what, pyiqa, one > zero, False, smallest, files)


Y, RGB = {"test_y_channel": True, "color_space": "ycbcr"}, {"test_y_channel": False}
VGG = "checkpoints/vgg16-397923af.pth"
METRICS = {
    "psnr_y": Metric("PSNR on Y, dB", "psnr", True, True, options=Y),
    "psnr_rgb": Metric("PSNR on RGB, dB", "psnr", True, True, options=RGB),
    # SSIM rounds to 8 bits first and takes an 11×11 Gaussian window of sigma 1.5, inside the
    # picture only, at full size.
    "ssim_y": Metric("SSIM on Y", "ssim", True, True, 11, options=Y),
    "ssim_rgb": Metric("SSIM, mean of R, G and B", "ssim", True, True, 11, options=RGB),
    "lpips": Metric("LPIPS 0.1, AlexNet", "", False, True, 31),
    "dists": Metric("DISTS", "dists", False, True, 16, (VGG, "pyiqa/DISTS_weights-f5e65c96.pth")),
    "fsim": Metric("FSIM, with color", "fsim", True, True, 16),
    "niqe": _blind("NIQE", "niqe", 96),
    "brisque": _blind("BRISQUE", "brisque", 16),
    "piqe": _blind("PIQE", "piqe", 16),
    "musiq": _blind("MUSIQ, trained on KonIQ", "musiq"),
    # The released code's MANIQA; its other heads give other numbers.
    "maniqa": _blind("MANIQA, trained on PIPAL", "maniqa-pipal"),
    "clipiqa": _blind("CLIP-IQA, RN50", "clipiqa"),
    "topiq": _blind("TOPIQ-NR, ResNet-50 trained on KonIQ", "topiq_nr"),
    "fid": Metric(
        "FID, clean resizing",
        "fid",
        False,
        True,
        1,
        ("pyiqa/pt_inception-2015-12-05-6726825d.pth",),
        whole_set=True,
    ),
}
# A covariance of 2,048 features has full rank from 2,049 pictures on, and FID is biased upwards
# below. The paper gives it for the 100 pictures of RealSR, so from there on it is computed, with a
# warning, to be compared between methods on the same pictures only.
FID_LEAST, FID_ENOUGH = 100, 2048


def named(name: str) -> Metric:
    """The table's entry; ValueError with the names there are."""
    if name not in METRICS:
        raise ValueError(f"no metric {name!r}; choose among {', '.join(METRICS)}")
    return METRICS[name]


def arrow(name: str) -> str:
    """↑ where higher is better, ↓ where lower is."""
    return "↑" if named(name).higher else "↓"


def check(name: str, output: Tensor, original: Tensor | None) -> None:
    """Raise ValueError, in one sentence, unless the metric can be had of these pictures."""
    metric, shape = named(name), tuple(output.shape)
    if output.ndim != 4 or shape[1] != 3:
        raise ValueError(
            f"{name} takes pictures (b, 3, h, w), got {shape}: add the batch dimension, or make "
            f"them RGB"
        )
    if metric.reference and original is None:
        raise ValueError(
            f"{name} compares with the original and there is none: choose among "
            + ", ".join(k for k, m in METRICS.items() if not m.reference)
        )
    if metric.reference and tuple(original.shape) != shape:
        raise ValueError(
            f"{name} compares pictures of one size, got {shape} and {tuple(original.shape)}: "
            f"scale or crop one of them"
        )
    if not all(p.is_floating_point() for p in (output, original) if p is not None):
        raise ValueError(f"{name} takes floats in [0, 1]: divide 8-bit pictures by 255")
    if min(shape[-2:]) < metric.smallest:
        size = f"{shape[-1]}x{shape[-2]}"
        raise ValueError(
            f"{name} needs pictures of {metric.smallest} px or more, got {size}: leave them "
            f"out, or take another metric"
        )


def load(name: str, device: str | torch.device = "cpu") -> Score:
    """A metric of the table, ready: `score(output, original or None)` → (b,) float32 on the CPU,
    NaN for a picture that it has no number for (NIQE and a flat one). Values outside [0, 1] are
    clipped first.

    Raises ValueError for an unknown name, FileNotFoundError where its files are absent, and, when
    called, ValueError for pictures it cannot compare (see `check`); one sentence each. FID is not
    of one picture: call `fid`.
    """
    metric = named(name)
    if metric.whole_set:
        raise ValueError(
            f"{name} is one number for two sets of pictures: call metrics.fid with their files"
        )
    quality.check_files(name, metric.files)
    # NIQE computes in double precision, and so does SSIM; Apple's GPUs do not have that.
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)
    compare = (
        quality.create(metric.pyiqa, device, **metric.options)
        if metric.pyiqa
        else perceptual.distance
    )

    @torch.no_grad()
    def score(output: Tensor, original: Tensor | None = None) -> Tensor:
        check(name, output, original)
        pictures = (output, original) if metric.reference else (output,)
        with warnings.catch_warnings():
            # torch's word on a flat picture's one block; the result is NaN.
            warnings.filterwarnings("ignore", "cov")
            clipped = (p.to(device).float().clamp(0, 1) for p in pictures)
            return quality.numbers(compare, *clipped).cpu()

    return score


def check_fid(pictures: int) -> None:
    """ValueError below FID_LEAST pictures, FileNotFoundError where Inception's weights are absent;
    nothing is computed."""
    if pictures < FID_LEAST:
        raise ValueError(
            f"fid needs {FID_LEAST} pictures or more, got {pictures}: its covariance of 2,048 "
            f"features would be mostly noise"
        )
    quality.check_files("fid", METRICS["fid"].files)


def fid(
    outputs: Sequence[str | Path],
    originals: Sequence[str | Path],
    device: str | torch.device = "cpu",
) -> float:
    """FID (Heusel et al. 2017; resized as in clean-fid, Parmar et al. 2022) of two lists of picture
    files; 0 is best.

    Raises as `check_fid` does; warns below FID_ENOUGH.
    """
    few = min(len(outputs), len(originals))
    check_fid(few)
    if few < FID_ENOUGH:
        warnings.warn(
            f"FID of {few} pictures is biased (below {FID_ENOUGH}): compare it on these "
            f"pictures only",
            stacklevel=2,
        )
    # pyiqa takes folders: one for each list, with unique names.
    with tempfile.TemporaryDirectory() as folder:
        sides = [Path(folder) / side for side in ("outputs", "originals")]
        for side, files in zip(sides, (outputs, originals), strict=True):
            side.mkdir()
            for i, path in enumerate(files):
                shutil.copyfile(path, side / f"{i:06d}{Path(path).suffix}")
        return float(
            quality.create("fid", torch.device(device))(
                *map(str, sides), mode="clean", num_workers=0, verbose=False
            )
        )
