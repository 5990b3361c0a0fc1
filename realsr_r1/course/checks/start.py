"""Checks for notebook 00: finding a part in a trace, counting tiles, counting the tokens of a
chain."""

import math

from realsr_r1.course.checks import check, expect
from realsr_r1.first import vlcot
from realsr_r1.first.restore import STRIDE, TILE, tile_origins


def toy_trace() -> dict:
    """A trace of four overlapping tiles (a photo of 56x56 pixels), with short parts that tell the
    tiles apart."""
    tiles = []
    for y in (0, 24):
        for x in (0, 24):
            parts = {
                t: [[len(tiles)]] if t in vlcot.IMAGE_TAGS else f"{t} of the tile at {x}, {y}"
                for t in vlcot.TAGS
            }
            tiles.append({"x": x, "y": y, **parts})
    return {"settings": {"tile": TILE, "stride": STRIDE}, "complete": True, "tiles": tiles}


def find_part(trace: dict, x: int, y: int, tag: str):
    """The part `tag` of the first tile that covers LR pixel (x, y); None outside the photo."""
    inside = (t for t in trace["tiles"] if 0 <= x - t["x"] < TILE and 0 <= y - t["y"] < TILE)
    return next((t[tag] for t in inside), None)


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
        student(trace, 0, 40, "final_image") == find_part(trace, 0, 40, "final_image"),
        "you return the same part whatever `tag` says",
    )


@check
def tiles_needed(student) -> None:
    def right(w: int, h: int) -> int:
        return len(tile_origins(w)) * len(tile_origins(h))

    def mistake(per_side) -> bool:
        """True if the student's numbers are those of this rule, where it differs from the right
        one."""
        return all(got == per_side(w) * per_side(h) for (w, h), got in answers.items())

    places = [(32, 32), (33, 32), (56, 80), (57, 80), (160, 104), (20, 20), (200, 113)]
    answers = {(w, h): student(w, h) for w, h in places}
    expect(all(a is not None for a in answers.values()), "you returned nothing: end with `return`")
    expect(
        all(int(a) == a for a in answers.values()),
        "a number of tiles is whole: round up with math.ceil",
    )
    expect(
        not mistake(lambda n: 1 + max(0, n - TILE) // STRIDE),
        "you rounded down: the last pixels stay uncovered, round up with math.ceil",
    )
    expect(
        not mistake(lambda n: math.ceil(n / TILE)),
        "you forgot the overlap: tiles start every 28 pixels, only the first one is 32 new ones",
    )
    expect(
        not mistake(lambda n: math.ceil(n / STRIDE)),
        "you counted 28 new pixels for every tile: the first one brings 32",
    )
    expect(
        not mistake(lambda n: 1 + math.ceil(max(0, 4 * n - TILE) / STRIDE)),
        "you counted pixels of the result: tiles are cut from the LR photo",
    )
    one_side = {(w, h): len(tile_origins(w)) for w, h in places}
    expect(answers != one_side, "you counted one row of tiles only: multiply by the number of rows")
    both_sides = {(w, h): len(tile_origins(w)) + len(tile_origins(h)) for w, h in places}
    expect(answers != both_sides, "you added columns and rows: multiply them")
    expect(
        answers[20, 20] == 1,
        f"a photo smaller than a tile is padded and takes 1 tile, you returned "
        f"{answers[20, 20]}: mind the 0 or negative rest",
    )
    for (w, h), got in answers.items():
        expect(
            got == right(w, h), f"a photo of {w}x{h} takes {right(w, h)} tiles, you returned {got}"
        )


@check
def chain_tokens(student) -> None:
    words, sides = [9, 4, 6, 14], [4, 8, 16]
    text, codes, rows = sum(words), sum(n * n for n in sides), sum(sides)
    frame, tags = 4 * len(sides), 2 * (len(words) + len(sides))
    right = text + codes + rows + frame + tags + 1
    got = student(words, sides)
    expect(got is not None, "you returned nothing: end with `return`")
    expect(got != right - rows, "you forgot the row ends: an image of n rows has n of them")
    expect(
        got != right - frame,
        "you forgot the image's frame: start, height, width and end, 4 words an image",
    )
    expect(
        got != right - rows - frame,
        "you counted the codes of an image only: add its row ends and the 4 words of its frame",
    )
    expect(
        got != right - tags,
        "you forgot the tags: each of the seven parts has one before and one after it",
    )
    expect(
        got != right - tags // 2,
        "you counted one tag a part: there is one that opens it and one that closes it",
    )
    expect(got != right - tags - 1, "you forgot the tags and the end word")
    expect(got != right - 1, "you forgot the end word that closes the completion")
    expect(got != right - text, "you forgot the words of the texts")
    expect(
        got == right,
        f"texts of {words} words and images of {sides} codes a side make {right} tokens, you "
        f"returned {got}",
    )
    expect(
        student([1, 1, 1, 1], [2, 2, 2]) == 4 + 3 * (2 * 3 + 4) + 14 + 1,
        "you are right for one chain only: use both arguments, not numbers",
    )
