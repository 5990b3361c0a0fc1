"""Checks for the lesson on evaluation: PSNR on Y, a picture that fools PIQE, a clustered interval,
the share of the way to the ceiling, best of k.

`reference` holds a right version of each, with which the notebook goes on where an exercise is not
done.
"""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from realsr_r1 import perceptual, photographs, stats
from realsr_r1.course.checks import check, expect
from realsr_r1.evaluation import metrics

PHOTOS = ("astronaut", "water-and-rocks")  # of the test split: what a fooling is tried on
SIDE = 160  # of their squares, in pixels
# LPIPS away from the photo at least, and PIQE below the photo's own at least.
FARTHER, NICER = 0.1, 5.0


def _psnr_y(output: Tensor, original: Tensor) -> Tensor:
    """Two batches (b, 3, h, w) in [0, 1] → PSNR in dB on the luma Y of BT.601 in its narrow range,
    (b,)."""
    weights = torch.tensor([65.481, 128.553, 24.966]).view(3, 1, 1) / 255
    error = ((output - original) * weights).sum(1)  # the offset of 16 cancels
    return -10 * torch.log10(error.square().mean((1, 2)).clamp_min(1e-10))


def _fool_piqe(photo: Tensor) -> Tensor:
    """A photo (3, h, w) in [0, 1] → a worse picture of the same shape that PIQE calls better."""
    blurred = F.avg_pool2d(F.pad(photo[None], (2, 2, 2, 2), mode="replicate"), 5, 1)[0]
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    return (blurred + 0.02 * noise).clamp(0, 1)


def _clustered_interval(
    values: ndarray, clusters: list[str], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Values (n,) and the cluster of each → 95% percentile interval of their mean, whole clusters
    drawn."""
    found = stats.clustered(values, clusters, resamples, seed)
    return found.low, found.high


def _share_of_way(control: ndarray, method: ndarray, ceiling: ndarray) -> float:
    """LPIPS (n,) of control, method and ceiling on the same photographs → the share of the way from
    control to ceiling that the method goes."""
    return float((control.mean() - method.mean()) / (control.mean() - ceiling.mean()))


def _best_of(rewards: Tensor, quality: Tensor, k: int) -> Tensor:
    """Rewards and quality (b, n) of n completions per photo → quality (b,) of the one with the
    highest reward among the first k."""
    return quality.gather(1, rewards[:, :k].argmax(1, keepdim=True))[:, 0]


reference = SimpleNamespace(
    psnr_y=_psnr_y,
    fool_piqe=_fool_piqe,
    clustered_interval=_clustered_interval,
    share_of_way=_share_of_way,
    best_of=_best_of,
)


def _near(a: float, b: float, tolerance: float = 1e-3) -> bool:
    return abs(a - b) < tolerance


def _db(error: Tensor, peak: float = 1.0) -> Tensor:
    return 10 * torch.log10(peak**2 / error.square().flatten(1).mean(1))


@check
def psnr_y(student) -> None:
    """(output, original), (b, 3, h, w) in [0, 1] → dB on Y, (b,)."""
    g = torch.Generator().manual_seed(0)
    original = 0.2 + 0.6 * torch.rand(2, 3, 6, 8, generator=g)
    shift = torch.tensor([0.05, -0.02, 0.08]).view(3, 1, 1) * torch.tensor([1.0, 0.3]).view(
        2, 1, 1, 1
    )
    output = original + shift + 0.03 * torch.randn(original.shape, generator=g)
    out = student(output, original)
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(
        out.dim() == 1,
        f"return one number a picture, (b,), got the shape {tuple(out.shape)}: average over the "
        f"last two axes only",
    )
    expect(len(out) == 2, f"two pictures went in, {len(out)} numbers came out")
    d, right = output - original, _psnr_y(output, original)
    narrow = torch.tensor([65.481, 128.553, 24.966]).view(3, 1, 1) / 255
    full = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    wrong = {
        "this is PSNR on RGB: first bring both pictures to Y": _db(d),
        "these are the full-range weights (0.299, 0.587, 0.114): the papers' Y is the "
        "narrow-range one, 65.481/255 and so on, against a peak of 1 (219/255 as the peak "
        "undoes it)": _db((d * full).sum(1)),
        "the weights are of 255 and your pictures of 1: divide the weights by 255": _db(
            (d * narrow * 255).sum(1)
        ),
        "you took the mean of R, G and B: green weighs five times as much as blue": _db(d.mean(1)),
        "the order is R, G, B: your first weight belongs to blue": _db((d * narrow.flip(0)).sum(1)),
        "the minus sign is missing: a small error is a high PSNR": -right,
        "a PSNR has 10 log10 of the squared error, not 20": 2 * right,
        "this is the mean absolute error: square before the mean": -10
        * torch.log10((d * narrow).sum(1).abs().flatten(1).mean(1)),
        "that is the natural logarithm: use log10": right * float(np.log(10)),
    }
    if not torch.allclose(out.float(), right, atol=1e-3):
        for sentence, value in wrong.items():
            expect(not torch.allclose(out.float(), value.float(), atol=1e-3), sentence)
        expect(
            False,
            f"expected {right[0]:.2f} and {right[1]:.2f} dB, got {float(out[0]):.2f} and "
            f"{float(out[1]):.2f}",
        )
    same = student(original, original)
    expect(
        bool(torch.isfinite(same).all()),
        "two equal pictures give infinity: keep the squared error above 1e-10 or so",
    )


@lru_cache(maxsize=2)
def _photo(name: str) -> Tensor:
    found = next(p for p in photographs.load("test") if name in p.file)
    return photographs.to_bytes(photographs.center(found.image(), SIDE)) / 255


@lru_cache(maxsize=1)
def _piqe():
    return metrics.load("piqe")


@check
def fool_piqe(student) -> None:
    """A photo (3, h, w) → a picture that is FARTHER from it by LPIPS and NICER by PIQE."""
    for name in PHOTOS:
        photo = _photo(name)
        kept = photo.clone()
        out = student(photo)
        expect(isinstance(out, Tensor), f"return a picture as a tensor, not {type(out).__name__}")
        expect(torch.equal(photo, kept), "you changed the photo in place: work on a copy")
        expect(
            out.shape == photo.shape,
            f"return the shape of the photo, {tuple(photo.shape)}, not {tuple(out.shape)}",
        )
        expect(bool(torch.isfinite(out).all()), "the picture holds NaN or infinity")
        expect(
            0 <= float(out.min()) and float(out.max()) <= 1,
            "the picture leaves [0, 1]: end with clamp(0, 1)",
        )
        expect(
            torch.equal(out, student(photo)),
            "two calls give two pictures: draw noise from a torch.Generator with a seed of its own",
        )
        away = float(perceptual.distance(out[None], photo[None]))
        before, after = (float(_piqe()(x[None])) for x in (photo, out))
        expect(away > 1e-4, "this is the photo itself: spoil it")
        numbers = f"on {name} LPIPS {away:.2f}, PIQE {before:.0f} → {after:.0f}"
        expect(
            after < before,
            f"PIQE sees through it ({numbers}): a smooth picture is what it punishes most, so "
            f"give it some grain",
        )
        expect(
            away >= FARTHER,
            f"the picture is hardly worse ({numbers}): LPIPS must be {FARTHER:g} or more, so "
            f"destroy detail first",
        )
        expect(
            after <= before - NICER,
            f"PIQE is fooled by a hair only ({numbers}): it must fall by {NICER:g} or more",
        )


def _clusters() -> tuple[ndarray, list[str]]:
    """60 clusters of 1 to 12 values in mixed order; larger clusters have larger values."""
    rng = np.random.default_rng(2)
    sizes = rng.choice([1, 2, 3, 12], 60, p=[0.4, 0.3, 0.2, 0.1])
    means = 1 + rng.normal(0, 1, 60) + 0.15 * sizes
    index = rng.permutation(np.repeat(np.arange(60), sizes))
    return means[index] + rng.normal(0, 0.3, len(index)), [f"author {i}" for i in index]


def _drawn(values: ndarray, clusters: list[str], how: str) -> tuple[float, float]:
    """A wrong interval, for comparison."""
    rng = np.random.default_rng(5)
    _, index = np.unique(clusters, return_inverse=True)
    k, n = index.max() + 1, len(values)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = rng.integers(0, k, (2000, n if how == "too many" else k))
    if how == "naive":
        means = values[rng.integers(0, n, (2000, n))].mean(1)
    elif how == "of means":
        means = (sums / counts)[drawn].mean(1)
    elif how == "once":
        kept = (drawn[:, :, None] == np.arange(k)).any(1)
        means = kept @ sums / (kept @ counts)
    elif how == "fixed count":
        means = sums[drawn].sum(1) / n
    else:
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return tuple(np.percentile(means, (5, 95) if how == "90%" else (2.5, 97.5)))


MISTAKES = {
    "naive": "you drew values one by one: draw clusters, and take all values of each",
    "of means": "this is the mean of cluster means, in which a cluster of 1 weighs as much as one "
    "of 12: pool the values of the drawn clusters, then take their mean",
    "once": "a cluster that is drawn twice must count twice: a test such as `in drawn` keeps it "
    "once only",
    "fixed count": "divide by the number of values that were drawn: it changes from resample to "
    "resample, because clusters differ in size",
    "too many": "the interval is too narrow: draw as many clusters as there are clusters, not as "
    "there are values",
    "90%": "this is a 90% interval: 95% lies between the percentiles 2.5 and 97.5",
}


@check
def clustered_interval(student) -> None:
    """(values (n,), clusters (n,)) → (low, high) of the mean, whole clusters drawn."""
    values, clusters = _clusters()
    out = student(values, clusters)
    expect(
        isinstance(out, tuple | list | np.ndarray) and len(out) == 2,
        "return two numbers, (low, high)",
    )
    low, high = (float(x) for x in out)
    expect(low <= high, "low and high are the wrong way round: low first")
    expect(
        high > low + 1e-9,
        "the interval has no width: draw clusters *with* replacement, or every resample is the "
        "same",
    )
    right = _clustered_interval(values, clusters)
    width = right[1] - right[0]

    def away(other: tuple[float, float]) -> float:
        return max(abs(low - other[0]), abs(high - other[1])) / width

    if away(right) > 0.06:
        found = {how: away(_drawn(values, clusters, how)) for how in MISTAKES}
        nearest = min(found, key=found.get)
        expect(found[nearest] > 0.1, MISTAKES[nearest])
        expect(
            high - low < 2 * width,
            "the interval is far too wide: it must hold the *mean* of a resample, not single "
            "values or single clusters",
        )
        expect(
            False,
            f"expected about [{right[0]:.2f}, {right[1]:.2f}] for 60 clusters, got [{low:.2f}, "
            f"{high:.2f}]",
        )
    again = tuple(float(x) for x in student(values, clusters))
    expect(
        again == (low, high),
        "two calls give two intervals: np.random.default_rng(seed), inside the function",
    )
    other = tuple(float(x) for x in student(values, clusters, seed=1))
    expect(other != (low, high), "the seed has no effect: give it to np.random.default_rng")


@check
def share_of_way(student) -> None:
    """(LPIPS of control, method, ceiling), (n,) each → share of the way, one number."""
    rng = np.random.default_rng(0)
    control = rng.uniform(0.3, 0.5, 20)
    ceiling = control - rng.uniform(0.05, 0.3, 20)
    method = control - rng.uniform(-0.05, 0.12, 20)
    kept = [x.copy() for x in (control, method, ceiling)]
    out = student(control, method, ceiling)
    expect(out is not None, "your function returns nothing: end it with return")
    expect(np.ndim(out) == 0, f"return one number, got the shape {np.shape(out)}: take means first")
    expect(
        all(np.array_equal(a, b) for a, b in zip(kept, (control, method, ceiling), strict=True)),
        "you changed an array that came in: work on copies",
    )
    value, right = float(out), _share_of_way(control, method, ceiling)
    if not _near(value, right):
        gain, way = control - method, control - ceiling
        wrong = {
            "this is the mean of ratios: one photograph with a tiny way would rule it. Divide the "
            "mean gain by the mean way": float((gain / way).mean()),
            "the sign is turned round: LPIPS is lower where a method is better, so the gain is "
            "control minus method": -right,
            "this is what is left of the way: the method's gain is counted from the control": 1
            - right,
            "this is the gain alone: divide it by the whole way, control minus ceiling": float(
                gain.mean()
            ),
            "you divided by the control: the way ends at the ceiling, not at 0": float(
                gain.mean() / control.mean()
            ),
            "the fraction is upside down": 1 / right,
            "this is in percent: return a share, 1 at the ceiling": 100 * right,
        }
        for sentence, number in wrong.items():
            expect(not _near(value, number), sentence)
        expect(False, f"expected {right:.3f}, got {value:.3f}")
    expect(_near(float(student(control, control, ceiling)), 0, 1e-6), "the control goes 0 of it")
    expect(
        float(student(control, control + 0.1, ceiling)) < 0,
        "a method worse than its control has gone backwards: do not clip the share at 0",
    )


@check
def best_of(student) -> None:
    """(rewards (b, n), quality (b, n), k) → quality (b,) of the best-rewarded of the first k."""
    rewards = torch.tensor([[0.2, 0.6, 0.1, 0.9], [0.8, 0.3, 0.7, 0.1], [0.1, 0.3, 0.4, 0.2]])
    quality = torch.tensor([[5.0, 3.0, 1.0, 7.0], [4.0, 9.0, 2.0, 6.0], [8.0, 2.5, 5.5, 3.5]])
    out = student(rewards, quality, 3)
    expect(isinstance(out, Tensor), f"return a tensor, not {type(out).__name__}")
    expect(
        tuple(out.shape) == (3,),
        f"return one number per photo, (b,): here (3,), got the shape {tuple(out.shape)}",
    )
    first = rewards[:, :3], quality[:, :3]
    right = _best_of(rewards, quality, 3)
    wrong = {
        "you looked at all completions: only the first k were drawn": _best_of(rewards, quality, 4),
        "you chose by quality: whoever chooses does not know it, only the reward": first[1].amax(1),
        "you chose by the lowest quality: whoever chooses sees only the reward": first[1].amin(1),
        "this is the reward of the chosen one: return its quality": first[0].amax(1),
        "these are the positions of the chosen ones: return their quality": first[0].argmax(1),
        "you took the lowest reward": _best_of(-rewards, quality, 3),
        "this is the mean of k: choose one": first[1].mean(1),
        "this is the last of the first k, whatever its reward: choose by the reward": first[1][
            :, -1
        ],
    }
    if not torch.allclose(out.float(), right):
        for sentence, value in wrong.items():
            expect(not torch.allclose(out.float(), value.float(), atol=1e-4), sentence)
        expect(False, f"expected {right.tolist()}, got {out.tolist()}")
    expect(
        torch.allclose(student(rewards, quality, 1).float(), quality[:, 0]),
        "best of 1 is the first completion",
    )
