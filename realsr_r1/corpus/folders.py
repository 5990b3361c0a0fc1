"""Folders of a user's own photos, and the captions that lie beside them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from realsr_r1.images import SUFFIXES


def photo_files(folder: str | Path) -> list[str]:
    """Paths of all photos in a folder, searched in depth: sorted, relative to it, with forward
    slashes, as captions.jsonl names them. Raises ValueError if there is none."""
    folder = Path(folder)
    inside = folder.rglob("*") if folder.is_dir() else ()
    found = [p.relative_to(folder).as_posix() for p in inside if p.suffix.lower() in SUFFIXES]
    if not found:
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{folder} is no folder with photos ({kinds}): check the path")
    return sorted(found)


def read_captions(where: str | Path) -> dict[str, dict]:
    """Notes by photo file, from captions.jsonl and the parts captions.*-of-*.jsonl of a folder, or
    from one such file; {} where there is none. Of a file noted twice the last line counts.

    A line is {"file": path relative to the folder, "captions": [rough, middle, final], "tags":
    [...], ...}. A last line that a killed writer left unfinished is passed over; ValueError names
    any other that is malformed."""
    where, notes = Path(where), {}
    parts = [where / "captions.jsonl", *sorted(where.glob("captions.*-of-*.jsonl"))]
    for path in [where] if where.is_file() else [p for p in parts if p.exists()]:
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            if note := _note(line):
                notes[note["file"]] = note
            elif line.strip() and number < len(lines):  # behind the last line end: cut off
                raise ValueError(
                    f'line {number} of {path.name} is not {{"file": …, "captions": [rough, '
                    f'middle, final], "tags": […]}}: mend or remove it'
                )
    return notes


def _note(line: str) -> dict | None:
    """The note that a line holds; None if it holds none."""
    try:
        note = json.loads(line)
        whole = isinstance(note["file"], str) and isinstance(note["tags"], list)
        return note if whole and len(note["captions"]) == 3 else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


# Only first/scenes.py uses what follows: it goes when that does.


class Dice:
    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def pick(self, items, p=None):
        return items[int(self.rng.choice(len(items), p=p))]

    def uniform(self, lo, hi):
        return float(self.rng.uniform(lo, hi))


def square(image: Image.Image, box, size: int, d: Dice, zoom) -> Image.Image:
    w, h = image.size
    left, top, right, bottom = box[0] * w, box[1] * h, box[2] * w, box[3] * h
    side = min(right - left, bottom - top) * d.uniform(*zoom)
    x, y = d.uniform(left, right - side), d.uniform(top, bottom - side)
    out = image.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    return ImageOps.mirror(out) if d.uniform(0, 1) < 0.5 else out
