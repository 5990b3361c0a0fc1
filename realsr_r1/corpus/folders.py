"""Folders of a user's own photos, with captions beside them, and random squares of photos."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from realsr_r1.images import SUFFIXES, open_photo, to_tensor


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
