"""The checks of the evaluation lesson: what is right passes, and each typical mistake is named."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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


def interval(
    draw="clusters", pool="values", level=(2.5, 97.5), replace=True, fixed=None, turned=False
):
    """A loop, as a student would write it."""

    def of(values, clusters, resamples=2000, seed=0):
        rng = np.random.default_rng(seed if fixed is None else fixed)
        values, names = np.asarray(values), np.asarray(clusters)
        groups = [values[names == name] for name in np.unique(names)]
        means = []
        for _ in range(resamples):
            if draw == "values":
                means.append(rng.choice(values, len(values)).mean())
                continue
            number = len(values) if draw == "too many" else 1 if draw == "one" else len(groups)
            found = rng.choice(len(groups), number, replace=replace)
            found = np.unique(found) if draw == "once" else found
            if pool == "means":
                means.append(np.mean([groups[i].mean() for i in found]))
            else:
                drawn = np.concatenate([groups[i] for i in found])
                means.append(drawn.sum() / len(values) if pool == "fixed" else drawn.mean())
        low, high = np.percentile(means, level)
        return (high, low) if turned else (low, high)

    return of


def unseeded(values, clusters, resamples=2000, seed=0):
    return right.clustered_interval(
        values, clusters, seed=np.random.default_rng().integers(1 << 30)
    )


def best_of(rewards, quality, k):
    return torch.stack([q[int(r[:k].argmax())] for r, q in zip(rewards, quality, strict=True)])


RIGHT = [
    (checks.psnr_y, right.psnr_y),
    (checks.psnr_y, psnr()),
    (checks.psnr_y, package_psnr),
    (checks.fool_piqe, right.fool_piqe),
    (checks.fool_piqe, spoilt(blur=7, noise=0.03, seed=4)),
    (checks.clustered_interval, right.clustered_interval),
    (checks.clustered_interval, interval()),
    (checks.clustered_interval, interval(fixed=None, level=[2.5, 97.5])),
    (checks.share_of_way, right.share_of_way),
    (checks.share_of_way, lambda c, m, t: (c - m).sum() / (c - t).sum()),
    (checks.best_of, right.best_of),
    (checks.best_of, best_of),
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
    (checks.clustered_interval, interval(draw="values"), "one by one"),
    (checks.clustered_interval, interval(pool="means"), "mean of cluster means"),
    (checks.clustered_interval, interval(draw="once"), "must count twice"),
    (checks.clustered_interval, interval(pool="fixed"), "number of values that were drawn"),
    (checks.clustered_interval, interval(draw="too many"), "as many clusters as"),
    (checks.clustered_interval, interval(draw="one"), "far too wide"),
    (checks.clustered_interval, interval(level=(5, 95)), "90% interval"),
    (checks.clustered_interval, interval(replace=False), "with* replacement"),
    (checks.clustered_interval, interval(turned=True), "wrong way round"),
    (checks.clustered_interval, unseeded, "two calls give two intervals"),
    (checks.clustered_interval, interval(fixed=3), "the seed has no effect"),
    (checks.clustered_interval, lambda v, c, resamples=0, seed=0: v.mean(), "two numbers"),
    (checks.share_of_way, lambda c, m, t: ((c - m) / (c - t)).mean(), "mean of ratios"),
    (checks.share_of_way, lambda c, m, t: (m - c).mean() / (c - t).mean(), "sign is turned"),
    (checks.share_of_way, lambda c, m, t: (m - t).mean() / (c - t).mean(), "left of the way"),
    (checks.share_of_way, lambda c, m, t: (c - m).mean(), "gain alone"),
    (checks.share_of_way, lambda c, m, t: (c - m).mean() / c.mean(), "divided by the control"),
    (checks.share_of_way, lambda c, m, t: (c - t).mean() / (c - m).mean(), "upside down"),
    (checks.share_of_way, lambda c, m, t: 100 * right.share_of_way(c, m, t), "in percent"),
    (checks.share_of_way, lambda c, m, t: (c - m) / (c - t), "one number"),
    (checks.share_of_way, lambda c, m, t: max(0.0, right.share_of_way(c, m, t)), "do not clip"),
    (checks.best_of, lambda r, q, k: right.best_of(r, q, 4), "all completions"),
    (checks.best_of, lambda r, q, k: q[:, :k].amax(1), "chose by quality"),
    (checks.best_of, lambda r, q, k: q[:, :k].amin(1), "lowest quality"),
    (checks.best_of, lambda r, q, k: r[:, :k].amax(1), "reward of the chosen one"),
    (checks.best_of, lambda r, q, k: r[:, :k].argmax(1), "positions of the chosen"),
    (checks.best_of, lambda r, q, k: right.best_of(-r, q, k), "lowest reward"),
    (checks.best_of, lambda r, q, k: q[:, :k].mean(1), "mean of k"),
    (checks.best_of, lambda r, q, k: q[:, k - 1], "last of the first k"),
    (checks.best_of, lambda r, q, k: q[:, r[:, :k].argmax(1)], "one number per photo"),
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


def test_the_notebooks_solutions_pass_their_checks(capsys):
    exercises = course.exercises(course.read(NOTEBOOK))
    assert [e.name for e in exercises] == list(vars(right))
    for e in exercises:
        space = {"torch": torch, "Tensor": torch.Tensor, "F": F, "np": np, "ndarray": np.ndarray}
        exec(e.solution, space)
        assert getattr(checks, e.name)(space[e.name]), capsys.readouterr().out
        assert re.search(r"raise NotImplementedError\s*$", e.stub)
