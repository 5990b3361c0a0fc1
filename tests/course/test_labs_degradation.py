"""The labs of notebook 01: every check passes what is right and names at least three typical
mistakes."""

import math

import pytest
import torch
import torch.nn.functional as F

from realsr_r1 import degradation as D
from realsr_r1.course.checks import degradation as checks


def kernel(size, sx, sy, theta, half=0.5, power=2, middle=None, normalize=True):
    axis = torch.arange(size).float() - (size // 2 if middle is None else middle)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u, v = x * math.cos(theta) + y * math.sin(theta), -x * math.sin(theta) + y * math.cos(theta)
    k = torch.exp(-half * ((u / sx).abs() ** power + (v / sy).abs() ** power))
    return k / k.sum() if normalize else k


def noise(x, sigma, gray, generator, unit=255.0, one=False, clamp=True, sample=torch.randn):
    shape = x.shape[-2:] if gray or one else x.shape
    y = x + sample(shape, generator=generator) * sigma / unit
    return y.clamp(0, 1) if clamp else y


def in_place(x, sigma, gray, generator):
    x += torch.randn(x.shape, generator=generator) * sigma / 255
    return x


MASK = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]])


def estimate(y, norm=6.0, mad=0.6745, unit=255.0, robust=torch.median, padding=0, mask=MASK):
    r = F.conv2d(y[None, None], mask[None, None], padding=padding) / norm
    return float(robust(r.abs())) / mad * unit


RIGHT = {
    "anisotropic_kernel": kernel,
    "add_gaussian_noise": noise,
    "share_left": checks.projection,
    "level": checks.level_of,
    "estimate_noise": estimate,
}

WRONG = [
    ("anisotropic_kernel", lambda *a: kernel(*a, normalize=False), "divide by its sum"),
    ("anisotropic_kernel", lambda n, a, b, t: kernel(n, a, b, 0.0), "theta has no effect"),
    ("anisotropic_kernel", lambda n, a, b, t: kernel(n, a, b, -t), "wrong way"),
    ("anisotropic_kernel", lambda n, a, b, t: kernel(n, a, b, math.radians(t)), "radians already"),
    ("anisotropic_kernel", lambda n, a, b, t: kernel(n, b, a, t), "swapped"),
    ("anisotropic_kernel", lambda *a: kernel(*a, half=1.0), "factor 1/2"),
    ("anisotropic_kernel", lambda *a: kernel(*a, power=1), "no Gaussian"),
    ("anisotropic_kernel", lambda n, *a: kernel(n, *a, middle=0), "not in its middle"),
    ("anisotropic_kernel", lambda n, *a: kernel(n, *a, middle=n / 2), "half a pixel"),
    (
        "anisotropic_kernel",
        lambda n, a, b, t: kernel(n, math.sqrt(a), math.sqrt(b), t),
        "sigma itself is squared",
    ),
    ("anisotropic_kernel", lambda n, a, b, t: kernel(15, a, b, t), "size 9"),
    ("anisotropic_kernel", lambda n, *a: kernel(n, *a)[0], "(size, size)"),
    ("anisotropic_kernel", lambda n, *a: torch.ones(n, n) / n**2, "term by term"),
    ("add_gaussian_noise", lambda *a: noise(*a, unit=1.0, clamp=False), "divide by 255"),
    ("add_gaussian_noise", lambda *a: noise(*a, unit=1.0), "divide by 255"),
    ("add_gaussian_noise", lambda x, *a: noise(x * 255, *a, unit=1.0, clamp=False), "in [0, 255]"),
    ("add_gaussian_noise", lambda *a: noise(*a, unit=255.0**2), "too weak"),
    ("add_gaussian_noise", lambda x, s, g, r: noise(x, math.sqrt(s), g, r), "variance"),
    ("add_gaussian_noise", lambda *a: noise(*a, sample=torch.rand), "torch.rand has not"),
    (
        "add_gaussian_noise",
        lambda *a: noise(
            *a, sample=lambda n, generator: (torch.rand(n, generator=generator) - 0.5) * 12**0.5
        ),
        "uniform",
    ),
    ("add_gaussian_noise", lambda x, s, g, r: noise(x, s, g, None), "same generator"),
    (
        "add_gaussian_noise",
        lambda x, s, g, r: noise(x, s, g, torch.Generator().manual_seed(0)),
        "do not seed",
    ),
    ("add_gaussian_noise", lambda *a: noise(*a, one=True), "own noise"),
    ("add_gaussian_noise", lambda x, s, g, r: noise(x, s, False, r), "gray=True"),
    ("add_gaussian_noise", lambda *a: noise(*a, clamp=False), "clamp"),
    ("add_gaussian_noise", lambda x, *a: noise(x, *a) - x, "add it to the photo"),
    ("add_gaussian_noise", in_place, "new tensor"),
    ("share_left", lambda a, x: float(x.norm() / a.norm()), "project"),
    ("share_left", lambda a, x: float((a * x).sum() / x.square().sum()), "divide by added's"),
    ("share_left", lambda a, x: float((a * x).sum()), "did not divide"),
    ("share_left", lambda a, x: float((a * x).sum() / a.norm()), "not by its root"),
    ("share_left", lambda a, x: float((a * x).sum() / a.square().sum()), "cut the share at 0"),
    ("share_left", lambda a, x: None, "returned nothing"),
    ("level", lambda v, b: D.LEVELS[sum(v >= x for x in b)], "not >="),
    ("level", lambda v, b: D.LEVELS[3 - sum(v > x for x in b)], "reversed"),
    ("level", lambda v, b: sum(v > x for x in b), "return one of"),
    ("level", lambda v, b: checks.level_of(v, (0.5, 2.0, 4.0)), "fixed numbers"),
    ("level", lambda v, b: None, "returned nothing"),
    ("estimate_noise", lambda y: estimate(y, unit=1.0), "multiply by 255"),
    ("estimate_noise", lambda y: estimate(y, mad=1.0), "divide by 0.6745"),
    ("estimate_noise", lambda y: estimate(y, mad=1 / 0.6745), "you multiply"),
    ("estimate_noise", lambda y: estimate(y, norm=1.0), "divide the residual by 6"),
    ("estimate_noise", lambda y: estimate(y, norm=1.0, mad=1.0), "two scalings"),
    ("estimate_noise", lambda y: estimate(y, norm=36.0), "divided by 36"),
    ("estimate_noise", lambda y: estimate(y, robust=torch.mean), "mean of |r|"),
    ("estimate_noise", lambda y: estimate(y, mad=0.798, robust=torch.mean), "edges are outliers"),
    (
        "estimate_noise",
        lambda y: estimate(y, mad=1.0, robust=lambda r: r.square().mean().sqrt()),
        "edges are outliers",
    ),
    ("estimate_noise", lambda y: float((y - y.median()).abs().median()) / 0.6745 * 255, "plane"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_right_passes(name, capsys):
    assert getattr(checks, name)(RIGHT[name])
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "wrong", "words"), WRONG, ids=[f"{n}-{w}" for n, _, w in WRONG])
def test_wrong_is_named(name, wrong, words, capsys):
    assert not getattr(checks, name)(wrong)
    out = capsys.readouterr().out
    assert "✗" in out and words in out and "stopped with" not in out


def test_every_check_knows_three_mistakes():
    for name in RIGHT:
        assert sum(n == name for n, _, _ in WRONG) >= 3


def test_an_empty_stub_is_no_mistake(capsys):
    def stub(*args):
        raise NotImplementedError

    for name in RIGHT:
        assert not getattr(checks, name)(stub)
    assert capsys.readouterr().out.count("not written yet") == len(RIGHT)


def test_lab_answers_agree_with_the_package():
    assert torch.allclose(
        kernel(21, 3.0, 1.0, 0.7), D.gaussian_kernel(21, 3.0, 1.0, 0.7), atol=1e-6
    )
    hr = torch.rand((4, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    for preset in D.PRESETS:
        done = D.degrade(hr, preset, torch.Generator().manual_seed(1))
        for x, ops, labels in zip(hr, done.draws, done.labels, strict=True):
            seen = D.visible(x, ops)
            assert checks.level_of(seen["noise"], D.NOISE_BOUNDS) == labels["noise"]
            assert checks.level_of(seen["blur"], D.BLUR_BOUNDS) == labels["blur"]
