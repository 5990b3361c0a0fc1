"""Checks of notebook 02, images as tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from realsr_r1.course.checks import Mistake, check, expect, is_whole, number
from realsr_r1.vlcot import image_length


def count_tokens(pixels: int, pixels_per_code: int = 8) -> int:
    """Tokens of a square image, start and end included."""
    return image_length(pixels // pixels_per_code)


def nearest(z: Tensor, book: Tensor) -> Tensor:
    """Vectors (n, d), codebook (k, d) → nearest codes by cosine (n,)."""
    return (F.normalize(z, dim=1) @ F.normalize(book, dim=1).T).argmax(1)


def pass_through(z: Tensor, q: Tensor) -> Tensor:
    """The value of q with the gradient to z."""
    return z + (q - z).detach()


def perplexity_of(codes: Tensor, size: int) -> float:
    """exp of the entropy of how often codes occur."""
    p = torch.bincount(codes.flatten(), minlength=size).float()
    p = p[p > 0] / p.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def revived(
    weight: Tensor, usage: Tensor, pool: Tensor, threshold: float, generator: torch.Generator
) -> Tensor:
    """The codebook (k, d) with dead codes moved onto rows of the pool (n, d)."""
    dead = (usage < threshold).nonzero().flatten()
    rows = torch.randint(len(pool), (len(dead),), generator=generator)
    new = weight.clone()
    new[dead] = F.normalize(pool[rows], dim=1)
    return new


@check
def image_tokens(student: Callable) -> None:
    """`image_tokens(pixels, pixels_per_code)`: length of a square image in the token stream."""
    got, side = student(128, 8), 16
    expect(got is not None, "your function returns nothing: end it with return")
    expect(
        got != 128 * 128 + 2, "you count pixels: an image has pixels / pixels_per_code codes a side"
    )
    expect(got != side + 2, "you count one row of codes: an image has n by n of them")
    expect(got != side, "this is the side: count the codes of all rows, the start and the end")
    expect(got != side * side, "you count the codes alone: add the start and the end token")
    expect(got != side * side + 1, "start and end are two tokens: you left one out")
    expect(is_whole(got), "a token count is an integer: divide with //, not with /")
    for n, size in ((128, 8), (256, 8), (512, 8), (32, 8), (128, 16)):
        got, right = student(n, size), count_tokens(n, size)
        if got != right:
            hard = size != 8 and got == student(n, 8)
            why = "the 8 is hard-coded: use pixels_per_code" if hard else "count the codes again"
            raise Mistake(
                f"an image of {n} px with {size} px a code takes {right} tokens, you say {got}; "
                f"{why}"
            )


@check
def nearest_code(student: Callable) -> None:
    """`nearest_code(z, book)`: (n, d) and (k, d) → (n,) index of the nearest code by cosine."""
    g = torch.Generator().manual_seed(0)
    book = torch.randn(12, 4, generator=g) * torch.linspace(0.2, 5, 12)[:, None]
    z = torch.randn(40, 4, generator=g) * 3
    cosine = F.normalize(z, dim=1) @ F.normalize(book, dim=1).T
    got, right = student(z, book), cosine.argmax(1)
    expect(isinstance(got, torch.Tensor), "return a tensor of indices, one a row of z")
    expect(
        tuple(got.shape) != (12,),
        "you chose along the wrong axis: one code for each row of z, not one row for each code",
    )
    expect(
        tuple(got.shape) == (40,), f"expected shape (40,) for 40 rows of z, got {tuple(got.shape)}"
    )
    expect(
        not got.is_floating_point(),
        "you return the similarity itself: return the index (argmax, not max)",
    )
    if torch.equal(got, right):
        return
    expect(
        not torch.equal(got, cosine.argmin(1)),
        "you took the least similar code: cosine is a similarity, so argmax, not argmin",
    )
    expect(
        not torch.equal(got, (F.normalize(z, dim=1) @ book.T).argmax(1)),
        "you did not normalize the codebook: long codes win the dot product although they point "
        "elsewhere",
    )
    expect(
        not torch.equal(got, torch.cdist(z, book).argmin(1)),
        "this is the Euclidean distance of the raw vectors: bring z and the codes to length 1 "
        "first",
    )
    expect(
        not torch.equal(got, torch.cdist(F.normalize(z, dim=1), book).argmin(1)),
        "this is the Euclidean distance to codes that are not normalized: bring the codes to "
        "length 1, too",
    )
    expect(
        not torch.equal(got, (F.normalize(z, dim=0) @ F.normalize(book, dim=0).T).argmax(1)),
        "you normalized along the wrong axis: each row is a vector, so dim=1",
    )
    raise Mistake(f"{int((got != right).sum())} of 40 codes are not the nearest by cosine")


@check
def straight_through(student: Callable) -> None:
    """`straight_through(z, q)`: the value of q, with q's gradient handed to z as it is."""
    z = torch.tensor([[0.9, 0.4], [-0.2, 0.7]], requires_grad=True)
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    slope = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    out = student(z, q)
    expect(
        isinstance(out, torch.Tensor) and out.shape == z.shape,
        "return one tensor of the shape of z",
    )
    expect(
        not torch.allclose(out, z),
        "the value is still z: the decoder must see the code q, otherwise nothing is quantized",
    )
    expect(
        torch.allclose(out, q, atol=1e-6),
        "the value must be exactly q: add to z what is missing to q",
    )
    expect(
        out.requires_grad,
        "the result carries no gradient at all: you detached everything, z included",
    )
    (out * slope).sum().backward()
    expect(
        z.grad is not None and bool(z.grad.abs().sum() > 0),
        "no gradient reaches z: detach the difference q - z, so that z itself stays in the graph",
    )
    expect(torch.allclose(z.grad, slope), "z must get the decoder's gradient unchanged (times 1)")
    expect(
        q.grad is None or not q.grad.abs().sum() > 0,
        "the gradient also reaches q: detach it; the codebook learns from its own loss term, "
        "not through the decoder",
    )


@check
def perplexity(student: Callable) -> None:
    """`perplexity(codes, size)`: exp of the entropy (nats) of how often each of `size` codes
    occurs."""
    codes = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 3]])
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    entropy = float(-(p * p.log()).sum())
    right = float(torch.tensor(entropy).exp())
    got = number(student(codes, 8), "a number of codes")
    expect(
        got == got,
        "you got nan: 0 · log 0 counts as 0, so leave unused codes out (or clamp before the log)",
    )
    if abs(got - right) > 1e-3:
        expect(
            abs(got - entropy) > 1e-3,
            "this is the entropy: take its exponential to get a number of codes",
        )
        expect(
            abs(got + entropy) > 1e-3 and abs(got * right - 1) > 1e-3,
            "the sign is wrong: entropy is minus the sum of p log p",
        )
        bits = entropy / float(torch.tensor(2.0).log())
        expect(
            abs(got - float(torch.tensor(bits).exp())) > 1e-3,
            "you mix bases: exp goes with the natural log, 2 ** with log2",
        )
        expect(
            abs(got - bits) > 1e-3,
            "this is the entropy in bits: raise 2 to it to get a number of codes",
        )
        expect(
            abs(got - 4) > 1e-3,
            "this counts the codes in use: perplexity weighs them by how often they occur",
        )
        expect(
            abs(got - right / 8) > 1e-3,
            "do not divide by the size of the codebook: perplexity is a number of codes, here "
            "between 1 and 8",
        )
        raise Mistake(f"for shares ½, ¼, ⅛, ⅛ the perplexity is {right:.3f}, you say {got:.3f}")
    expect(
        abs(float(student(torch.arange(16).view(4, 4), 16)) - 16) < 1e-3,
        "16 codes used equally often must give 16",
    )
    expect(
        abs(float(student(torch.full((4, 4), 5), 16)) - 1) < 1e-3,
        "a single code in use must give 1",
    )


@check
def revive(student: Callable) -> None:
    """`revive(weight, usage, pool, threshold, generator)`: codes used too little move onto random
    encoder outputs."""
    g = torch.Generator().manual_seed(0)
    weight = F.normalize(torch.randn(6, 3, generator=g), dim=1)
    usage = torch.tensor([1.0, 0.01, 2.0, 0.0, 0.5, 0.02])
    pool = torch.randn(50, 3, generator=g) * 4
    dead, before = usage < 0.05, weight.clone()
    new = student(weight, usage, pool, 0.05, torch.Generator().manual_seed(1))
    expect(
        isinstance(new, torch.Tensor) and new.shape == weight.shape,
        "return the whole codebook, (k, d)",
    )
    expect(
        torch.equal(weight, before),
        "you wrote into the codebook that was given: clone it first, so that nothing changes "
        "behind the caller's back",
    )
    moved = (new - before).abs().sum(1) > 1e-6
    expect(bool(moved.any()), "no code moved: those with usage below the threshold should have")
    expect(
        not moved.all(), "you replaced every code: only those used less than the threshold are dead"
    )
    expect(
        not torch.equal(moved, ~dead),
        "you replaced the living codes and kept the dead: dead means usage below the threshold",
    )
    expect(torch.equal(moved, dead), "the wrong codes moved: dead are those with usage < threshold")
    many = student(weight, usage, pool, 0.6, torch.Generator().manual_seed(1))
    expect(
        torch.equal((many - before).abs().sum(1) > 1e-6, usage < 0.6),
        "right for a threshold of 0.05 only: use the one that is given",
    )
    fresh = new[dead]
    expect(
        bool((torch.pdist(fresh) > 1e-6).all()),
        "all dead codes became the same vector: draw one row of the pool for each of them",
    )
    unit = F.normalize(pool, dim=1)

    def all_among(rows: torch.Tensor) -> bool:
        return bool(((fresh[:, None] - rows).abs().amax(2).amin(1) < 1e-4).all())

    expect(
        not all_among(pool),
        "the new codes are encoder outputs of any length: normalize them to length 1 like the "
        "rest of the codebook",
    )
    expect(
        all_among(unit),
        "the new codes are not encoder outputs: take rows of the pool, so that each new code "
        "has at least one taker",
    )
    same = student(weight, usage, pool, 0.05, torch.Generator().manual_seed(1))
    expect(
        torch.allclose(same, new, atol=1e-6),
        "the same generator gave other rows: draw with the generator that is given",
    )
    again = student(weight, usage, pool, 0.05, torch.Generator().manual_seed(2))
    expect(
        not torch.equal(again, new),
        "another generator gave the same rows: draw them at random with the generator given",
    )
    calm = student(weight, torch.ones(6), pool, 0.05, torch.Generator().manual_seed(1))
    unmoved = torch.allclose(calm, weight, atol=1e-6)
    expect(unmoved, "nothing may move when every code is in use")
