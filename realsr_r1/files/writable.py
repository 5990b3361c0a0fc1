"""Whether a result can be written, asked before the work that leads to it."""

import math
import os
import shutil
import tempfile
from pathlib import Path

from realsr_r1 import images

LARGEST = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 65_535, "GIF": 65_535, "ICO": 256}  # pixels


def check_writable(
    path: str | Path, trace: str | Path | None = None, size: tuple[int, int] = (1, 1)
) -> None:
    """Raise ValueError, in one sentence, unless a picture of (width, height) can be written to
    `path` and a file to `trace`."""
    if trace and os.path.abspath(path) == os.path.abspath(trace):
        raise ValueError(f"picture and trace are both to go to {path}: give two names")
    for place in (Path(p) for p in (path, trace) if p is not None):
        folder = place.parent
        if place.is_dir():
            raise ValueError(f"{place} is a folder: give the name of a file")
        if not folder.is_dir():
            raise ValueError(f"output folder {folder} does not exist: create it first")
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as e:
            raise ValueError(
                f"{folder} cannot be written: choose another place for {place.name}"
            ) from e
        if shutil.disk_usage(folder).free < 3 * math.prod(size):
            raise ValueError(f"the disk of {folder} is full: choose another place")
    kind, side = images.format_of(path), max(size)
    if side > LARGEST.get(kind, side):
        largest = LARGEST[kind]
        raise ValueError(
            f"a side of {side} pixels is too long for {kind}, which takes {largest}: use .png"
        )
