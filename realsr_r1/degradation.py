"""Second-order degradation synthesis, its five labels, and words for them.

A degradation is a list of plain dicts, one per operation: the *draw*. `draw` samples it, `apply`
runs it, `label` finds the five labels by replaying parts of it. All that is random is in the draw
(noise by its seed): the same draw gives the same LR image, bit for bit on one kind of device.

Model and ranges: Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833), as in PURE and RealSR-R1.
Simplifications: JPEG is the real codec (Pillow), not a differentiable approximation; the HR photo
is not sharpened (USM) first.
"""

import functools
import io
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.fft import next_fast_len
from scipy.special import j1
from torch import Tensor

from realsr_r1.common import check_images
from realsr_r1.images import to_image, to_tensor

LEVELS = ("no", "light", "medium", "heavy")
RESIZES = ("downsample", "keep", "upsample")
LABELS = ("blur", "resize", "noise", "compression", "final_resize")
MODES = ("area", "bilinear", "bicubic")
KERNELS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
# Upper bounds of no, light and medium, on what `visible` measures: quantiles of the nano preset
# over training photographs, so that every level of every label is frequent.
BLUR_BOUNDS = (0.05, 0.45, 0.65)  # share of the photo's fine detail that blur took
NOISE_BOUNDS = (0.5, 2.2, 4.4)  # root mean square of the noise that is left, of 255
JPEG_BOUNDS = (1.0, 8.8, 12.5)  # root mean square of what compression changed, of 255


@dataclass(frozen=True)
class Levels:
    """Ranges by level (no, light, medium, heavy; None: left out), as seen at LR scale: what a
    network can learn apart. `shares`: for each severity of a photo, all severities equally
    frequent, the probabilities of the four levels."""

    blur: tuple[tuple[float, float] | None, ...]  # standard deviation, LR pixels
    noise: tuple[tuple[float, float] | None, ...]  # standard deviation, of 255
    jpeg: tuple[tuple[float, float] | None, ...]  # quality
    shares: dict[str, tuple[float, float, float, float]]


@dataclass(frozen=True)
class Stage:
    """Ranges of one blur → resize → noise → JPEG stage. Defaults: Real-ESRGAN's first stage."""

    blur_prob: float = 1.0
    kernel_sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)  # pixels, odd
    kernel_probs: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # in order of KERNELS
    sinc_prob: float = 0.1
    sigma: tuple[float, float] = (0.2, 3.0)  # pixels
    beta_generalized: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize_range: tuple[float, float] = (0.15, 1.5)  # factor, of the stage's base size
    resize_steps: tuple[tuple[float, float], ...] = ()  # instead: factors of LR size, equally often
    gaussian_prob: float = 0.5  # otherwise Poisson
    noise_sigma: tuple[float, float] = (1.0, 30.0)  # of 255
    poisson_scale: tuple[float, float] = (0.05, 3.0)
    gray_prob: float = 0.4
    jpeg_quality: tuple[int, int] = (30, 95)
    levels: Levels | None = None  # instead of `sigma`, `noise_sigma` and `jpeg_quality`


@dataclass(frozen=True)
class DegradationConfig:
    """One or two stages, then the resize to LR size. Two end with [resize and sinc] and JPEG in
    either order (Real-ESRGAN, section 3.4), one with the resize, or the JPEG where `jpeg_last`.
    `antialias`: downsample as cameras do; Real-ESRGAN does not."""

    stages: tuple[Stage, ...] = (
        Stage(),
        Stage(
            blur_prob=0.8,
            sigma=(0.2, 1.5),
            resize_prob=(0.3, 0.4, 0.3),
            resize_range=(0.3, 1.2),
            noise_sigma=(1.0, 25.0),
            poisson_scale=(0.05, 2.5),
        ),
    )
    final_sinc_prob: float = 0.8
    scale: int = 4
    jpeg_last: bool = False
    antialias: bool = False


# Soft enough that a person still sees what most photos show. Both resizes vary, so that their
# labels carry information.
NANO_LEVELS = Levels(
    blur=(None, (0.35, 0.55), (0.65, 0.9), (1.0, 1.3)),
    noise=(None, (3, 6), (9, 15), (19, 28)),
    jpeg=(None, (70, 88), (40, 60), (18, 30)),
    shares={
        "light": (0.5, 0.4, 0.1, 0.0),
        "medium": (0.2, 0.25, 0.4, 0.15),
        "heavy": (0.1, 0.15, 0.3, 0.45),
    },
)
NANO_STAGE = Stage(
    kernel_sizes=(33,),
    kernel_probs=(0.5, 0.5, 0, 0, 0, 0),
    sinc_prob=0.0,
    gaussian_prob=1.0,
    gray_prob=0.3,
    levels=NANO_LEVELS,
    resize_steps=((0.7, 0.9), (1.0, 1.0), (1.3, 2.5), (4.0, 4.0), (4.4, 5.0)),
)


def _nano(*severities: str) -> DegradationConfig:
    levels = replace(NANO_LEVELS, shares={s: NANO_LEVELS.shares[s] for s in severities})
    stage = replace(NANO_STAGE, levels=levels)
    return DegradationConfig(stages=(stage,), jpeg_last=True, antialias=True)


PRESETS = {
    # Real-ESRGAN's options, the degradation of PURE and RealSR-R1.
    "paper": DegradationConfig(),
    # What the shipped weights are trained on, and its thirds.
    "nano": _nano("light", "medium", "heavy"),
    "nano-light": _nano("light"),
    "nano-medium": _nano("medium"),
    "nano-heavy": _nano("heavy"),
}


def preset(name: str) -> DegradationConfig:
    """A preset by name; ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass
class Degraded:
    """A batch of results: LR images, what was drawn for each, and the five labels of each."""

    lr: Tensor  # (b, 3, h / scale, w / scale) in [0, 1], multiples of 1/255
    draws: list[list[dict]]
    labels: list[dict[str, str]]


@functools.lru_cache(maxsize=32)
def _plane(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates y, x (size, size) from the middle."""
    axis = np.arange(size, dtype=np.float64) - size // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float, theta: float, kind: str = "aniso", beta: float = 1.0
) -> Tensor:
    """(size, size) kernel that sums to 1; `kind` of KERNELS, `theta` radians, sigmas in pixels.
    Generalized: exp(-r^(2β)/2); plateau: 1/(1 + r^(2β)), r being the Mahalanobis radius."""
    y, x = _plane(size)
    u, v = x * math.cos(theta) + y * math.sin(theta), -x * math.sin(theta) + y * math.cos(theta)
    r2 = (u / sigma_x) ** 2 + (v / sigma_y) ** 2
    if kind.startswith("plateau"):
        k = 1 / (1 + r2**beta)
    elif kind.startswith("generalized"):
        k = np.exp(-0.5 * r2**beta)
    else:
        k = np.exp(-0.5 * r2)
    return torch.from_numpy((k / k.sum()).astype(np.float32))


def sinc_kernel(size: int, omega: float) -> Tensor:
    """(size, size) ideal low-pass with cut-off `omega`, radians a pixel: rings as if sharpened."""
    r = np.hypot(*_plane(size))
    k = omega * j1(omega * r) / (2 * math.pi * r.clip(1e-9))
    k[size // 2, size // 2] = omega**2 / (4 * math.pi)
    return torch.from_numpy((k / k.sum()).astype(np.float32))


def kernel_of(op: dict) -> Tensor:
    """The kernel of a recorded blur or sinc operation, (size, size)."""
    if "omega" in op:
        return sinc_kernel(op["size"], op["omega"])
    return gaussian_kernel(*(op[k] for k in "size sigma_x sigma_y theta kernel beta".split()))


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
        race = torch.empty_like(p).exponential_(generator=self.generator)
        return items[int((p / race).argmax())]  # as torch.multinomial draws, which is slower

    def seed(self) -> int:
        return int(torch.randint(0, 2**31 - 1, (), generator=self.generator))


def _draw_blur(d: _Dice, stage: Stage, at_lr: tuple[float, float] | None, scale: int) -> dict:
    size = d.pick(stage.kernel_sizes)
    if d.chance(stage.sinc_prob):
        sinc = _draw_sinc(d, size, math.pi / 3 if size < 13 else math.pi / 5)
        return sinc | {"op": "blur", "kernel": "sinc"}
    kind = d.pick(KERNELS, stage.kernel_probs)
    low, high = (at_lr[0] * scale, at_lr[1] * scale) if at_lr else stage.sigma
    sx = sy = d.uniform(low, high)
    theta = 0.0
    if kind.endswith("aniso"):
        sy, theta = d.uniform(low, high), d.uniform(-math.pi, math.pi)
    beta = 1.0
    if kind.startswith(("generalized", "plateau")):
        plateau = kind.startswith("plateau")
        low, high = stage.beta_plateau if plateau else stage.beta_generalized
        beta = d.uniform(low, 1) if d.chance(0.5) else d.uniform(1, high)
    shape = {"sigma_x": sx, "sigma_y": sy, "theta": theta, "beta": beta}
    return {"op": "blur", "kernel": kind, "size": size, **shape}


def _draw_sinc(d: _Dice, size: int, lowest: float = math.pi / 3) -> dict:
    return {"op": "sinc", "size": size, "omega": d.uniform(lowest, math.pi)}


def _draw_noise(d: _Dice, stage: Stage, sigma: tuple[float, float]) -> dict:
    gray, seed = d.chance(stage.gray_prob), d.seed()
    if d.chance(stage.gaussian_prob):
        kind = {"kind": "gaussian", "sigma": d.uniform(*sigma)}
    else:
        kind = {"kind": "poisson", "scale": d.uniform(*stage.poisson_scale)}
    return {"op": "noise", **kind, "gray": gray, "seed": seed}


def _draw_resize(d: _Dice, stage: Stage, base: tuple[int, int], lr: tuple[int, int]) -> dict:
    if stage.resize_steps:
        factor, base = d.uniform(*d.pick(stage.resize_steps)), lr
    else:
        low, high = stage.resize_range
        kinds = {"up": (1, high), "down": (low, 1), "keep": (1, 1)}
        factor = d.uniform(*kinds[d.pick(tuple(kinds), stage.resize_prob)])
    size = [max(4, round(n * factor)) for n in base]
    return {"op": "resize", "size": size, "mode": d.pick(MODES)}


def _draw_stage(
    d: _Dice, stage: Stage, base: tuple[int, int], lr: tuple[int, int], scale: int
) -> list[dict | None]:
    """Blur, resize, noise, JPEG; None for what is left out. `base`, `lr`: (height, width)."""
    levels = stage.levels
    blur, sigma, quality = None, stage.noise_sigma, stage.jpeg_quality
    if levels:
        shares = levels.shares[d.pick(tuple(levels.shares))]
        blur, sigma, quality = (d.pick(x, shares) for x in (levels.blur, levels.noise, levels.jpeg))
    blurred = blur is not None if levels else d.chance(stage.blur_prob)
    first = _draw_blur(d, stage, blur, scale) if blurred else None
    resize = _draw_resize(d, stage, base, lr)
    if levels and sigma:  # the coming downsampling averages noise away
        later = min(2.5, max(1.0, resize["size"][1] / lr[1]))
        sigma = (sigma[0] * later, sigma[1] * later)
    noise = _draw_noise(d, stage, sigma) if sigma else None
    jpeg = {"op": "jpeg", "quality": round(d.uniform(*quality))} if quality else None
    return [first, resize, noise, jpeg]


def draw(
    hr_size: tuple[int, int], config: DegradationConfig, generator: torch.Generator
) -> list[dict]:
    """Sample one degradation for an HR image of (height, width): JSON-able operations in order."""
    d, ops = _Dice(generator), []
    lr = (max(1, hr_size[0] // config.scale), max(1, hr_size[1] // config.scale))
    for i, stage in enumerate(config.stages):
        ops += _draw_stage(d, stage, hr_size if i == 0 else lr, lr, config.scale)
    last = [{"op": "resize", "size": list(lr), "mode": d.pick(MODES), "final": True}]
    jpeg = []
    if len(config.stages) > 1:
        jpeg = [ops.pop()]
        if d.chance(config.final_sinc_prob):
            last.append(_draw_sinc(d, d.pick(config.stages[-1].kernel_sizes)))
        if d.chance(0.5):
            last, jpeg = jpeg, last
    elif config.jpeg_last:
        jpeg = [ops.pop()]
    ops = [op for op in (*ops, *last, *jpeg) if op is not None]
    if config.antialias:
        ops = [op | {"antialias": True} if op["op"] == "resize" else op for op in ops]
    return ops


def blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Each image of (b, c, h, w) with its own (b, k, k) kernel, edges replicated, by FFT."""
    k, (h, w) = kernels.shape[-1], x.shape[-2:]
    r = k // 2
    x = F.pad(x, (r, r, r, r), mode="replicate")
    shape = [next_fast_len(n) for n in x.shape[-2:]]  # what wraps around is cut off below
    rows = torch.fft.rfft(kernels.flip(-1, -2), n=shape[1])  # the other rows are 0
    k_hat = torch.fft.fft(rows, n=shape[0], dim=-2)[:, None]
    y = torch.fft.irfft2(torch.fft.rfft2(x, s=shape) * k_hat, s=shape)
    return y[..., 2 * r : 2 * r + h, 2 * r : 2 * r + w]


def jpeg(x: Tensor, quality: int) -> Tensor:
    """One (3, h, w) image in [0, 1] through the real codec (4:2:0, as cameras and the web do)."""
    buffer = io.BytesIO()
    to_image(x).save(buffer, "JPEG", quality=int(quality))
    return to_tensor(Image.open(buffer)).to(x.device)


def noise_for(x: Tensor, op: dict) -> Tensor:
    """What a recorded operation adds to one (3, h, w) image; made on the CPU: devices agree."""
    g = torch.Generator().manual_seed(op["seed"])
    if op["kind"] == "gaussian":
        shape = x.shape[-2:] if op["gray"] else x.shape
        return (torch.randn(shape, generator=g) * (op["sigma"] / 255)).to(x.device).expand_as(x)
    source = (x.cpu().clamp(0, 1) * 255).round() / 255
    if op["gray"]:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        source = ((source * weights).sum(0, keepdim=True) * 255).round() / 255
    # Real-ESRGAN: photons at white are the distinct values, rounded up to a power of two.
    values = int(torch.bincount((source * 255).round().long().flatten()).count_nonzero())
    counts = 2.0 ** math.ceil(math.log2(max(2, values)))
    n = torch.poisson(source * counts, generator=g) / counts - source
    return (n * op["scale"]).to(x.device).expand_as(x)


def _resize(x: Tensor, op: dict) -> Tensor:
    """One (3, h, w) image to the recorded size."""
    size, mode = tuple(op["size"]), op["mode"]
    if size == tuple(x.shape[-2:]):
        return x
    if mode == "area":
        return F.interpolate(x[None], size=size, mode=mode)[0]
    smooth = op.get("antialias", False)
    x = F.interpolate(x[None], size=size, mode=mode, align_corners=False, antialias=smooth)
    return x[0].clamp(0, 1)


def _run(x: Tensor, op: dict) -> Tensor:
    """One recorded operation on one (3, h, w) image."""
    kind = op["op"]
    if kind in ("blur", "sinc"):
        return blur(x[None], kernel_of(op)[None].to(x.device))[0].clamp(0, 1)
    if kind == "resize":
        return _resize(x, op)
    if kind == "noise":
        return (x + noise_for(x, op)).clamp(0, 1)
    if kind == "jpeg":
        return jpeg(x, op["quality"])
    raise ValueError(f"unknown operation {kind!r} in a draw: blur, sinc, resize, noise or jpeg")


def apply(hr: Tensor, draws: list[list[dict]]) -> Tensor:
    """Run recorded draws: (b, 3, h, w) in [0, 1] → LR (b, 3, h', w') in [0, 1], in 255ths."""
    hr = check_images(hr)
    if len(draws) != len(hr):
        raise ValueError(f"{len(hr)} images need as many draws, got {len(draws)}")
    images = [functools.reduce(_run, ops, x) for x, ops in zip(hr, draws, strict=True)]
    return (torch.stack(images) * 255).round() / 255


def _detail(x: Tensor) -> float:
    """Energy of the finest detail of a (3, h, w) image: mean square of its Laplacian on gray."""
    laplacian = x.new_tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    if min(x.shape[-2:]) < 3:
        return 0.0
    return float(F.conv2d(x.mean(0)[None, None], laplacian[None, None]).square().mean())


def visible(hr: Tensor, ops: list[dict]) -> dict[str, float]:
    """What can be seen of each operation in the LR photo, found by replaying the draw without it.

    blur: share of the fine detail that is gone, in [0, 1]. noise: root mean square, of 255, of what
    was added, times the share that JPEG left standing. compression: that of what JPEG changed. So
    noise that was wiped out later does not count, and blur on a flat picture does not either."""
    kinds = [op["op"] for op in ops]
    shared = next((i for i, kind in enumerate(kinds) if kind in ("noise", "jpeg")), len(ops))
    start = functools.reduce(_run, ops[:shared], hr)  # what all replays but the sharp one share

    def replay(*without: str, x: Tensor = start, rest: list[dict] = ops[shared:]) -> Tensor:
        x = functools.reduce(_run, [op for op in rest if op["op"] not in without], x)
        return (x * 255).round()

    out = {"blur": 0.0, "noise": 0.0, "compression": 0.0}
    full, clean = replay(), replay("noise", "jpeg")
    unsaved = replay("jpeg") if "jpeg" in kinds else full
    if {"blur", "sinc"} & set(kinds):
        sharp = replay("noise", "jpeg", "blur", "sinc", x=hr, rest=ops)
        out["blur"] = max(0.0, 1 - math.sqrt((_detail(clean) + 0.25) / (_detail(sharp) + 0.25)))
    if "noise" in kinds:
        added = unsaved - clean
        left = full - replay("noise")  # JPEG answers noise with changes of its own, so project
        share = float((left * added).sum() / added.square().sum().clamp(min=1))
        out["noise"] = min(1.0, max(0.0, share)) * float(added.square().mean().sqrt())
    if "jpeg" in kinds:
        out["compression"] = float((full - unsaved).square().mean().sqrt())
    return out


def label(hr: Tensor, ops: list[dict]) -> dict[str, str]:
    """The five labels of a draw on the (3, h, w) image in [0, 1] that it is for; see `visible`.
    resize: the first resize against the HR size; final_resize: the last against what came in."""
    size, directions = hr.shape[-1], []
    for op in ops:
        if op["op"] == "resize":
            new = op["size"][1]
            directions.append(RESIZES[1 + (new > size) - (new < size)])
            size = new
    bounds = {"blur": BLUR_BOUNDS, "noise": NOISE_BOUNDS, "compression": JPEG_BOUNDS}
    seen = visible(hr, ops)
    levels = {k: LEVELS[sum(seen[k] > x for x in bounds[k])] for k in bounds}
    known = levels | {"resize": directions[0], "final_resize": directions[-1]}
    return {name: known[name] for name in LABELS}


def degrade(
    hr: Tensor, config: DegradationConfig | str = "paper", generator: torch.Generator | None = None
) -> Degraded:
    """Degrade a batch (b, 3, h, w) of floats in [0, 1] or uint8 by a config or a preset's name: LR
    images, draws and labels. ValueError for other input."""
    if isinstance(config, str):
        config = preset(config)
    hr = check_images(hr)
    h, w = hr.shape[-2:]
    if h % config.scale or w % config.scale:
        raise ValueError(f"image of {w}x{h} pixels does not divide by {config.scale}: crop it")
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    draws = [draw((h, w), config, generator) for _ in range(hr.shape[0])]
    lr = apply(hr, draws)
    return Degraded(lr, draws, [label(x, d) for x, d in zip(hr, draws, strict=True)])


def to_words(labels: dict[str, str]) -> str:
    """The paper's sentence: "medium blur, downsample, heavy noise, light compression, upsample"."""
    return ", ".join(labels[k] + ("" if k.endswith("resize") else f" {k}") for k in LABELS)


def from_words(text: str) -> dict[str, str]:
    """Read the sentence back; parts that are missing or malformed are left out."""
    out = {}
    for name, part in zip(LABELS, text.lower().split(","), strict=False):
        word, *rest = part.split() or [""]
        known, more = (RESIZES, []) if name.endswith("resize") else (LEVELS, [name])
        if word in known and rest == more:
            out[name] = word
    return out
