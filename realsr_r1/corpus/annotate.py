"""Captions and tags for a user's own photos, by pretrained models (`captioners`).

One JSON line a photo goes to captions.jsonl beside the photos, which `folders.read_captions` reads:
{"file", "captions": [rough, middle, final], "tags", "objects": [{"tag", "box" (fractions),
"score"}]}. What is noted there is not done again, so the same command continues after a kill;
several processes share the photos, each with a file of its own. The paper takes its tags from
Grounded-SAM: Grounding DINO as the tagger, and `outline` for SAM's masks. Simplification:
Grounded-SAM looks for the words of a tagging network (RAM), here for those of the captions.
"""

import json
import logging
import os
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from realsr_r1.common import atomic, out_of_memory
from realsr_r1.corpus import captioners, folders
from realsr_r1.images import open_photo

log = logging.getLogger(__name__)
LONGEST = 1024  # pixels: no model here looks at more, and a photo's tokens grow with its area


def append(path: Path, notes: list[dict]) -> None:
    """Add whole lines to a JSONL file and wait until they are on the disk."""
    lines = [json.dumps(n, ensure_ascii=False) + "\n" for n in notes]
    data = "".join(lines).encode("utf-8", "backslashreplace")  # JSON's escapes, for odd file names
    with path.open("ab") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def mend(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished, and end one that is whole, so
    that the next line begins on its own."""
    if path.exists():
        with path.open("rb+") as f:
            data = f.read()
            last = data[data.rfind(b"\n") + 1 :]
            if folders.note_in(last.removeprefix(b"\xef\xbb\xbf")):  # an editor took the line end
                f.write(b"\n")
            else:
                f.truncate(len(data) - len(last))


def note_of(file: str, captions: list[str], objects: list[dict]) -> dict:
    """One photo's line. Captions are cleaned and put in order of their length, so that detail
    grows; boxes are rounded. Raises ValueError if a caption is empty."""
    captions = sorted((captioners.clean_caption(c) for c in captions), key=lambda c: len(c.split()))
    if not all(captions):
        raise ValueError("the model gave an empty caption")
    rounded = [{"box": [round(x, 4) for x in o["box"]]} if "box" in o else {} for o in objects]
    objects = [o | box for o, box in zip(objects, rounded, strict=True)]
    tags = captioners.unique(o["tag"] for o in objects)
    return {"file": file, "captions": captions, "tags": tags, "objects": objects}


def look(images: list[Image.Image], captioner) -> list[tuple[list[str], list[dict]]]:
    """Captions and objects of each image, in one batch, or in halves where memory runs out."""
    try:
        captions = captioner.captions(images)
        return list(zip(captions, captioner.objects(images, captions), strict=True))
    except RuntimeError as e:
        if len(images) == 1 or not out_of_memory(e):
            raise
    half = len(images) // 2
    return look(images[:half], captioner) + look(images[half:], captioner)


def open_small(path: Path) -> Image.Image:
    """A photo, upright, with at most LONGEST pixels a side."""
    image = open_photo(path)
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


def _notes(where: Path, files: list[str], captioner) -> tuple[list[dict], dict[str, str]]:
    """The lines of some photos, and why others are left out."""
    images, notes, left_out = {}, [], {}
    for file in files:
        try:
            images[file] = open_small(where / file)
        except ValueError as e:
            left_out[file] = str(e)
    answers = look(list(images.values()), captioner) if images else []
    for file, (captions, objects) in zip(images, answers, strict=True):
        try:
            notes.append(note_of(file, captions, objects))
        except ValueError as e:
            left_out[file] = str(e)
    return notes, left_out


def annotate(
    where: str | Path,
    captioner,
    out: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    batch: int = 8,
    limit: int | None = None,
) -> dict[str, int]:
    """Note captions and tags of the photos of a folder that have none yet, `limit` at most.

    `captioner` gives `captions(images)` and `objects(images, captions)`; see `captioners.Pair`.
    Lines go to captions.jsonl in the folder `out` (None: the photos' own), or, of several
    processes, to captions.I-of-N.jsonl. Returns {"new", "known", "left out"}: photos that cannot be
    read or get no caption are left out, with a line in the log, and tried again the next time."""
    if batch < 1:
        raise ValueError(f"a batch has 1 photo or more, got {batch}")
    if out is not None and not str(out).strip():
        raise ValueError("out is empty: give a folder, or None for the photos' own")
    where, folder, (index, number) = Path(where), Path(where if out is None else out), shard
    files = folders.photo_files(where)[index::number]
    for remark in folders.remarks(folders.pictures_in(where)[1]):
        log.warning("%s", remark)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("captions.jsonl" if number == 1 else f"captions.{index}-of-{number}.jsonl")
    with folders.alone(folder, path.stem):
        mend(path)
        known = folders.read_captions(folder)
        unknown = [f for f in files if folders.same_name(f) not in known]
        count = _note_all(where, unknown, captioner, path, batch, limit)
    return count | {"known": len(files) - len(unknown)}


def _note_all(
    where: Path, files: list[str], captioner, path: Path, batch: int, limit: int | None
) -> dict[str, int]:
    """Append the lines of photos to `path`, batch by batch, at most `limit`, and count them."""
    count, at = {"new": 0, "known": 0, "left out": 0}, 0
    most = len(files) if limit is None else limit
    with tqdm(total=len(files), desc=path.name, unit="photo", mininterval=5) as progress:
        while at < len(files) and count["new"] < most:
            size = min(batch, most - count["new"])
            notes, left_out = _notes(where, files[at : at + size], captioner)
            append(path, notes)
            at += size
            for name, why in left_out.items():
                log.warning("left out %s: %s", folders.shown(name), folders.shown(why))
            count["new"] += len(notes)
            count["left out"] += len(left_out)
            progress.update(len(notes) + len(left_out))
    return count


def check_masks(where: str | Path, masks: Path) -> None:
    """ValueError for a folder of masks among the photos: they would be captioned, too."""
    if masks.resolve().is_relative_to(Path(where).resolve()):
        raise ValueError(
            f"masks in {masks} would be taken for photos of {where}: give another folder"
        )


def outline(
    where: str | Path, sam, masks: Path, out: str | Path | None = None, shard=(0, 1)
) -> int:
    """Draw SAM's masks of the boxes that `annotate` noted, those that are not there yet.

    They are 8-bit PNGs of the photo's size, at most 1024 a side: 1 + the index in "objects", 0
    elsewhere. Returns how many are new."""
    check_masks(where, masks)
    notes, count = folders.read_captions(where if out is None else out), 0
    for file in folders.photo_files(where)[shard[0] :: shard[1]]:
        place, note = masks / f"{file}.png", notes.get(folders.same_name(file))
        if note is None or place.exists():
            continue
        try:
            image = open_small(Path(where) / file)
        except ValueError as e:  # it was whole when its caption was written
            log.warning("left out %s: %s", folders.shown(file), folders.shown(str(e)))
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic(place) as part:
            Image.fromarray(sam.masks(image, note.get("objects", [])).numpy()).save(part, "PNG")
        count += 1
    return count


def shard_of(text: str) -> tuple[int, int]:
    """The share of one process in words: "0/4" → (0, 4)."""
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise ValueError(f"{text!r} is no share: those of four processes are 0/4, 1/4, 2/4 and 3/4")
    return int(index), int(number)
