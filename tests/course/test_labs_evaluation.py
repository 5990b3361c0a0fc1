"""The checks of the evaluation lesson: what is right passes, and each typical mistake is named."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm

from realsr_r1.course import notebooks as course
from realsr_r1.course.checks import evaluation as checks
from realsr_r1.evaluation import metrics

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "06_evaluation.ipynb"
right = checks.reference
NARROW = (65.481, 128.553, 24.966)


def psnr(
    weights=NARROW,
    scale=1 / 255,
    peak=1.0,
    power=2,
    sign=-10,
    axes=(1, 2),
    least=1e-10,
    log=torch.log10,
):
    def of(output, original):
        error = ((output - original) * torch.tensor(weights).view(3, 1, 1) * scale).sum(1)
        return sign * log((error.abs() ** power).mean(axes).clamp_min(least) / peak**2)

    return of


def package_psnr(output, original):
    return metrics.load("psnr_y")(output, original)


def rgb(output, original):
    return -10 * torch.log10((output - original).square().mean((1, 2, 3)).clamp_min(1e-10))


def spoilt(blur=5, noise=0.02, top=1.0, seed=0, change=lambda x: x):
    def of(photo):
        g = torch.Generator().manual_seed(seed) if seed is not None else None
        x = (
            F.avg_pool2d(F.pad(photo[None], (blur // 2,) * 4, mode="replicate"), blur, 1)[0]
            if blur
            else photo
        )
        return change((x + noise * torch.randn(photo.shape, generator=g)).clamp(0, top))

    return of


def in_place(photo):
    return photo.mul_(0.9)


def frechet(
    mean=1.0, traces=1.0, cross=2.0, root=lambda m: sqrtm(m).real.trace(), power=1.0, gap=2
):
    def of(a, b):
        s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        away = np.square(a.mean(0) - b.mean(0)).sum() ** (gap / 2)
        return float(
            (mean * away + traces * (s.trace() + t.trace()) - cross * root(s @ t)) ** power
        )

    return of


def interval(
    pairs=True,
    level=(2.5, 97.5),
    replace=True,
    mean=True,
    of_what=lambda a, b: a - b,
    fixed=None,
    scale=1.0,
    turned=False,
):
    def of(a, b, resamples=2000, seed=0):
        rng, n = np.random.default_rng(seed if fixed is None else fixed), len(a)

        def draw():
            if replace:
                return rng.integers(0, n, (resamples, n))
            return np.stack([rng.permutation(n) for _ in range(resamples)])

        if not mean:
            values = of_what(a, b)[draw()].ravel()
        else:
            values = (
                of_what(a, b)[draw()].mean(1) if pairs else a[draw()].mean(1) - b[draw()].mean(1)
            )
        low, high = np.percentile(values, level) * scale
        return (high, low) if turned else (low, high)

    return of


def unseeded(a, b, resamples=2000, seed=0):
    return right.paired_interval(a, b, resamples, seed=None)


def front(beaten=lambda p, q: p[0] <= q[0] and p[1] <= q[1] and p != q, keep=False):
    return lambda points: [
        i for i, q in enumerate(points) if keep == any(beaten(p, q) for p in points)
    ]


def sorting(points):
    points.sort()
    return right.front(points)


RIGHT = [
    (checks.psnr_y, right.psnr_y),
    (checks.psnr_y, psnr()),
    (checks.psnr_y, package_psnr),
    (checks.fool_piqe, right.fool_piqe),
    (checks.fool_piqe, spoilt(blur=7, noise=0.03, seed=4)),
    (checks.frechet, right.frechet),
    (checks.frechet, frechet()),
    (checks.paired_interval, right.paired_interval),
    (checks.paired_interval, interval()),
    (checks.front, right.front),
    (checks.front, front()),
]

WRONG = [
    (checks.psnr_y, rgb, "PSNR on RGB"),
    (checks.psnr_y, psnr((0.299, 0.587, 0.114), 1), "full-range weights"),
    (checks.psnr_y, psnr(scale=1), "divide the weights by 255"),
    (checks.psnr_y, psnr((1 / 3,) * 3, 1), "mean of R, G and B"),
    (checks.psnr_y, psnr(NARROW[::-1]), "order is R, G, B"),
    (checks.psnr_y, psnr(peak=219 / 255), "undoes it"),
    (checks.psnr_y, psnr(sign=10), "minus sign"),
    (checks.psnr_y, psnr(sign=-20), "not 20"),
    (checks.psnr_y, psnr(power=1), "square before the mean"),
    (checks.psnr_y, psnr(log=torch.log), "natural logarithm"),
    (checks.psnr_y, psnr(axes=None), "one number a picture"),
    (checks.psnr_y, psnr(least=0), "give infinity"),
    (checks.fool_piqe, lambda photo: photo.clone(), "the photo itself"),
    (checks.fool_piqe, spoilt(noise=0), "PIQE sees through it"),
    (checks.fool_piqe, spoilt(blur=0, noise=0.015), "hardly worse"),
    (checks.fool_piqe, spoilt(seed=None), "two calls give two pictures"),
    (checks.fool_piqe, spoilt(change=lambda x: x * 1.2), "leaves [0, 1]"),
    (checks.fool_piqe, spoilt(change=lambda x: x[None]), "shape of the photo"),
    (checks.fool_piqe, in_place, "in place"),
    (checks.fool_piqe, lambda photo: photo * float("nan"), "NaN"),
    (checks.frechet, frechet(mean=0), "means are missing"),
    (checks.frechet, frechet(traces=0, cross=0), "covariances are missing"),
    (checks.frechet, frechet(cross=0), "cross term is missing"),
    (checks.frechet, frechet(cross=1), "the 2 before"),
    (checks.frechet, frechet(root=lambda m: np.sqrt(np.abs(m)).trace()), "entry by entry"),
    (checks.frechet, frechet(root=np.trace), "forgot the root"),
    (checks.frechet, frechet(gap=1), "goes in squared"),
    (checks.frechet, frechet(power=0.5), "squared distance"),
    (checks.frechet, lambda a, b: complex(right.frechet(a, b), 1e-9), "take .real"),
    (checks.paired_interval, interval(pairs=False), "different pictures for a and b"),
    (checks.paired_interval, interval(mean=False), "single differences"),
    (checks.paired_interval, interval(of_what=lambda a, b: a), "one method's mean"),
    (checks.paired_interval, interval(of_what=lambda a, b: b - a), "sign is turned round"),
    (checks.paired_interval, interval(level=(5, 95)), "90% interval"),
    (checks.paired_interval, interval(replace=False), "with* replacement"),
    (checks.paired_interval, interval(of_what=lambda a, b: (a - b).repeat(20)), "expected a width"),
    (checks.paired_interval, interval(turned=True), "wrong way round"),
    (checks.paired_interval, unseeded, "two calls give two intervals"),
    (checks.paired_interval, interval(fixed=3), "the seed has no effect"),
    (checks.front, front(lambda p, q: p[0] < q[0] and p[1] < q[1]), "compare with <="),
    (checks.front, front(lambda p, q: p[0] <= q[0] and p[1] <= q[1]), "you keep nothing"),
    (checks.front, front(keep=True), "dominated ones"),
    (checks.front, front(lambda p, q: p[0] > q[0] and p[1] > q[1]), "keep the worst"),
    (
        checks.front,
        lambda points: [min(range(len(points)), key=lambda i: sum(points[i]))],
        "minimise the sum",
    ),
    (
        checks.front,
        lambda points: sorted(
            min(range(len(points)), key=lambda i, k=k: points[i][k]) for k in (0, 1)
        ),
        "each column",
    ),
    (checks.front, lambda points: [points[i] for i in right.front(points)], "not the points"),
    (checks.front, lambda points: right.front(points)[::-1], "ascending"),
    (checks.front, sorting, "changed the list"),
]


@pytest.mark.parametrize(("check", "student"), RIGHT)
def test_right_functions_pass(check, student, capsys):
    said = check(student), capsys.readouterr().out
    assert said[0], said[1]


@pytest.mark.parametrize(
    ("check", "student", "words"), WRONG, ids=[f"{c.__name__}: {w}" for c, _, w in WRONG]
)
def test_each_mistake_is_named(check, student, words, capsys):
    assert not check(student)
    said = capsys.readouterr().out
    assert words in said, said


@pytest.mark.parametrize("name", vars(right))
def test_an_empty_stub_and_a_broken_one(name, capsys):
    def stub(*_, **__):
        raise NotImplementedError

    def broken(*_, **__):
        return 1 / 0

    check = getattr(checks, name)
    assert not check(stub) and "not written yet" in capsys.readouterr().out
    assert not check(broken) and "ZeroDivisionError" in capsys.readouterr().out


def test_the_distance_of_two_gaussians_by_hand():
    """Two one-dimensional sets as two columns: means 0 and 3, deviations 1 and 2, so 9 + 1 a
    column."""
    unit = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]) * np.sqrt(
        0.75
    )  # sample variance 1, no correlation
    assert right.frechet(unit, 2 * unit + 3) == pytest.approx(20)


def test_the_notebooks_solutions_pass_their_checks(capsys):
    exercises = course.exercises(course.read(NOTEBOOK))
    assert [e.name for e in exercises] == list(vars(right))
    for e in exercises:
        space = {"torch": torch, "Tensor": torch.Tensor, "F": F, "np": np, "ndarray": np.ndarray}
        exec(e.solution, space)
        assert getattr(checks, e.name)(space[e.name]), capsys.readouterr().out
        assert re.search(r"raise NotImplementedError\s*$", e.stub)
