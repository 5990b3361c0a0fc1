"""The checks of notebook 02 name the mistakes they know."""

import pytest
import torch
import torch.nn.functional as F

from realsr_r1.course.checks import tokens as checks
from realsr_r1.tokenizer import Codebook
from realsr_r1.vlcot import image_tokens


def entropy(codes, size, base=torch.e):
    p = torch.bincount(codes.flatten(), minlength=size).float()
    p = p[p > 0] / p.sum()
    return float(-(p * p.log()).sum() / torch.tensor(base).log())


def moved(weight, which, rows):
    new = weight.clone()
    new[which] = rows
    return new


def rows_of(pool, n, generator):
    return F.normalize(pool, dim=1)[torch.randint(0, len(pool), (n,), generator=generator)]


def in_place(w, u, p, t, g):
    w[u < t] = rows_of(p, int((u < t).sum()), g)
    return w


RIGHT = {
    "image_tokens": lambda n, size: (n // size) ** 2 + 2,
    "nearest_code": lambda z, book: (z @ F.normalize(book, dim=1).T).argmax(1),
    "straight_through": lambda z, q: z + (q - z).detach(),
    "perplexity": lambda codes, size: torch.tensor(entropy(codes, size)).exp(),
    "revive": lambda w, u, p, t, g: moved(w, u < t, rows_of(p, int((u < t).sum()), g)),
}
WRONG = [
    ("image_tokens", lambda n, s: None, "returns nothing"),
    ("image_tokens", lambda n, s: n * n + 2, "count pixels"),
    ("image_tokens", lambda n, s: (n // s) ** 2, "codes alone"),
    ("image_tokens", lambda n, s: (n // s) ** 2 + 1, "left one out"),
    ("image_tokens", lambda n, s: n // s + 2, "one row"),
    ("image_tokens", lambda n, s: n // s, "this is the side"),
    ("image_tokens", lambda n, s: (n / s) ** 2 + 2, "integer"),
    ("image_tokens", lambda n, s: (n // 8) ** 2 + 2, "hard-coded"),
    (
        "nearest_code",
        lambda z, b: (F.normalize(z, dim=1) @ F.normalize(b, dim=1).T).argmax(0),
        "wrong axis",
    ),
    (
        "nearest_code",
        lambda z, b: (F.normalize(z, dim=1) @ F.normalize(b, dim=1).T).amax(1),
        "return the index",
    ),
    ("nearest_code", lambda z, b: (z @ F.normalize(b, dim=1).T).argmin(1), "argmax, not argmin"),
    ("nearest_code", lambda z, b: (z @ b.T).argmax(1), "did not normalize the codebook"),
    (
        "nearest_code",
        lambda z, b: torch.cdist(z, b).argmin(1),
        "Euclidean distance of the raw vectors",
    ),
    (
        "nearest_code",
        lambda z, b: torch.cdist(F.normalize(z, dim=1), b).argmin(1),
        "codes that are not normalized",
    ),
    (
        "nearest_code",
        lambda z, b: (F.normalize(z, dim=0) @ F.normalize(b, dim=0).T).argmax(1),
        "dim=1",
    ),
    ("straight_through", lambda z, q: q, "no gradient reaches z"),
    ("straight_through", lambda z, q: z, "still z"),
    ("straight_through", lambda z, q: z + (q - z), "no gradient reaches z"),
    ("straight_through", lambda z, q: (z + (q - z)).detach(), "detached everything"),
    ("straight_through", lambda z, q: z + q - z.detach(), "also reaches q"),
    ("straight_through", lambda z, q: 2 * z + (q - 2 * z).detach(), "unchanged"),
    ("straight_through", lambda z, q: (z + q) / 2, "exactly q"),
    (
        "perplexity",
        lambda c, n: (
            (-(p := torch.bincount(c.flatten(), minlength=n) / c.numel()) * p.log()).sum().exp()
        ),
        "nan",
    ),
    ("perplexity", entropy, "this is the entropy:"),
    ("perplexity", lambda c, n: torch.tensor(-entropy(c, n)).exp(), "sign"),
    ("perplexity", lambda c, n: torch.tensor(entropy(c, n, 2.0)).exp(), "mix bases"),
    ("perplexity", lambda c, n: entropy(c, n, 2.0), "in bits"),
    ("perplexity", lambda c, n: len(c.unique()), "counts the codes in use"),
    ("perplexity", lambda c, n: torch.tensor(entropy(c, n)).exp() / n, "do not divide"),
    ("revive", lambda w, u, p, t, g: rows_of(p, len(w), g), "replaced every code"),
    (
        "revive",
        lambda w, u, p, t, g: moved(w, u < t, F.normalize(rows_of(p, int((u < t).sum()), None))),
        "the same generator gave other rows",
    ),
    (
        "revive",
        lambda w, u, p, t, g: moved(w, u >= t, rows_of(p, int((u >= t).sum()), g)),
        "kept the dead",
    ),
    ("revive", lambda w, u, p, t, g: moved(w, u < t, rows_of(p, 1, g)), "the same vector"),
    (
        "revive",
        lambda w, u, p, t, g: moved(
            w, u < t, p[torch.randperm(len(p), generator=g)[: int((u < t).sum())]]
        ),
        "any length",
    ),
    (
        "revive",
        lambda w, u, p, t, g: moved(
            w, u < t, F.normalize(torch.randn(int((u < t).sum()), 3, generator=g), dim=1)
        ),
        "not encoder outputs",
    ),
    (
        "revive",
        lambda w, u, p, t, g: moved(w, u < t, F.normalize(p[: int((u < t).sum())], dim=1)),
        "with the generator",
    ),
    ("revive", in_place, "clone it first"),
    ("revive", lambda w, u, p, t, g: w.clone(), "no code moved"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_right_solutions_pass(name, capsys):
    assert getattr(checks, name)(RIGHT[name])
    assert capsys.readouterr().out.startswith("✓")


@pytest.mark.parametrize(("name", "wrong", "words"), WRONG)
def test_each_mistake_is_named(name, wrong, words, capsys):
    assert not getattr(checks, name)(wrong)
    out = capsys.readouterr().out
    assert out.startswith("✗") and words in out


@pytest.mark.parametrize("name", RIGHT)
def test_an_empty_stub_is_said_to_be_unwritten(name, capsys):
    def stub(*_):
        raise NotImplementedError

    assert not getattr(checks, name)(stub)
    assert "not written yet" in capsys.readouterr().out


def test_the_right_answers_are_the_packages_own():
    codes = torch.zeros(5, 5, dtype=torch.long)
    assert len(image_tokens(codes).split()) == RIGHT["image_tokens"](40, 8)
    book, z = Codebook(16, 4, 0.25), torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    own = book.nearest(z.T[None, :, :, None]).flatten()
    assert torch.equal(own, RIGHT["nearest_code"](z, book.weight.detach()))
