"""Checks for notebook 00: finding a part in a trace, counting tiles and tokens, agreement with the
LR photo."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from realsr_r1.course.checks import check, expect
from realsr_r1.perceptual import psnr
from realsr_r1.pipeline import TILE, origins
from realsr_r1.vlcot import IMAGE_TAGS, TAGS, image_length


def toy_trace() -> dict:
    """A trace of four overlapping tiles (a photo of 56x56 pixels), with short parts that tell the
    tiles apart."""
    tiles = []
    for y in (0, 24):
        for x in (0, 24):
            parts = {
                t: [[len(tiles)]] if t in IMAGE_TAGS else f"{t} of the tile at {x}, {y}"
                for t in TAGS
            }
            tiles.append({"x": x, "y": y, **parts})
    return {"settings": {"tile": TILE}, "complete": True, "tiles": tiles}


def find_part(trace: dict, x: int, y: int, tag: str):
    """The part `tag` of the first tile that covers LR pixel (x, y); None outside the photo."""
    inside = (t for t in trace["tiles"] if 0 <= x - t["x"] < TILE and 0 <= y - t["y"] < TILE)
    return next((t[tag] for t in inside), None)


def count_tiles(width: int, height: int) -> int:
    """The package's tiles for a photo of width x height LR pixels, padded as it pads them."""
    return len(origins((max(TILE, height + height % 2), max(TILE, width + width % 2))))


def count_tokens(text_words: list[int], image_sides: list[int]) -> int:
    """Tokens of a chain, its end token included."""
    tags = 2 * (len(text_words) + len(image_sides))
    return sum(text_words) + sum(map(image_length, image_sides)) + tags + 1


def agreement(restored: Tensor, lr: Tensor) -> float:
    """PSNR in dB of a picture (1, 3, 4h, 4w), scaled down, against the LR photo (1, 3, h, w)."""
    return psnr(F.interpolate(restored, size=lr.shape[-2:], mode="area"), lr).item()


@check
def part_at(student) -> None:
    trace = toy_trace()
    tiles = trace["tiles"]
    first, right, below, last = (t["rough_understand"] for t in tiles)
    got = student(trace, 24, 24, "rough_understand")
    expect(
        got is not None,
        "you returned nothing: end with `return`, and mind that a pixel lies in a tile even if "
        "it is not its corner",
    )
    expect(
        not isinstance(got, dict), "you returned the whole tile: take the part called `tag` from it"
    )
    expect(
        got != last,
        "at (24, 24) four tiles overlap and you took the last, or the one that begins there: "
        "the first one counts",
    )
    expect(
        got == first,
        f"at (24, 24) the first tile that covers the pixel is the one at (0, 0), you returned "
        f"{got!r}",
    )
    got = student(trace, 40, 5, "rough_understand")
    expect(got != below, "you swapped x and y: x runs to the right, y runs down")
    expect(
        got is not None,
        "pixel (40, 5) lies inside the tile at (24, 0) without being its corner: compare with "
        "its edges",
    )
    expect(
        got != first,
        "pixel (40, 5) is outside the tile at (0, 0): a tile is 32 LR pixels wide (and the "
        "photo is counted in LR pixels)",
    )
    expect(got == right, f"at (40, 5) the tile is the one at (24, 0), you returned {got!r}")
    got = student(trace, 32, 0, "rough_understand")
    expect(
        got != first, "off by one: a tile at 0 that is 32 wide covers the pixels 0 to 31, not 32"
    )
    expect(got == right, f"at (32, 0) the tile is the one at (24, 0), you returned {got!r}")
    expect(
        student(trace, 31, 0, "rough_understand") == first,
        "off by one: a tile at 0 that is 32 wide still covers pixel 31",
    )
    expect(
        student(trace, 0, 40, "rough_understand") == below,
        "at (0, 40) the tile is the one at (0, 24): compare y as well as x",
    )
    expect(
        student(trace, 0, 40, "final_image") == find_part(trace, 0, 40, "final_image"),
        "you return the same part whatever `tag` says",
    )


@check
def tiles_needed(student) -> None:
    def mistake(per_side) -> bool:
        """True if the student's numbers are those of this rule, where it differs from the right
        one."""
        return all(got == per_side(w) * per_side(h) for (w, h), got in answers.items())

    places = [(32, 32), (33, 32), (64, 80), (58, 80), (160, 104), (20, 20), (200, 113)]
    answers = {(w, h): student(w, h) for w, h in places}
    expect(all(a is not None for a in answers.values()), "you returned nothing: end with `return`")
    expect(
        all(int(a) == a for a in answers.values()),
        "a number of tiles is whole: round up with math.ceil",
    )
    for down in (lambda n: n // TILE, lambda n: max(1, n // TILE)):
        expect(
            not mistake(down),
            "you rounded down: the last pixels stay uncovered, round up with math.ceil",
        )
    expect(
        not mistake(lambda n: n // TILE + 1),
        "a side of 64 pixels takes two tiles, not three: round up with math.ceil, do not add 1",
    )
    expect(
        not mistake(lambda n: math.ceil(4 * n / TILE)),
        "you counted pixels of the result: tiles are cut from the LR photo",
    )

    def along(n: int) -> int:
        return count_tiles(n, TILE)

    one_side = {(w, h): along(w) for w, h in places}
    expect(answers != one_side, "you counted one row of tiles only: multiply by the number of rows")
    both_sides = {(w, h): along(w) + along(h) for w, h in places}
    expect(answers != both_sides, "you added columns and rows: multiply them")
    for (w, h), got in answers.items():
        expect(
            got == count_tiles(w, h),
            f"a photo of {w}x{h} takes {count_tiles(w, h)} tiles, you returned {got}",
        )


@check
def chain_tokens(student) -> None:
    words, sides = [9, 4, 6, 14], [4, 8, 16]
    text, tags = sum(words), 2 * (len(words) + len(sides))
    frame, right = 2 * len(sides), count_tokens(words, sides)
    got = student(words, sides)
    expect(got is not None, "you returned nothing: end with `return`")
    expect(
        got != right - frame, "you forgot the image's frame: a start and an end token, 2 an image"
    )
    expect(
        got != right - tags,
        "you forgot the tags: each of the seven parts has one before and one after it",
    )
    expect(
        got != right - tags // 2,
        "you counted one tag a part: there is one that opens it and one that closes it",
    )
    expect(got != right - tags - 1, "you forgot the tags and the end token")
    expect(got != right - 1, "you forgot the end token that closes the completion")
    expect(got != right - text, "you forgot the words of the texts")
    expect(
        got != right - sum(n * n for n in sides) + sum(sides),
        "an image of n codes a side has n × n codes, not n",
    )
    expect(
        got == right,
        f"texts of {words} words and images of {sides} codes a side make {right} tokens, you "
        f"returned {got}",
    )
    expect(
        student([1, 1, 1, 1], [2, 2, 2]) == count_tokens([1, 1, 1, 1], [2, 2, 2]),
        "you are right for one chain only: use both arguments, not numbers",
    )


@check
def consistency(student) -> None:
    g = torch.Generator().manual_seed(0)
    big, lr = torch.rand(1, 3, 32, 48, generator=g), torch.rand(1, 3, 8, 12, generator=g)
    right, got = agreement(big, lr), student(big.clone(), lr.clone())
    expect(got is not None, "you returned nothing: end with `return`")
    expect(not isinstance(got, Tensor) or got.numel() == 1, "return one number for the photo")
    got = float(got)
    sampled = psnr(big[..., ::4, ::4], lr).item()
    smooth = F.interpolate(big, size=lr.shape[-2:], mode="bicubic", align_corners=False)
    up = psnr(F.interpolate(lr, scale_factor=4, mode="nearest"), big).item()
    expect(abs(got - sampled) > 1e-3, "you took every fourth pixel: take the mean of each block")
    expect(abs(got - psnr(smooth, lr).item()) > 1e-3, "you scaled down by bicubic: use blocks")
    expect(abs(got - up) > 1e-3, "you enlarged the LR photo: scale the result down instead")
    expect(abs(got + right) > 1e-3, "the sign is turned: a smaller error means more dB")
    expect(abs(got - right * math.log(10)) > 1e-2, "use the logarithm to the base 10")
    expect(abs(got - right / 2) > 1e-3, "mean squared error, not its root")
    expect(abs(got - right) < 1e-3, f"expected {right:.3f} dB on a random picture, got {got:.3f}")
