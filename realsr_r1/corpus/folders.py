"""Folders of a user's own photos: the one lister, and the captions that lie beside them."""

import json
import os
import unicodedata
from pathlib import Path

from PIL import Image

SUFFIXES = frozenset(s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN)
SYSTEM = ("thumbs.db", "desktop.ini")


def pictures_in(folder: str | Path) -> tuple[list[Path], dict[str, str]]:
    """The pictures below a folder, in order, and what was left out with its reason. Names with a
    leading dot are passed over; links are followed once."""
    found, left, seen = [], {}, set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [d for d in folders if not d.startswith(".")]
        if real in seen:
            continue
        seen.add(real)
        for name in files:
            path = Path(root) / name
            if name.startswith(".") or name.lower() in SYSTEM:
                continue
            if path.suffix.lower() not in SUFFIXES:
                left[str(path)] = "no picture by its suffix"
            elif not path.is_file():
                left[str(path)] = "no file, or a link to none"
            elif not os.access(path, os.R_OK):
                left[str(path)] = "may not be read"
            else:
                found.append(path)
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix()), left


def same_name(text: str) -> str:
    """A name as it is compared: composed, whatever the file system made of its accents."""
    return unicodedata.normalize("NFC", text)


def photo_files(folder: str | Path) -> list[str]:
    """Paths of all photos in a folder, searched in depth: sorted, relative to it, with forward
    slashes, as captions.jsonl names them. Raises ValueError if there is none."""
    folder = Path(folder)
    found, left = pictures_in(folder) if folder.is_dir() else ([], {})
    if not found:
        rest = f" ({len(left)} other files)" if left else ""
        raise ValueError(f"{folder} is no folder with photos{rest}: check the path")
    return [p.relative_to(folder).as_posix() for p in found]


def read_captions(where: str | Path) -> dict[str, dict]:
    """Notes by photo file, from captions.jsonl and the parts captions.*-of-*.jsonl of a folder, or
    from one such file; {} where there is none. Of a file noted twice the last line counts.

    A line is {"file": path relative to the folder, "captions": [rough, middle, final], "tags":
    [...], ...}. A last line that a killed writer left unfinished is passed over; ValueError names
    any other that is malformed."""
    where, notes = Path(where), {}
    parts = [where / "captions.jsonl", *sorted(where.glob("captions.*-of-*.jsonl"))]
    for path in [where] if where.is_file() else [p for p in parts if p.exists()]:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
