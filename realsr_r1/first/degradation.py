"""Second-order degradation synthesis, its five labels, and words for them.

A degradation is a list of plain dicts, one per operation: the *draw*. `draw` samples it, `apply`
runs it, `label` reads the five labels off it. Because everything random is in the draw (noise by
its seed), the same draw gives the same LR image again, bit for bit, on any later day; CPU and CUDA
differ only by floating-point rounding before the final 8-bit rounding.

Model and ranges: Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833), whose practical model PURE and
RealSR-R1 use. Simplification: JPEG is the real codec (Pillow), not the differentiable approximation
of Real-ESRGAN's code.
"""

import io
import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LEVELS = ("no", "light", "medium", "heavy")
RESIZES = ("downsample", "keep", "upsample")
LABELS = ("blur", "resize", "noise", "compression", "final_resize")
KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
# Upper bounds of no / light / medium; above is heavy. Measured at LR scale, see `label`.
BLUR_BOUNDS = (0.35, 0.75, 1.2)  # blur radius (standard deviation of the kernel), LR pixels
NOISE_BOUNDS = (2.0, 11.5, 27.0)  # standard deviation, of 255
JPEG_BOUNDS = (8.0, 56.0, 80.0)  # 100 - effective quality


@dataclass(frozen=True)
class Stage:
    """Ranges of one blur → resize → noise → JPEG stage. Defaults: Real-ESRGAN's first stage (its
    x4plus options)."""

    blur_prob: float = 1.0
    kernel_sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)  # pixels, odd
    kernel_probs: tuple[float, ...] = (
        0.45,
        0.25,
        0.12,
        0.03,
        0.12,
        0.03,
    )  # in the order of KERNELS
    sinc_prob: float = 0.1
    sigma: tuple[float, float] = (0.2, 3.0)  # pixels
    beta_generalized: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize_range: tuple[float, float] = (0.15, 1.5)  # factor, of the stage's base size
    noise_prob: float = 1.0
    gaussian_prob: float = 0.5  # otherwise Poisson
    noise_sigma: tuple[float, float] = (1.0, 30.0)  # of 255
    poisson_scale: tuple[float, float] = (0.05, 3.0)
    gray_prob: float = 0.4
    jpeg_prob: float = 1.0
    jpeg_quality: tuple[int, int] = (30, 95)
    # Instead of the ranges above, one of several ranges, each equally often; values as seen at LR
    # scale (LR pixels, of 255, 100 - quality). None in a tuple leaves the operation out.
    blur_levels: tuple[tuple[float, float] | None, ...] = ()
    noise_levels: tuple[tuple[float, float] | None, ...] = ()
    jpeg_levels: tuple[tuple[float, float] | None, ...] = ()


SECOND = Stage(
    blur_prob=0.8,
    sigma=(0.2, 1.5),
    resize_prob=(0.3, 0.4, 0.3),
    resize_range=(0.3, 1.2),
    noise_sigma=(1.0, 25.0),
    poisson_scale=(0.05, 2.5),
)


@dataclass(frozen=True)
class DegradationConfig:
    """One or two stages, then the resize to LR size. `base_on_lr` measures the first stage's resize
    from LR size."""

    stages: tuple[Stage, ...] = (Stage(), SECOND)
    final_sinc_prob: float = (
        0.8  # two-stage chains only, as is the JPEG in either order around the final resize
    )
    scale: int = 4
    base_on_lr: bool = False


PRESETS = {
    # Real-ESRGAN's options, the degradation of PURE and RealSR-R1.
    "paper": DegradationConfig(),
    # One light stage: what a recent camera and one save do.
    "mild": DegradationConfig(
        stages=(
            Stage(
                sigma=(0.2, 2.0),
                noise_sigma=(1, 12),
                poisson_scale=(0.05, 1.0),
                jpeg_quality=(60, 95),
                resize_range=(0.4, 1.2),
            ),
        )
    ),
    # Two stages with the upper halves of the ranges.
    "severe": DegradationConfig(
        stages=(
            Stage(
                sigma=(1.5, 4.0),
                noise_sigma=(15, 40),
                poisson_scale=(1.0, 4.0),
                jpeg_quality=(20, 60),
                resize_range=(0.15, 0.8),
            ),
            Stage(
                blur_prob=0.9,
                sigma=(0.8, 2.0),
                noise_sigma=(10, 30),
                poisson_scale=(1.0, 3.0),
                jpeg_quality=(15, 50),
                resize_prob=(0.2, 0.6, 0.2),
                resize_range=(0.3, 1.0),
            ),
        )
    ),
    # One stage in the order of the paper's five labels, its levels equally frequent and clearly
    # apart, so that an eye (or a network) can tell them: what the shipped nano weights are trained
    # on. Half of the photos are saved at LR size.
    "nano": DegradationConfig(
        base_on_lr=True,
        stages=(
            Stage(
                kernel_sizes=(33,),
                kernel_probs=(0.5, 0.5, 0, 0, 0, 0),
                sinc_prob=0.0,
                resize_prob=(0.25, 0.25, 0.5),
                resize_range=(0.55, 1.5),
                gaussian_prob=1.0,
                gray_prob=0.3,
                blur_levels=((0.05, 0.2), (0.5, 0.65), (0.9, 1.1), (1.5, 1.9)),
                noise_levels=(None, (5, 9), (14, 22), (32, 48)),
                jpeg_levels=(None, (30, 50), (62, 75), (86, 93)),
            ),
        ),
    ),
}


@dataclass
class Degraded:
    """A batch of results: LR images, what was drawn for each, and the five labels of each."""

    lr: Tensor  # (b, 3, h / scale, w / scale) in [0, 1], multiples of 1/255
    draws: list[list[dict]]
    labels: list[dict[str, str]] = field(default_factory=list)


# ---------------------------------------------------------------- kernels


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float, theta: float, kind: str = "aniso", beta: float = 1.0
) -> Tensor:
    """(size, size) kernel that sums to 1; `kind` is one of KERNELS, `theta` radians, sigmas in
    pixels.

    Generalised: exp(-r^(2β)/2); plateau: 1/(1 + r^(2β)), with r the Mahalanobis radius
    (Real-ESRGAN, section 3.1).
    """
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u, v = x * math.cos(theta) + y * math.sin(theta), -x * math.sin(theta) + y * math.cos(theta)
    r2 = (u / sigma_x) ** 2 + (v / sigma_y) ** 2
    if kind.startswith("plateau"):
        k = 1 / (1 + r2**beta)
    elif kind.startswith("generalized"):
        k = torch.exp(-0.5 * r2**beta)
    else:
        k = torch.exp(-0.5 * r2)
    return (k / k.sum()).float()


def sinc_kernel(size: int, omega: float) -> Tensor:
    """(size, size) ideal circular low-pass with cut-off `omega` in radians a pixel: it rings, as
    over-sharpening does."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    r = torch.sqrt(x**2 + y**2)
    k = torch.where(
        r > 0,
        omega * torch.special.bessel_j1(omega * r) / (2 * math.pi * r.clamp_min(1e-9)),
        torch.tensor(omega**2 / (4 * math.pi), dtype=torch.float64),
    )
    return (k / k.sum()).float()


def kernel_of(op: dict) -> Tensor:
    """The kernel of a recorded blur or sinc operation, (size, size)."""
    if op["op"] == "sinc" or op.get("kernel") == "sinc":
        return sinc_kernel(op["size"], op["omega"])
    return gaussian_kernel(
        op["size"], op["sigma_x"], op["sigma_y"], op["theta"], op["kernel"], op["beta"]
    )


def kernel_radius(op: dict) -> float:
    """Blur radius in pixels: the kernel's standard deviation along an axis; for sinc that of the
    Gaussian which halves the amplitude at the same frequency (1.18 / omega), since a kernel with
    negative lobes has no variance."""
    if op.get("kernel") == "sinc" or op["op"] == "sinc":
        return 1.1774 / op["omega"]
    k = kernel_of(op).double()
    axis = torch.arange(k.shape[0], dtype=torch.float64) - k.shape[0] // 2
    return math.sqrt(float((k * (axis[:, None] ** 2 + axis[None, :] ** 2)).sum()) / 2)


# ---------------------------------------------------------------- drawing


class _Dice:
    """Scalars from one explicit torch generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, lo: float, hi: float) -> float:
        return lo + float(torch.rand((), generator=self.generator)) * (hi - lo)

    def chance(self, p: float) -> bool:
        return self.uniform(0, 1) < p

    def pick(self, items, probs=None):
        p = torch.tensor(probs if probs is not None else [1.0] * len(items), dtype=torch.float64)
        return items[int(torch.multinomial(p, 1, generator=self.generator))]

    def seed(self) -> int:
        return int(torch.randint(0, 2**31 - 1, (), generator=self.generator))


def _draw_blur(d: _Dice, s: Stage, scale: float) -> dict | None:
    size = d.pick(s.kernel_sizes)
    if d.chance(s.sinc_prob):
        return _draw_sinc(d, size) | {"op": "blur", "kernel": "sinc"}
    kind = d.pick(KERNELS, s.kernel_probs)
    level = d.pick(s.blur_levels) if s.blur_levels else None
    if s.blur_levels and level is None:
        return None
    lo, hi = (level[0] * scale, level[1] * scale) if level else s.sigma
    sx = d.uniform(lo, hi)
    sy, theta = (
        (d.uniform(lo, hi), d.uniform(-math.pi, math.pi)) if kind.endswith("aniso") else (sx, 0.0)
    )
    beta = 1.0
    if kind.startswith(("generalized", "plateau")):
        lo, hi = s.beta_generalized if kind.startswith("generalized") else s.beta_plateau
        beta = d.uniform(lo, 1) if d.chance(0.5) else d.uniform(1, hi)
    return {
        "op": "blur",
        "kernel": kind,
        "size": size,
        "sigma_x": sx,
        "sigma_y": sy,
        "theta": theta,
        "beta": beta,
    }


def _draw_sinc(d: _Dice, size: int) -> dict:
    return {
        "op": "sinc",
        "size": size,
        "omega": d.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi),
    }


def _draw_noise(d: _Dice, s: Stage, scale: float) -> dict | None:
    gray, seed = d.chance(s.gray_prob), d.seed()
    if not d.chance(s.gaussian_prob):
        return {
            "op": "noise",
            "kind": "poisson",
            "scale": d.uniform(*s.poisson_scale),
            "gray": gray,
            "seed": seed,
        }
    level = d.pick(s.noise_levels) if s.noise_levels else s.noise_sigma
    if level is None:
        return None
    return {
        "op": "noise",
        "kind": "gaussian",
        "sigma": d.uniform(*level) * (scale if s.noise_levels else 1.0),
        "gray": gray,
        "seed": seed,
    }


def _draw_jpeg(d: _Dice, s: Stage, scale: float) -> dict | None:
    if not s.jpeg_levels:
        return {"op": "jpeg", "quality": round(d.uniform(*s.jpeg_quality))}
    level = d.pick(s.jpeg_levels)
    return level and {"op": "jpeg", "quality": max(3, round(100 - d.uniform(*level) * scale))}


def _draw_resize(d: _Dice, s: Stage, base: tuple[int, int]) -> dict:
    how = d.pick(("up", "down", "keep"), s.resize_prob)
    f = {
        "up": lambda: d.uniform(1, s.resize_range[1]),
        "down": lambda: d.uniform(s.resize_range[0], 1),
        "keep": lambda: 1.0,
    }[how]()
    size = [max(4, round(n * f)) for n in base]
    return {"op": "resize", "size": size, "mode": d.pick(("area", "bilinear", "bicubic"))}


def draw(
    hr_size: tuple[int, int], config: DegradationConfig, generator: torch.Generator
) -> list[dict]:
    """Sample one degradation for an HR image of (height, width): a JSON-able list of operations in
    order."""
    d, ops = _Dice(generator), []
    lr_size = (max(1, hr_size[0] // config.scale), max(1, hr_size[1] // config.scale))
    for i, s in enumerate(config.stages):
        if d.chance(s.blur_prob):
            ops.append(_draw_blur(d, s, hr_size[1] / lr_size[1]))
        ops.append(_draw_resize(d, s, lr_size if i > 0 or config.base_on_lr else hr_size))
        later = max(
            1.0, ops[-1]["size"][1] / lr_size[1]
        )  # what the coming downsampling takes away, see `label`
        if d.chance(s.noise_prob):
            ops.append(_draw_noise(d, s, later))
        if i + 1 < len(config.stages) or len(config.stages) == 1:
            if d.chance(s.jpeg_prob):
                ops.append(_draw_jpeg(d, s, later))
    ops = [op for op in ops if op is not None]
    last = {
        "op": "resize",
        "size": list(lr_size),
        "mode": d.pick(("area", "bilinear", "bicubic")),
        "final": True,
    }
    if len(config.stages) == 1:
        return [*ops, last]
    # Second order ends with [resize + sinc] and JPEG in either order (Real-ESRGAN, section 3.4).
    resized = [last] + (
        [_draw_sinc(d, d.pick(s.kernel_sizes))] if d.chance(config.final_sinc_prob) else []
    )
    final_jpeg = [_draw_jpeg(d, s, 1.0)]
    return ops + (resized + final_jpeg if d.chance(0.5) else final_jpeg + resized)


# ---------------------------------------------------------------- applying


def blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image of (b, c, h, w) with its own (b, k, k) kernel, edges
    replicated, by FFT."""
    k, (h, w) = kernels.shape[-1], x.shape[-2:]
    r = k // 2
    x = F.pad(x, (r, r, r, r), mode="replicate")
    shape = (x.shape[-2] + k - 1, x.shape[-1] + k - 1)
    y = torch.fft.irfft2(
        torch.fft.rfft2(x, s=shape) * torch.fft.rfft2(kernels.flip(-1, -2), s=shape)[:, None],
        s=shape,
    )
    return y[..., 2 * r : 2 * r + h, 2 * r : 2 * r + w]


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Compress and decode one (3, h, w) image in [0, 1] with the real codec (4:2:0, as cameras and
    the web do)."""
    array = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=int(quality))
    return (
        torch.from_numpy(np.array(Image.open(buffer))).to(x.device).permute(2, 0, 1).float() / 255
    )


def noise_for(x: Tensor, op: dict) -> Tensor:
    """The noise that a recorded operation adds to one (3, h, w) image; made on the CPU so that
    every device agrees."""
    g = torch.Generator().manual_seed(op["seed"])
    if op["kind"] == "gaussian":
        shape = x.shape[-2:] if op["gray"] else x.shape
        return (torch.randn(shape, generator=g) * (op["sigma"] / 255)).to(x.device).expand_as(x)
    source = (x.cpu().clamp(0, 1) * 255).round() / 255
    if op["gray"]:
        source = (source * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    # Real-ESRGAN: the photon count at white is the number of distinct values, rounded up to a power
    # of two.
    counts = 2.0 ** math.ceil(math.log2(max(2, len(torch.unique(source)))))
    n = torch.poisson(source * counts, generator=g) / counts - source
    return (n * op["scale"]).to(x.device).expand_as(x)


def apply(hr: Tensor, draws: list[list[dict]]) -> Tensor:
    """Run recorded draws over a batch: (b, 3, h, w) in [0, 1] → LR (b, 3, h', w') in [0, 1],
    multiples of 1/255.

    Images are processed step by step together; those that share operation and size go through in
    one call. Noise operations note the measured standard deviation (`std`, of 255) in the draw: the
    labels need it.
    """
    if hr.ndim != 4 or hr.shape[1] != 3 or len(draws) != hr.shape[0]:
        raise ValueError(
            f"expected (b, 3, h, w) images and b draws, got {tuple(hr.shape)} and {len(draws)} "
            f"draws"
        )
    images = list(hr.float().unbind(0))
    for step in range(max(len(d) for d in draws)):
        blurs = defaultdict(list)
        for i, ops in enumerate(draws):
            if step >= len(ops):
                continue
            op, x = ops[step], images[i]
            if op["op"] in ("blur", "sinc"):
                blurs[(x.shape[-2:], op["size"])].append(i)
            elif op["op"] == "resize":
                if tuple(op["size"]) != tuple(x.shape[-2:]):
                    flat = {} if op["mode"] == "area" else {"align_corners": False}
                    images[i] = F.interpolate(
                        x[None], size=tuple(op["size"]), mode=op["mode"], **flat
                    )[0].clamp(0, 1)
            elif op["op"] == "noise":
                noisy = (x + noise_for(x, op)).clamp(0, 1)
                op["std"] = round(float((noisy - x).std()) * 255, 4)
                images[i] = noisy
            elif op["op"] == "jpeg":
                images[i] = jpeg(x, op["quality"])
            else:
                raise ValueError(
                    f"unknown operation {op['op']!r} in a recorded draw; known: blur, sinc, "
                    f"resize, noise, jpeg"
                )
        for members in blurs.values():
            kernels = torch.stack([kernel_of(draws[i][step]) for i in members]).to(hr.device)
            for i, y in zip(
                members,
                blur(torch.stack([images[i] for i in members]), kernels).clamp(0, 1),
                strict=True,
            ):
                images[i] = y
    return (torch.stack(images) * 255).round() / 255


def _level(value: float, bounds: tuple[float, float, float]) -> str:
    return LEVELS[sum(value > b for b in bounds)]


def label(ops: list[dict], hr_size: tuple[int, int]) -> dict[str, str]:
    """The five labels of an applied draw, all as they are seen in the LR image, for one and two
    stages alike.

    blur: root sum of squares of the kernels' radii, each scaled to LR pixels. noise: the same for
    the measured standard deviations, each reduced by the later downsampling (which averages it
    away). compression: 100 - quality of the strongest JPEG, likewise reduced. resize: the first
    resize against the HR size; final_resize: the last one.
    """
    size, widths = hr_size[1], []
    for op in ops:
        widths.append(size)
        size = op["size"][1] if op["op"] == "resize" else size
    lr = size
    shrink = [min(1.0, lr / w) for w in widths]
    blur2 = sum(
        (kernel_radius(o) * lr / w) ** 2
        for o, w in zip(ops, widths, strict=True)
        if o["op"] in ("blur", "sinc")
    )
    noise2 = sum(
        (o["std"] * f) ** 2 for o, f in zip(ops, shrink, strict=True) if o["op"] == "noise"
    )
    loss = max(
        [(100 - o["quality"]) * f for o, f in zip(ops, shrink, strict=True) if o["op"] == "jpeg"],
        default=0.0,
    )
    resizes = [(w, o["size"][1]) for o, w in zip(ops, widths, strict=True) if o["op"] == "resize"]
    direction = [RESIZES[1 + (b > a) - (b < a)] for a, b in resizes]
    return dict(
        zip(
            LABELS,
            (
                _level(math.sqrt(blur2), BLUR_BOUNDS),
                direction[0],
                _level(math.sqrt(noise2), NOISE_BOUNDS),
                _level(loss, JPEG_BOUNDS),
                direction[-1],
            ),
            strict=True,
        )
    )


def degrade(
    hr: Tensor, config: DegradationConfig | str = "paper", generator: torch.Generator | None = None
) -> Degraded:
    """Degrade a batch (b, 3, h, w) in [0, 1]: LR images, draws and labels. `config` is a config or
    a preset's name."""
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"no preset {config!r}; choose one of {', '.join(PRESETS)}")
        config = PRESETS[config]
    h, w = hr.shape[-2:]
    if h % config.scale or w % config.scale:
        raise ValueError(
            f"image of {w}x{h} pixels does not divide by the scale {config.scale}: crop it first"
        )
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    draws = [draw((h, w), config, generator) for _ in range(hr.shape[0])]
    lr = apply(hr, draws)
    return Degraded(lr, draws, [label(d, (h, w)) for d in draws])


# ---------------------------------------------------------------- words


def to_words(labels: dict[str, str]) -> str:
    """The paper's sentence, e.g. "medium blur, downsample, heavy noise, light compression,
    upsample"."""
    return (
        f"{labels['blur']} blur, {labels['resize']}, {labels['noise']} noise, "
        f"{labels['compression']} compression, {labels['final_resize']}"
    )


def from_words(text: str) -> dict[str, str]:
    """Read the sentence back. Parts that are missing or malformed are left out, so a reward can
    count what is right."""
    parts = [" ".join(p.split()) for p in text.lower().split(",")]
    out = {}
    for name, part in zip(LABELS, parts, strict=False):
        if name in ("resize", "final_resize"):
            if part in RESIZES:
                out[name] = part
        else:
            level, _, word = part.partition(" ")
            if level in LEVELS and word == name:
                out[name] = level
    return out
