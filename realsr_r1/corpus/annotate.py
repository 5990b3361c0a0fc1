"""Captions and tags for photos that have none: what `scenes` knows exactly, pretrained models must
guess here.

One JSON line a photo goes to captions.jsonl beside the photos, which `folders.PhotoFolder` and
`sources` read: {"file", "captions": [rough, middle, final], "tags", "objects": [{"tag", "box"
(fractions), "score"}]}. What is noted there is not done again, so the same command continues after
a kill; several processes share the photos by `--shard`, each with a file of its own. The paper
takes its tags from Grounded-SAM: `--tagger grounding-dino`, with `--masks` SAM's outlines.
Simplification: Grounded-SAM looks for the words of a tagging network (RAM), here for those of the
captions.
"""

import json
import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from realsr_r1.corpus import captioners, folders, sources

log = logging.getLogger(__name__)
LONGEST = 1024  # pixels: no model here looks at more, and a photo's tokens grow with its area


def append(path: Path, notes: list[dict]) -> None:
    """Add whole lines to a JSONL file and wait until they are on the disk."""
    data = "".join(json.dumps(n, ensure_ascii=False) + "\n" for n in notes).encode()
    with path.open("ab") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def mend(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished, so that the next line begins on
    its own."""
    if path.exists():
        with path.open("rb+") as f:
            whole = f.read()
            f.truncate(whole.rfind(b"\n") + 1)


def note_of(file: str, captions: list[str], objects: list[dict]) -> dict:
    """One photo's line. Captions are cleaned and put in order of their length, so that detail
    grows; boxes are rounded. Raises ValueError if a caption is empty."""
    captions = sorted((captioners.clean_caption(c) for c in captions), key=lambda c: len(c.split()))
    if not all(captions):
        raise ValueError("the model gave an empty caption")
    objects = [
        o | ({"box": [round(x, 4) for x in o["box"]]} if "box" in o else {}) for o in objects
    ]
    return {
        "file": file,
        "captions": captions,
        "tags": captioners.unique(o["tag"] for o in objects),
        "objects": objects,
    }


def look(
    images: list[Image.Image], captioner, tagger=None
) -> tuple[list[list[str]], list[list[dict]]]:
    """Captions and objects of some images, in one batch, or in halves where memory runs out."""
    try:
        captions = captioner.captions(images)
        return captions, (tagger or captioner).objects(images, captions)
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    half = len(images) // 2
    first, second = look(images[:half], captioner, tagger), look(images[half:], captioner, tagger)
    return first[0] + second[0], first[1] + second[1]


def _batches(
    rows: Iterator[dict], size: int, left_out: dict[str, str]
) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Readable photos, shrunk to LONGEST, with their names; broken ones go to `left_out`."""
    while some := list(islice(rows, size)):
        names, images = [], []
        for row in some:
            try:
                image = sources.open_row(row)
            except ValueError as e:
                left_out[row["file"]] = str(e)
                continue
            image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
            names.append(row["file"])
            images.append(image)
        if images:
            yield names, images


def annotate(
    where: str | Path,
    captioner,
    tagger=None,
    out: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    batch: int = 8,
    split: str = "train",
    limit: int | None = None,
    sam: captioners.Sam | None = None,
    masks: Path | None = None,
) -> dict[str, int]:
    """Note captions and tags of the photos of a source (see `sources.open_source`) that have none
    yet.

    `captioner` gives `captions(images)` and `objects(images, captions)`; `tagger` the latter (None:
    the captioner's). Lines go to captions.jsonl in the folder `out` (None: the photos' own), or, of
    several processes, to captions.I-of-N.jsonl. `limit`: photos at most. With `sam`, its masks go
    to the folder `masks` as 8-bit PNG: 1 + index in "objects". Returns {"new", "known", "left
    out"}; photos that cannot be read or get no caption are left out, with a line in the log, and
    tried again the next time. Raises ValueError if there is nowhere to write or nothing to read.
    """
    index, number = shard
    rows = iter(sources.open_source(where, split, shard))
    folder = Path(out or where)
    if out is None and not folder.is_dir():
        raise ValueError(f"{where} is not a folder here: give one for the captions with --out")
    if sam and masks.resolve().is_relative_to(Path(where).resolve()):
        raise ValueError(
            f"masks in {masks} would be taken for photos of {where}: give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("captions.jsonl" if number == 1 else f"captions.{index}-of-{number}.jsonl")
    mend(path)
    known, left_out, count = (
        folders.read_captions(folder),
        {},
        {"new": 0, "known": 0, "left out": 0},
    )

    def unknown() -> Iterator[dict]:
        for row in rows:
            if row["file"] not in known:
                yield row
            else:
                count["known"] += 1

    progress = tqdm(desc=path.name, unit="photo", mininterval=5)
    for names, images in _batches(islice(unknown(), limit), batch, left_out):
        notes = []
        for name, image, captions, objects in zip(
            names, images, *look(images, captioner, tagger), strict=True
        ):
            try:
                notes.append(note_of(name, captions, objects))
            except ValueError as e:
                left_out[name] = str(e)
                continue
            if sam:
                place = masks / f"{name}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(sam.masks(image, objects).numpy()).save(place)
        append(path, notes)
        count["new"] += len(notes)
        progress.update(len(images))
    progress.close()
    for name, why in left_out.items():
        log.warning("left out %s: %s", name, why)
    return count | {"left out": len(left_out)}


def shard_of(text: str) -> tuple[int, int]:
    """The share of one process in words: "0/4" → (0, 4)."""
    index, _, number = text.partition("/")
    if not (index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise ValueError(f"{text!r} is no share: those of four processes are 0/4, 1/4, 2/4 and 3/4")
    return int(index), int(number)
