import math

import pytest
import torch

from realsr_r1 import vlcot
from realsr_r1.course.checks import start as checks


def part_at(trace, x, y, tag):
    for tile in trace["tiles"]:
        if tile["x"] <= x < tile["x"] + 32 and tile["y"] <= y < tile["y"] + 32:
            return tile[tag]


def tiles_needed(width, height):
    return math.ceil(width / 32) * math.ceil(height / 32)


def chain_tokens(text_words, image_sides):
    return (
        sum(text_words)
        + sum(n * n + 2 for n in image_sides)
        + 2 * (len(text_words) + len(image_sides))
        + 1
    )


def mse_db(a, b):
    return float(-10 * torch.log10(((a - b) ** 2).mean()))


def upsampled(x):
    return x.repeat_interleave(4, 2).repeat_interleave(4, 3)


def consistency(restored, lr):
    return mse_db(torch.nn.functional.interpolate(restored, size=lr.shape[-2:], mode="area"), lr)


def covering(trace, x, y, width=32, inclusive=0):
    return [
        t
        for t in trace["tiles"]
        if 0 <= x - t["x"] < width + inclusive and 0 <= y - t["y"] < width + inclusive
    ]


def corner_only(trace, x, y, tag):
    return next((t[tag] for t in trace["tiles"] if (t["x"], t["y"]) == (x, y)), None)


def product(per_side):
    return lambda w, h: per_side(w) * per_side(h)


WRONG = [
    ("part_at", lambda t, x, y, tag: covering(t, x, y)[0], "whole tile"),
    ("part_at", lambda t, x, y, tag: covering(t, x, y)[-1][tag], "took the last"),
    ("part_at", corner_only, "begins there"),
    ("part_at", lambda t, x, y, tag: part_at(t, y, x, tag), "swapped x and y"),
    ("part_at", lambda t, x, y, tag: t["tiles"][0][tag], "32 LR pixels wide"),
    ("part_at", lambda t, x, y, tag: covering(t, x, y, 128)[0][tag], "32 LR pixels wide"),
    ("part_at", lambda t, x, y, tag: covering(t, x, y, inclusive=1)[0][tag], "not 32"),
    ("part_at", lambda t, x, y, tag: part_at(t, x, y, "rough_understand"), "whatever `tag` says"),
    ("part_at", lambda t, x, y, tag: None, "returned nothing"),
    ("part_at", lambda t, x, y, tag: t["tile"], "KeyError"),
    ("tiles_needed", product(lambda n: n // 32), "rounded down"),
    ("tiles_needed", product(lambda n: max(1, n // 32)), "rounded down"),
    ("tiles_needed", product(lambda n: n / 32), "whole"),
    ("tiles_needed", product(lambda n: n // 32 + 1), "do not add 1"),
    ("tiles_needed", product(lambda n: 1 + math.ceil(max(0, n - 32) / 28)), "takes 6 tiles"),
    ("tiles_needed", lambda w, h: tiles_needed(4 * w, 4 * h), "pixels of the result"),
    ("tiles_needed", lambda w, h: tiles_needed(w, 32), "one row"),
    ("tiles_needed", lambda w, h: tiles_needed(w, 32) + tiles_needed(32, h), "multiply them"),
    ("tiles_needed", lambda w, h: None, "returned nothing"),
    ("chain_tokens", lambda t, s: chain_tokens(t, s) - 6, "frame"),
    ("chain_tokens", lambda t, s: chain_tokens(t, s) - 336 + 28, "not n"),
    ("chain_tokens", lambda t, s: chain_tokens(t, s) - 14, "forgot the tags"),
    ("chain_tokens", lambda t, s: chain_tokens(t, s) - 7, "one tag a part"),
    ("chain_tokens", lambda t, s: chain_tokens(t, s) - 1, "end token"),
    ("chain_tokens", lambda t, s: chain_tokens(t, s) - sum(t), "words of the texts"),
    ("consistency", lambda y, x: -consistency(y, x), "sign"),
    ("consistency", lambda y, x: consistency(y, x) / 2, "not its root"),
    ("consistency", lambda y, x: consistency(y, x) * math.log(10), "base 10"),
    ("consistency", lambda y, x: mse_db(y[..., ::4, ::4], x), "every fourth"),
    (
        "consistency",
        lambda y, x: mse_db(x.repeat_interleave(4, 2).repeat_interleave(4, 3), y),
        "enl",
    ),
    ("consistency", lambda y, x: None, "returned nothing"),
    ("chain_tokens", lambda t, s: 390, "for one chain only"),
]


@pytest.mark.parametrize("name, function, says", WRONG, ids=[f"{n}-{s[:20]}" for n, _, s in WRONG])
def test_a_mistake_is_named(capsys, name, function, says):
    assert not getattr(checks, name)(function)
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {name}") and says in out, out


@pytest.mark.parametrize(
    "function", [part_at, tiles_needed, chain_tokens, consistency], ids=lambda f: f.__name__
)
def test_a_right_answer_passes(capsys, function):
    assert getattr(checks, function.__name__)(function)
    assert capsys.readouterr().out.startswith("✓")


def test_a_stub_is_not_written_yet(capsys):
    def stub(*_):
        raise NotImplementedError

    for name in ("part_at", "tiles_needed", "chain_tokens", "consistency"):
        assert not getattr(checks, name)(stub)
        assert "not written yet" in capsys.readouterr().out


def test_token_count_is_that_of_a_rendered_chain():
    chain = vlcot.Chain(
        "medium blur, downsample",
        "a bird",
        torch.zeros(4, 4, dtype=int),
        "a white bird",
        torch.zeros(8, 8, dtype=int),
        "a large white bird",
        torch.zeros(16, 16, dtype=int),
    )
    assert len(vlcot.render(chain).split()) + 1 == chain_tokens([4, 2, 3, 4], [4, 8, 16])
