"""Opening photos: any file that Pillow reads, folders of a user's own photos, and random square
crops.

Every picture becomes upright 8-bit RGB; what cannot be read gives one sentence instead of a
traceback.
"""

import json
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor


class Dice:
    """Scalars for scenes from one numpy generator."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def pick(self, items, p=None):
        return items[int(self.rng.choice(len(items), p=p))]

    def uniform(self, lo, hi):
        return float(self.rng.uniform(lo, hi))


def square(
    image: Image.Image,
    box: tuple[float, float, float, float],
    size: int,
    d: Dice,
    zoom: tuple[float, float],
) -> Image.Image:
    """A random square crop of the region `box` (fractions), scaled to size, mirrored half of the
    time."""
    w, h = image.size
    left, top, right, bottom = box[0] * w, box[1] * h, box[2] * w, box[3] * h
    side = min(right - left, bottom - top) * d.uniform(*zoom)
    x, y = d.uniform(left, right - side), d.uniform(top, bottom - side)
    out = image.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    return ImageOps.mirror(out) if d.uniform(0, 1) < 0.5 else out


def largest_square(
    image: Image.Image, size: int, seed: int, zoom: tuple[float, float] = (1.0, 1.0)
) -> Image.Image:
    """A square of `size` pixels from an RGB photo, at a place chosen by `seed`: as large as the
    photo allows, times a draw from `zoom`; photos smaller than `size` are enlarged first."""
    scale = size / min(image.size)
    if scale > 1:
        image = image.resize(
            (math.ceil(image.width * scale), math.ceil(image.height * scale)),
            Image.Resampling.BICUBIC,
        )
    return square(image, (0, 0, 1, 1), size, Dice(seed), zoom)


def open_photo(path: str | Path) -> Image.Image:
    """Any photo that Pillow opens, upright and as RGB: EXIF rotation applied, transparency on
    white, first frame of an animation, 16-bit grey scaled to 8 bits. Raises ValueError with one
    sentence if the file is missing or broken."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the path of one photo")
    return decode_photo(path, str(path))


def decode_photo(source: str | Path | BinaryIO, name: str) -> Image.Image:
    """A file, or an open one, as `open_photo` gives it; ValueError with one sentence about `name`
    if it is broken."""
    try:
        image = Image.open(source)
        image.load()
    except Image.DecompressionBombError as e:
        raise ValueError(f"{name} has too many pixels to open safely: scale it down first") from e
    except (OSError, SyntaxError, ValueError) as e:
        why = (
            str(e).lower().replace(str(source).lower(), "")
        )  # the path itself may hold these words
        broken = (
            "is damaged or cut short"
            if "truncated" in why or "broken" in why
            else "is not an image that Pillow can read"
        )
        raise ValueError(f"{name} {broken}: try to open and save it again as PNG or JPEG") from e
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB copy of any PIL image; see `open_photo`."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image, dtype=np.float32)
        top = 65535.0 if array.max() > 255 else 255.0
        image = Image.fromarray(np.clip(array * (255 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB → (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_image(x: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] → PIL RGB."""
    return Image.fromarray(
        (x.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    )


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def photo_files(folder: str | Path) -> list[str]:
    """Paths of all photos in a folder, searched in depth: sorted, relative to it, with forward
    slashes. These are the names that captions.jsonl uses. Raises ValueError if there is none."""
    folder = Path(folder)
    found = (
        sorted(
            p.relative_to(folder).as_posix()
            for p in folder.rglob("*")
            if p.suffix.lower() in SUFFIXES
        )
        if folder.is_dir()
        else []
    )
    if not found:
        raise ValueError(
            f"{folder} holds no photos ({', '.join(sorted(SUFFIXES))}): check the path"
        )
    return found


def read_captions(where: str | Path) -> dict[str, dict]:
    """Notes by photo file from `captions.jsonl` and the parts `captions.*-of-*.jsonl` of several
    processes in the folder `where`, or from that one file; {} where there is none. Of a file noted
    twice the last line counts.

    Each line is {"file": path relative to the folder, "captions": [rough, middle, final], "tags":
    [...]}; more keys are kept. A last line that a killed writer left unfinished is passed over.
    Raises ValueError naming a line that is malformed.
    """
    where, notes = Path(where), {}
    for path in (
        [where]
        if where.is_file()
        else [where / "captions.jsonl", *sorted(where.glob("captions.*-of-*.jsonl"))]
    ):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                note = json.loads(line)
                if not (
                    isinstance(note["file"], str)
                    and len(note["captions"]) == 3
                    and isinstance(note["tags"], list)
                ):
                    raise TypeError
            except (json.JSONDecodeError, KeyError, TypeError) as e:
                if number == text.count("\n") + 1:  # no line end after it: a write that was cut off
                    continue
                raise ValueError(
                    f'line {number} of {path.name} is not {{"file": …, "captions": [rough, '
                    f'middle, final], "tags": […]}}: mend or remove it'
                ) from e
            notes[note["file"]] = note
    return notes


class PhotoFolder:
    """A user's own photos: a folder (searched in depth), optionally with `captions.jsonl` beside
    them (see `read_captions`).

    Photos without a line there have `None` for captions and tags. `self[i]` gives (crop (3, size,
    size) in [0, 1], captions, tags): the crop is the largest square at a place chosen by `seed +
    i`. Raises ValueError if the folder holds no photo.
    """

    def __init__(self, folder: str | Path, size: int = 128, seed: int = 0):
        self.folder, self.size, self.seed = Path(folder), size, seed
        self.files = [self.folder / name for name in photo_files(folder)]
        self.notes = read_captions(self.folder)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, list[str] | None, list[str] | None]:
        cut = largest_square(open_photo(self.files[i]), self.size, self.seed + i)
        note = self.notes.get(self.files[i].relative_to(self.folder).as_posix(), {})
        return to_tensor(cut), note.get("captions"), note.get("tags")


def fit_side(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the longer side is `side`: pixels stay visible when enlarging, Lanczos when
    reducing."""
    f = side / max(image.size)
    size = (max(1, round(image.width * f)), max(1, round(image.height * f)))
    return image.resize(size, Image.Resampling.NEAREST if f > 1 else Image.Resampling.LANCZOS)


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
        words, line, lines = text.split(), "", []
        for word in words:
            if line and pen.textlength(f"{line} {word}", font=font) > side:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        for i, part in enumerate([*lines, line][:2]):
            pen.text((gap + c * (side + gap), 1 + 12 * i), part, fill="black", font=font)
    for r, row in enumerate(rows):
        for c, x in enumerate(row):
            image = fit_side(to_image(x), side)
            left, top = gap + c * (side + gap), head + gap + r * (side + gap)
            out.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    return out
