"""Folders of a user's own photos: the one lister, the captions that lie beside them, and the lock
that keeps a second run out."""

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

# Formats whose files Pillow knows by name but cannot decode.
NAMED_ONLY = ("BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
SUFFIXES = frozenset(
    s for s, k in Image.registered_extensions().items() if k in Image.OPEN and k not in NAMED_ONLY
)
# What systems leave in folders of photos, some of it pictures; in lower case.
SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin")
OTHER = "no picture by its suffix"


def pictures_in(folder: str | Path) -> tuple[list[Path], dict[str, str]]:
    """The pictures below a folder, sorted, and by path what was left out with its reason.

    Names with a leading dot and those of SYSTEM are passed over. A folder is searched once,
    whichever links lead to it, and then under its own name if that lies here."""
    found, left, seen = {}, {}, set()
    real, links = [Path(folder)], []
    while real or links:
        here = real.pop() if real else links.pop(0)
        place = os.path.realpath(here)
        if place in seen:
            left[str(here)] = "leads to a folder that is searched already"
            continue
        seen.add(place)
        for path in _inside(here, left):
            if path.is_dir():
                (links if path.is_symlink() else real).append(path)
            why = _unfit(path)
            other = found.get(same_name(str(path)))
            if why is None and other:
                why = f"has the name of {other.name!a} but for the form of its accents"
            if why:
                left[str(path)] = why
            elif not path.is_dir():
                found[same_name(str(path))] = path
    return [found[name] for name in sorted(found)], left


def _inside(folder: Path, left: dict[str, str]) -> list[Path]:
    """What lies in a folder, sorted; a folder that may not be searched goes to `left`."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        left[str(folder)] = f"cannot be searched, {e.strerror}"
        return []
    return [folder / n for n in names if not n.startswith(".") and n.lower() not in SYSTEM]


def _unfit(path: Path) -> str | None:
    """Why something in a folder is not to be opened; None for a picture and for a plain folder."""
    picture = path.suffix.lower() in SUFFIXES
    if path.is_dir():
        return "is a folder, whatever its name" if picture else None
    if not path.exists():
        return "is a link to nothing"
    if not picture:
        return OTHER
    if not path.is_file():
        return "is no file"
    return None if os.access(path, os.R_OK) else "may not be read"


def remarks(left: dict[str, str]) -> list[str]:
    """What `pictures_in` left out, in words: other kinds of files counted, the rest one by one."""
    kinds = Counter(
        Path(p).suffix.lower() or "no suffix" for p, why in left.items() if why == OTHER
    )
    kinds.pop(".jsonl", None)  # our own captions
    some = f"{', '.join(sorted(kinds)[:8])}{', …' if len(kinds) > 8 else ''}"
    number = kinds.total()
    counted = [f"{number} file{'s' * (number > 1)} passed over: {some}"] if kinds else []
    rest = [f"left out {shown(p)}: {why}" for p, why in left.items() if why != OTHER]
    return counted + rest[:20] + ([f"and {len(rest) - 20} more"] if len(rest) > 20 else [])


def shown(name: str) -> str:
    """A name that can be printed and written: bytes that are no UTF-8 as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def same_name(text: str) -> str:
    """A name as it is compared: composed, whatever the file system made of its accents."""
    return unicodedata.normalize("NFC", text)


def photo_files(folder: str | Path) -> list[str]:
    """Paths of all photos in a folder, searched in depth: sorted, relative to it, with forward
    slashes, as captions.jsonl names them. Raises ValueError if there is none."""
    if not str(folder).strip():
        raise ValueError("the folder's name is empty: give a folder (an unset variable, perhaps)")
    folder = Path(folder)
    found, left = pictures_in(folder) if folder.is_dir() else ([], {})
    if not found:
        rest = f" ({'; '.join(remarks(left)[:3])})" if left else ""
        raise ValueError(f"{shown(str(folder))} is no folder with photos{rest}: check the path")
    return [p.relative_to(folder).as_posix() for p in found]


@contextmanager
def alone(folder: Path, name: str = "run") -> Iterator[None]:
    """Keeps a second run out of a folder until the first ends, however it ends. Raises ValueError,
    in one sentence, where another is at work."""
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise ValueError(
            f"another run is at work in {shown(str(folder))}: wait for it, or choose another folder"
        ) from e
    except NotImplementedError:  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def read_captions(where: str | Path) -> dict[str, dict]:
    """Notes by photo file (see `same_name`), from captions.jsonl and the parts
    captions.*-of-*.jsonl of a folder, or from one such file; {} where there is none. Of a file
    noted twice the last line counts.

    A line is {"file": path relative to the folder, "captions": [rough, middle, final], "tags":
    [...], ...}. A last line that a killed writer left unfinished is passed over; ValueError names
    any other that is malformed."""
    where, notes = Path(where), {}
    parts = [where / "captions.jsonl", *sorted(where.glob("captions.*-of-*.jsonl"))]
    for path in [where] if where.is_file() else [p for p in parts if p.exists()]:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        for number, line in enumerate(lines, 1):
            if note := note_in(line):
                notes[same_name(note["file"])] = note
            elif line.strip() and number < len(lines):  # behind the last line end: cut off
                raise ValueError(
                    f'line {number} of {path.name} is not {{"file": …, "captions": [rough, '
                    f'middle, final], "tags": […]}}: mend or remove it'
                )
    return notes


def note_in(line: bytes) -> dict | None:
    """The note that a line holds; None if it holds none."""
    try:
        note = json.loads(line.decode("utf-8"))
        whole = isinstance(note["file"], str) and isinstance(note["tags"], list)
        three = isinstance(note["captions"], list) and len(note["captions"]) == 3
        boxes = isinstance(note.get("objects", []), list)
        return note if whole and three and boxes else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
