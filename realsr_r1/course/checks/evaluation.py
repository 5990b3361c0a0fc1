"""Checks for the lesson on evaluation: PSNR on Y, a picture that fools PIQE, Fréchet distance,
paired interval, front.

`reference` holds a right version of each, with which the notebook goes on whether or not the
exercises are done.
"""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from realsr_r1 import images as photos
from realsr_r1 import perceptual
from realsr_r1.course.checks import check, expect
from realsr_r1.evaluation import metrics
from realsr_r1.evaluation import sets as benchsets
from realsr_r1.first import scenes

PHOTOS = (
    "scikit-image-astronaut",
    "scratch-water-and-rocks",
)  # of the shipped `eval` photos: what a fooling is tried on
FARTHER, NICER = (
    0.1,
    5.0,
)  # LPIPS away from the photo at least, and PIQE below the photo's own at least


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


def _frechet(a: ndarray, b: ndarray) -> float:
    """Features of two sets, (n, d) and (m, d) → squared Fréchet distance of the Gaussians fitted to
    them."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0))
    return float(
        np.square(a.mean(0) - b.mean(0)).sum()
        + np.trace(first)
        + np.trace(second)
        - 2 * roots.sum()
    )


def _paired_interval(
    a: ndarray, b: ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Scores (n,) of two methods on the same pictures → 95% percentile interval of mean(a) -
    mean(b)."""
    rng, d = np.random.default_rng(seed), np.asarray(a) - np.asarray(b)
    means = d[rng.integers(0, len(d), (resamples, len(d)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _front(points: list[tuple[float, float]]) -> list[int]:
    """(distortion, perception) of each method, lower is better in both → indices of those that none
    dominates, ascending."""

    def dominates(p: tuple[float, float], q: tuple[float, float]) -> bool:
        return p[0] <= q[0] and p[1] <= q[1] and tuple(p) != tuple(q)

    return [i for i, q in enumerate(points) if not any(dominates(p, q) for p in points)]


reference = SimpleNamespace(
    psnr_y=_psnr_y,
    fool_piqe=_fool_piqe,
    frechet=_frechet,
    paired_interval=_paired_interval,
    front=_front,
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
    narrow, full = (
        torch.tensor([65.481, 128.553, 24.966]).view(3, 1, 1) / 255,
        torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1),
    )
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
    return benchsets.centre_square(photos.open_photo(scenes.ASSETS / "eval" / f"{name}.webp"), 192)


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


@check
def frechet(student) -> None:
    """(features (n, d), features (m, d)) → squared Fréchet distance of the two fitted Gaussians."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 3)) @ np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.8], [0.0, 0.0, 0.6]])
    b = (
        rng.normal(size=(50, 3)) @ np.array([[0.7, 0.0, 0.0], [0.9, 1.2, 0.0], [0.0, -0.7, 1.5]])
        + 0.4
    )
    out = student(a, b)
    expect(out is not None, "your function returns nothing: end it with return")
    expect(
        not isinstance(out, complex | np.complexfloating),
        "the result is complex: rounding leaves tiny imaginary parts, take .real",
    )
    expect(np.ndim(out) == 0, f"return one number, got the shape {np.shape(out)}")
    value, right = float(out), _frechet(a, b)
    if not _near(value, right, 1e-4):
        first, second = (np.cov(x, rowvar=False) for x in (a, b))
        gap, traces = np.square(a.mean(0) - b.mean(0)).sum(), np.trace(first) + np.trace(second)
        cross, product = right - gap - traces, first @ second
        wrong = {
            "the means are missing: add the squared distance between them": right - gap,
            "the covariances are missing: two clouds with one centre may still differ": gap,
            "the cross term is missing: - 2 tr((S1 S2)^½), or equal sets would not be at 0": gap
            + traces,
            "the 2 before the cross term is missing": gap + traces + cross / 2,
            "you took the root entry by entry: the root of a matrix has to do with its "
            "eigenvalues": gap + traces - 2 * np.trace(np.sqrt(np.abs(product))),
            "you forgot the root: it is the sum of the roots of the eigenvalues of S1 S2": gap
            + traces
            - 2 * np.trace(product),
            "the distance between the means goes in squared": right - gap + np.sqrt(gap),
            "this is the root of it: FID is the squared distance": np.sqrt(max(right, 0)),
        }
        for sentence, number in wrong.items():
            expect(not _near(value, float(number), 1e-4), sentence)
        expect(False, f"expected {right:.4f} for two clouds of three features, got {value:.4f}")
    expect(_near(float(student(a, a)), 0, 1e-6), "two equal sets must be at distance 0")


@check
def paired_interval(student) -> None:
    """(scores a (n,), scores b (n,)) → (low, high) of mean(a) - mean(b), pictures resampled as
    pairs."""
    rng = np.random.default_rng(1)
    scene = rng.normal(20, 3, 200)  # what all methods have in common: some pictures are hard
    a, b = scene + rng.normal(0.3, 0.4, 200), scene + rng.normal(0, 0.4, 200)
    out = student(a, b)
    expect(
        isinstance(out, tuple | list | np.ndarray) and len(out) == 2,
        "return two numbers, (low, high)",
    )
    low, high = float(out[0]), float(out[1])
    expect(low <= high, "low and high are the wrong way round: low first")
    right_low, right_high = _paired_interval(a, b)
    width, right = high - low, right_high - right_low
    middle, d = (low + high) / 2, a - b
    expect(
        width > 0,
        "the interval has no width: resample *with* replacement, or every resample is the same "
        "pictures",
    )
    expect(not _near(middle, -d.mean(), 0.05), "the sign is turned round: a minus b")
    expect(
        abs(middle) < 5,
        "this is an interval of one method's mean: take the differences a - b first",
    )
    expect(
        width < 4 * right or width > 12 * right,
        "the interval is far too wide: you drew different pictures for a and b, so the "
        "pictures' difficulty does not cancel",
    )
    expect(
        width < 4 * right,
        "this is where single differences lie, not their mean: take the mean of each resample "
        "of n before the percentiles",
    )
    expect(
        width > 0.3 * right,
        "the interval is far too narrow: draw n pictures in each resample, and divide by "
        "nothing after their mean",
    )
    expect(
        not 0.9 < width / right / 0.8394 < 1.07,
        "this is a 90% interval: 95% lies between the percentiles 2.5 and 97.5",
    )
    expect(0.9 < width / right < 1.1, f"expected a width of about {right:.3f}, got {width:.3f}")
    again = student(a, b)
    expect(
        tuple(map(float, again)) == (low, high),
        "two calls give two intervals: np.random.default_rng(seed), inside the function",
    )
    other = student(a, b, seed=1)
    expect(
        tuple(map(float, other)) != (low, high),
        "the seed has no effect: give it to np.random.default_rng",
    )
    expect(
        _near(float(np.mean(student(a, a))), 0, 1e-9),
        "a method minus itself is 0 in every resample",
    )


@check
def front(student) -> None:
    """[(distortion, perception)], lower is better → indices of those that none dominates,
    ascending."""
    points = [(3.0, 1.0), (1.0, 3.0), (1.8, 1.8), (2.5, 2.5), (4.0, 4.0)]
    kept = list(points)
    out = student(points)
    expect(out is not None, "your function returns nothing: end it with return")
    expect(points == kept, "you changed the list that came in: sort a copy")
    out = list(out)
    expect(
        all(isinstance(i, int | np.integer) for i in out),
        "return the indices of the points, not the points",
    )
    found, right = [int(i) for i in out], [0, 1, 2]
    expect(sorted(set(found)) == sorted(found), "an index stands twice in the list")
    expect(
        bool(found), "you keep nothing: a point is as good as itself, which is no reason to drop it"
    )
    expect(set(found) != {4}, "you keep the worst: lower is better in both")
    expect(set(found) != {3, 4}, "these are the dominated ones: return the others")
    expect(
        set(found) != {0, 1},
        "you kept only the best of each column: a compromise that nobody beats in both is on "
        "the front, too",
    )
    expect(
        set(found) != {2},
        "you minimise the sum: that weighs dB against perception one to one, and the front "
        "takes no sides",
    )
    expect(
        set(found) != {0, 1, 2, 3},
        "(2.5, 2.5) is beaten by (1.8, 1.8) in both, and by no end point: compare with every point",
    )
    expect(
        set(found) == set(right),
        f"of {points} the points {right} are on the front, you give {found}",
    )
    expect(found == right, "give the indices in ascending order")
    tie = [(1.0, 2.0), (1.0, 1.0), (2.0, 1.0)]
    expect(
        list(student(tie)) == [1],
        "(1, 2) is as good as (1, 1) in one and worse in the other: it is dominated, so compare "
        "with <=",
    )
    twins = [(1.0, 1.0), (1.0, 1.0)]
    expect(
        list(student(twins)) == [0, 1],
        "two equal points do not dominate each other: one must be better in at least one of the "
        "two",
    )
