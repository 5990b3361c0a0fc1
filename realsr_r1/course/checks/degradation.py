"""Checks for notebook 01: kernels, noise, what JPEG leaves of it, a level's name, and the noise of
a photo."""

import math

import torch
from torch import Tensor

from realsr_r1 import degradation
from realsr_r1.course.checks import Mistake, check, expect, number


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < tolerance)


# ---------------------------------------------------------------- 1.1


def _kernel_without(
    size: int,
    sx: float,
    sy: float,
    theta: float,
    half: float = 0.5,
    power: int = 2,
    center: float | None = None,
) -> Tensor:
    """The anisotropic kernel with one ingredient changed, to recognize a student's mistake."""
    axis = torch.arange(size, dtype=torch.float64) - (size // 2 if center is None else center)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u, v = x * math.cos(theta) + y * math.sin(theta), -x * math.sin(theta) + y * math.cos(theta)
    k = torch.exp(-half * ((u / sx).abs() ** power + (v / sy).abs() ** power))
    return (k / k.sum()).float()


@check
def anisotropic_kernel(student):
    """`anisotropic_kernel(size, sigma_x, sigma_y, theta) -> (size, size)`."""
    args = (15, 3.0, 1.2, 0.5)
    k = student(*args)
    expect(isinstance(k, Tensor), f"return a torch tensor, not {type(k).__name__}")
    expect(
        tuple(k.shape) == (15, 15),
        f"the kernel must be (size, size), here (15, 15), not {tuple(k.shape)}",
    )
    k, right = k.float(), _kernel_without(*args)
    total = float(k.sum())
    expect(
        abs(total - 1) < 1e-3,
        f"the kernel sums to {total:.3g} instead of 1, so the photo would change its "
        f"brightness: divide by its sum",
    )
    if _close(k, right, 1e-5):
        other = student(9, 1.0, 2.5, -1.0).float()
        expect(
            _close(other, _kernel_without(9, 1.0, 2.5, -1.0), 1e-5),
            "right for one set of arguments, wrong for size 9: is a number built in?",
        )
        return
    size, sx, sy, theta = args
    known = (
        (
            _kernel_without(size, sx, sy, 0.0),
            "theta has no effect: rotate the coordinates before you divide by the sigmas",
        ),
        (
            _kernel_without(size, sx, sy, -theta),
            "the ellipse turns the wrong way: u = x cos θ + y sin θ, v = -x sin θ + y cos θ",
        ),
        (
            _kernel_without(size, sx, sy, math.radians(theta)),
            "theta is in radians already: do not convert it from degrees",
        ),
        (
            _kernel_without(size, sy, sx, theta),
            "the two sigmas are swapped: sigma_x is the spread along u, which is x (the "
            "columns) at θ = 0",
        ),
        (
            _kernel_without(size, sx, sy, theta, half=1.0),
            "the factor 1/2 in the exponent is missing, so the blur is weaker than sigma says",
        ),
        (
            _kernel_without(size, sx, sy, theta, power=1),
            "square u/sigma_x and v/sigma_y: without the square it is no Gaussian",
        ),
        (
            _kernel_without(size, math.sqrt(sx), math.sqrt(sy), theta),
            "sigma itself is squared in the exponent: (u/sigma)², not u²/sigma",
        ),
        (
            _kernel_without(size, sx, sy, theta, center=0),
            "the center of the kernel is not in its middle: coordinates run from -(size // 2) "
            "to size // 2",
        ),
        (
            _kernel_without(size, sx, sy, theta, center=size / 2),
            "the center is half a pixel off: subtract size // 2, a whole number",
        ),
    )
    for wrong, sentence in known:
        if _close(k, wrong, 1e-5):
            raise Mistake(sentence)
    raise Mistake(
        "the kernel sums to 1, but its values are not those of a rotated Gaussian: compare it "
        "with the formula, term by term"
    )


# ---------------------------------------------------------------- 1.2


@check
def add_gaussian_noise(student):
    """`add_gaussian_noise(x, sigma, gray, generator) -> noisy x`."""

    def g(seed=0):
        return torch.Generator().manual_seed(seed)

    x = torch.full((3, 96, 96), 0.5)
    kept = x.clone()
    y = student(x, 10.0, False, g())
    expect(
        torch.equal(x, kept),
        "your function changes the photo it is given: return a new tensor (no +=, no add_)",
    )
    expect(
        isinstance(y, Tensor) and y.shape == x.shape,
        "return a tensor of the photo's own shape (3, h, w)",
    )
    expect(abs(float(y.mean())) > 0.1, "you return the noise alone: add it to the photo")
    expect(
        float(y.median()) < 2,
        "your result is in [0, 255]: divide sigma by 255 instead of multiplying the photo",
    )
    std = float((y - x).std()) * 255
    expect(
        std < 80,
        f"the noise is far too strong ({std:.0f} of 255): sigma is in units of 255, the photo "
        f"in [0, 1], so divide by 255",
    )
    shift = float((y - x).mean()) * 255
    expect(
        abs(shift) < 2,
        f"the photo's brightness moves by {shift:.1f} of 255: noise has mean 0 (torch.randn "
        f"has, torch.rand has not)",
    )
    expect(
        std > 1,
        f"the noise is far too weak ({std:.2f} of 255 where 10 was asked): divide sigma by 255 "
        f"once, and do not divide the photo",
    )
    expect(
        abs(std - math.sqrt(10)) > 0.3,
        "the noise has variance sigma instead of standard deviation sigma: multiply randn by "
        "sigma, not by its root",
    )
    expect(
        abs(std - 10) < 0.5,
        f"the noise's standard deviation is {std:.2f} of 255 where 10 was asked",
    )
    excess = float((((y - x) / (y - x).std()) ** 4).mean()) - 3
    expect(excess > -0.6, "the noise is uniform, not Gaussian: use torch.randn")
    again = student(x, 10.0, False, g())
    expect(
        torch.equal(y, again),
        "two calls with the same generator seed differ: pass generator=generator to torch.randn",
    )
    expect(
        not torch.equal(y, student(x, 10.0, False, g(1))),
        "the generator's seed has no effect: do not seed inside the function",
    )
    noise = y - x
    expect(
        not torch.allclose(noise[0], noise[1], atol=1e-6),
        "with gray=False every channel needs its own noise; yours is the same in all three",
    )
    gray = student(x, 10.0, True, g()) - x
    expect(
        torch.allclose(gray[0], gray[1], atol=1e-6) and torch.allclose(gray[0], gray[2], atol=1e-6),
        "with gray=True all three channels share one noise field: draw (h, w) once and add it "
        "to each",
    )
    weak = float((student(x, 3.0, False, g()) - x).std()) * 255
    expect(abs(weak - 3) < 0.3, "sigma has no effect: is a number built in?")
    expect(
        abs(float(gray.std()) * 255 - 10) < 0.6,
        "with gray=True the noise is not as strong as without",
    )
    dark = student(torch.zeros(3, 32, 32), 20.0, False, g())
    expect(float(dark.min()) >= 0, "a black photo leaves [0, 1]: clamp at 0, too")
    edge = student(torch.ones(3, 32, 32), 20.0, False, g())
    expect(
        float(edge.max()) <= 1.0,
        "a white photo leaves [0, 1]: clamp the sum, as a camera's sensor saturates",
    )


# ---------------------------------------------------------------- 1.3


def noisy(x: Tensor, sigma: float, gray: bool, generator: torch.Generator) -> Tensor:
    """(3, h, w) with noise of `sigma` of 255, clamped."""
    shape = x.shape[-2:] if gray else x.shape
    return (x + torch.randn(shape, generator=generator) * sigma / 255).clamp(0, 1)


def projection(added: Tensor, left: Tensor) -> float:
    """Share of the added noise that is left, in 0 to 1."""
    energy = float(added.square().sum())
    return max(0.0, min(1.0, float((left * added).sum()) / energy)) if energy else 0.0


def level_of(value: float, bounds: tuple[float, float, float]) -> str:
    """The name of a measured value."""
    return degradation.LEVELS[sum(value > b for b in bounds)]


def noise_of(y: Tensor) -> float:
    """Standard deviation of the noise, of 255, of a gray image (h, w)."""
    mask = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    r = torch.nn.functional.conv2d(y[None, None], mask[None, None]) / 6
    return float(r.abs().median()) / 0.6745 * 255


@check
def share_left(student):
    """`share_left(added, left) -> share` of the added noise that is left."""
    g = torch.Generator().manual_seed(0)
    added, other = (torch.randn(3, 16, 16, generator=g) for _ in "ab")
    other = other - projection_of(other, added)  # what JPEG adds of its own
    left = 0.4 * added + 0.7 * other
    got = student(added.clone(), left.clone())
    expect(got is not None, "you returned nothing: end with `return`")
    expect(not isinstance(got, Tensor) or got.numel() == 1, "return one number, not a picture")
    got = float(got)
    plain = float(left.norm() / added.norm())
    expect(
        abs(got - plain) > 1e-3,
        "that is the ratio of the two strengths, which counts what JPEG added of its own: project",
    )
    upside = float((left * added).sum() / left.square().sum())
    expect(abs(got - upside) > 1e-3, "you divided by the energy of what is left: divide by added's")
    raw = float((left * added).sum())
    expect(abs(got - raw) > 1e-2, "you did not divide by the energy of the added noise")
    root = raw / float(added.norm())
    expect(abs(got - root) > 1e-3, "divide by the sum of squares, not by its root")
    expect(abs(got - 0.4) < 1e-3, f"0.4 of the noise was left, you say {got:.3f}")
    expect(float(student(added, -added)) == 0, "below 0 nothing is left: cut the share at 0")
    expect(float(student(added, 3 * added)) == 1, "more than all cannot be left: cut it at 1")
    none = float(student(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)))
    expect(none == 0, "where nothing was added return 0: 0/0 is not a number")


def projection_of(x: Tensor, on: Tensor) -> Tensor:
    """The part of x along another."""
    return on * ((x * on).sum() / on.square().sum())


# ---------------------------------------------------------------- 1.4


@check
def level(student):
    """`level(value, bounds) -> one of no, light, medium, heavy`."""
    bounds = (0.5, 2.0, 4.0)
    values = (0.0, 0.5, 0.6, 2.0, 3.0, 4.0, 9.0)
    got = [student(v, bounds) for v in values]
    expect(got[0] is not None, "you returned nothing: end with `return`")
    odd = next((x for x in got if x not in degradation.LEVELS), None)
    expect(odd is None, f"return one of {', '.join(degradation.LEVELS)}, not {odd!r}")
    right = [level_of(v, bounds) for v in values]
    at = [degradation.LEVELS[sum(v >= b for b in bounds)] for v in values]
    expect(got != at, "a value *at* a bound still belongs below it: >, not >=")
    expect(got != [degradation.LEVELS[3 - sum(v > b for b in bounds)] for v in values], "reversed")
    for v, a, b in zip(values, got, right, strict=True):
        expect(a == b, f"{v} with the bounds {bounds} is {b}, you say {a}")
    other = student(3.0, (5.0, 6.0, 7.0))
    expect(other == "no", "you used fixed numbers: use the bounds that are given")


# ---------------------------------------------------------------- 1.5


@check
def estimate_noise(student):
    """`estimate_noise(y) -> standard deviation, of 255` of one grey image (h, w) in [0, 1]."""
    g = torch.Generator().manual_seed(0)
    flat = torch.full((128, 128), 0.5)
    noisy = flat + torch.randn((128, 128), generator=g) * (10 / 255)
    got = number(student(noisy), "a standard deviation")

    def near(value, tolerance=0.06):
        return abs(got - value) < tolerance * value

    expect(not near(10 / 255), "the answer is in units of [0, 1]: multiply by 255")
    expect(
        not near(10 * 0.6745),
        "the MAD of a Gaussian is 0.6745 times its standard deviation: divide by 0.6745",
    )
    expect(not near(10 * 0.6745**2), "you multiply by 0.6745: divide by it")
    expect(
        not near(60, 0.08),
        "the high-pass mask makes noise 6 times stronger (the root of the sum of its squares): "
        "divide the residual by 6",
    )
    expect(
        not near(60 * 0.6745, 0.08),
        "two scalings are missing: the residual by 6 (the norm of the mask), the median by 0.6745",
    )
    expect(
        not near(10 / 6, 0.08),
        "the residual is divided by 36: the norm is the root of the sum of the squares, 6",
    )
    expect(
        not near(7.98 / 0.6745, 0.03),
        "that is the mean of |r|, not its median: the mean is not robust",
    )
    expect(
        got < 40,
        f"pure noise of 10 on grey gives {got:.1f}: did you leave out the high-pass, or its "
        f"scaling?",
    )
    expect(near(10, 0.08), f"pure noise of 10 on grey gives {got:.2f}: it should be about 10")
    ramp = torch.linspace(0, 1, 128).expand(128, 128)
    clean = float(student(ramp.clone()))
    expect(
        clean < 0.5,
        f"a noise-free ramp gives {clean:.1f}: the mask must cancel any plane, its entries sum "
        f"to 0 along rows and columns",
    )
    i, j = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    stripes = torch.where((i + j) % 64 < 32, 0.9, 0.2) + torch.randn((128, 128), generator=g) * (
        5 / 255
    )
    with_edges = float(student(stripes))
    expect(
        with_edges < 6.5,
        f"noise of 5 on diagonal stripes gives {with_edges:.1f}: edges are outliers, so use the "
        f"median of |r|, not a standard deviation or a mean",
    )
    zero = float(student(flat.clone()))
    expect(
        math.isfinite(zero) and zero < 0.1,
        f"an empty grey image must give 0, yours gives {zero}: zero-padding makes an edge of "
        f"the border; use only whole 3×3 windows",
    )
