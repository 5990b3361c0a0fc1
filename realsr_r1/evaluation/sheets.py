"""Contact sheets: pictures in rows under headings, as one picture."""

import textwrap

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from realsr_r1.images import to_image


def fit_side(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the longer side is `side`: pixels stay visible when enlarging, Lanczos when
    reducing."""
    larger = side > max(image.size)
    how = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return ImageOps.contain(image, (side, side), how)


def grid(
    rows: list[list[Tensor]], headings: list[str], side: int = 128, gap: int = 6
) -> Image.Image:
    """Rows of images (3, h, w) in [0, 1] under headings, each fitted into a square of `side`
    pixels."""
    head = 26
    out = Image.new(
        "RGB", (len(headings) * (side + gap) + gap, head + len(rows) * (side + gap) + gap), "white"
    )
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(size=11)
    for c, text in enumerate(headings):
        lines = textwrap.wrap(text, side // 6, break_long_words=False, break_on_hyphens=False)
        for i, part in enumerate(lines[:2]):
            pen.text((gap + c * (side + gap), 1 + 12 * i), part, fill="black", font=font)
    for r, row in enumerate(rows):
        for c, x in enumerate(row):
            image = fit_side(to_image(x), side)
            left, top = gap + c * (side + gap), head + gap + r * (side + gap)
            out.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    return out
