"""Whether a result can be written, asked before the work that leads to it; tables that grow."""

import json
import math
import os
import shutil
from pathlib import Path

import pandas as pd

from realsr_r1 import images
from realsr_r1.common import atomic, write_text

LARGEST = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 65_535, "GIF": 65_535, "ICO": 256}  # pixels


def check_place(place: Path) -> None:
    """Raise ValueError, in one sentence, unless a file can be written at `place`."""
    if place.is_dir():
        raise ValueError(f"{place} is a folder: give the name of a file")
    if not place.parent.is_dir():
        raise ValueError(f"output folder {place.parent} does not exist: create it first")
    part = place.with_name(f".{place.name}.part")  # as `atomic` names it
    try:
        part.touch()
        part.unlink()
    except OSError as e:
        why = f"{place} cannot be written ({e.strerror or e})"
        raise ValueError(f"{why}: choose another place or name") from e


def check_writable(
    path: str | Path, trace: str | Path | None = None, size: tuple[int, int] = (1, 1)
) -> None:
    """Raise ValueError, in one sentence, unless a picture of (width, height) can be written to
    `path` and a file to `trace`."""
    if trace and os.path.abspath(path) == os.path.abspath(trace):
        raise ValueError(f"picture and trace are both to go to {path}: give two names")
    for place in (Path(p) for p in (path, trace) if p is not None):
        check_place(place)
        if shutil.disk_usage(place.parent).free < 3 * math.prod(size):
            raise ValueError(f"the disk of {place.parent} is full: choose another place")
    kind, side = images.format_of(path), max(size)
    if side > LARGEST.get(kind, side):
        largest = LARGEST[kind]
        raise ValueError(
            f"a side of {side} pixels is too long for {kind}, which takes {largest}: use .png"
        )


def claim(path: Path, settings: dict) -> None:
    """Keep a run's settings at `path`, so that a stopped one can go on there. Raises ValueError
    where a run of other settings did: its results would be taken for this one's."""
    now = json.dumps(settings, default=str)
    if path.exists() and path.read_text(encoding="utf-8") != now:
        what = f"{path.parent} holds a run of other settings"
        raise ValueError(f"{what}: choose another --out, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, now)


def append_row(path: Path, row: dict) -> None:
    """Add a row to a CSV file; a column that is new is empty in the rows before."""
    before = [pd.read_csv(path)] if path.exists() else []
    with atomic(path) as part:
        pd.concat([*before, pd.DataFrame([row])]).to_csv(part, index=False)
