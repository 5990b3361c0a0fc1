"""Annotated photographs: their captions and tags, and LR/HR pairs of them.

Each was annotated by looking at it: subject, count, view, colors, place, background, extras
(`assets/annotations.csv`; expect a few per cent of wrong fields, mostly count, place and minor
colors). Captions and tags follow from these fields by rule, so a caption never says what the
annotation does not. Splits are part of the table: flowers by photographer, others by photograph.
"""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from realsr_r1 import degradation, images

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "val", "test")
SIDE = 128  # pixels of an HR square
SHORT_SIDE = 160  # pixels: at this size the sources' own JPEG traces are gone
COUNTS = {"one": "", "two": "two", "few": "a few", "many": "many"}

# The words of the annotations: backgrounds and places, each with how it is put into words (a
# background without an entry is a color or a light), subjects, and the wider word for others.
_WORDS = json.loads((ASSETS / "words.json").read_text(encoding="utf-8"))
BACKGROUNDS, PLACES = _WORDS["backgrounds"], _WORDS["places"]
SUBJECTS, EXTRAS = tuple(_WORDS["subjects"]), tuple(_WORDS["extras"])
CLOSED = {"split": SPLITS, "count": COUNTS, "place": PLACES}  # fields with a closed list
FOLDED = {name.replace("-", " "): w for w, names in _WORDS["wider"].items() for name in names}


def plural(noun: str) -> str:
    """English plural of a noun of the annotations: "wild cat" → "wild cats"."""
    if noun.endswith(("fish", "coral")):
        return noun
    if noun.endswith("leaf"):
        return noun[:-1] + "ves"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|ch|sh)$", noun) else "s")


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _background(name: str) -> str:
    return BACKGROUNDS.get(name) or f"on {_article(name)} background"


@dataclass(frozen=True)
class Photograph:
    """One annotated photograph; the fields are those of `annotations.csv`, lists as tuples."""

    source: str
    file: str
    split: str
    subject: str
    count: str
    view: str
    colors: tuple[str, ...]
    place: str
    background: tuple[str, ...]
    extras: tuple[str, ...]
    author: str = ""
    read: Callable[[], bytes] | None = None  # gives the picture's file

    @property
    def captions(self) -> tuple[str, str, str]:
        """Rough, middle and final text (paper, section 3.2: from the main thing to the details)."""
        noun = self.subject if self.count == "one" else plural(self.subject)
        first = _background(self.background[0])
        rough = f"{_article(noun) if self.count == 'one' else noun} {first}"
        things = f"{self.colors[0]} {noun}"
        head = _article(things) if self.count == "one" else f"{COUNTS[self.count]} {things}"
        middle = " ".join([head, *map(_background, self.background)])
        things = f"{' and '.join(self.colors)} {noun}"
        head = _article(things) if self.count == "one" else f"{COUNTS[self.count]} {things}"
        final = [f"{_article(self.view)} view of {head}", PLACES[self.place]]
        if self.extras:
            final.append("with " + " and ".join(plural(e) for e in self.extras))
        return rough, middle, " ".join(final)

    @property
    def tags(self) -> tuple[str, ...]:
        """What the understanding reward asks for: subject, background words, extras."""
        return tuple(dict.fromkeys((self.subject, *self.background, *self.extras)))

    def image(self) -> Image.Image:
        """The RGB picture, its short side scaled down to SHORT_SIDE; ValueError names the file."""
        try:
            image = images.open_photo(self.read())
        except ValueError as e:
            raise ValueError(f"{self.file}: {e}") from e
        scale = SHORT_SIDE / min(image.size)
        if scale < 1:
            size = tuple(max(SHORT_SIDE, round(n * scale)) for n in image.size)
            image = image.resize(size, Image.Resampling.LANCZOS)
        return image

    def mirrored(self) -> "Photograph":
        """The annotation of the mirror image: left and right change places."""
        swap = {"left": "right", "right": "left"}
        place = "-".join(swap.get(w, w) for w in self.place.split("-"))
        return replace(self, place=place)


def from_row(row: dict, read: Callable[[], bytes] | None = None) -> Photograph:
    """A row of the table (strings, lists joined by +) → Photograph, rare words folded. ValueError
    for a field that is missing or that no caption can be made of."""
    for name in ("file", "subject", "view", "colors", "background", *CLOSED):
        value, choice = row.get(name), CLOSED.get(name)
        if not (value or "").strip("+") or (choice and value not in choice):
            what = f"choose one of {', '.join(choice)}" if choice else "give it a word"
            raise ValueError(f"the annotation of {row.get('file')} has {name} {value!r}: {what}")
    lists = ("colors", "background", "extras")
    many = {k: tuple(filter(None, (row.get(k) or "").split("+"))) for k in lists}
    subject = row["subject"]
    subject = subject if subject in SUBJECTS else FOLDED.get(subject.replace("-", " "), "thing")
    extras = (_WORDS["singular"].get(e, e) for e in many["extras"])
    many["extras"] = tuple(e for e in extras if e in EXTRAS)
    fields = {k: row[k] for k in ("file", "split", "count", "view", "place")}
    fields |= {k: words[:2] for k, words in many.items()}
    fields |= {"source": row.get("source", "shipped"), "author": row.get("author") or row["file"]}
    photo = Photograph(subject=subject, read=read, **fields)
    if unknown := set(" ".join(photo.captions).split()) - set(vocabulary()):
        what = f"the annotation of {row['file']} needs the word {min(unknown)!r}"
        raise ValueError(f"{what}, which captions do not have: choose another")
    return photo


@lru_cache
def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    texts = [*COUNTS.values(), *map(_background, BACKGROUNDS), *PLACES.values(), *EXTRAS]
    texts += [*map(plural, EXTRAS), *SUBJECTS, *map(plural, SUBJECTS)]
    colors = "black blue brown cream gold gray green orange pink purple red white yellow dark light"
    texts += [colors, "a an on background close near far view of and with"]
    return sorted({word for text in texts for word in text.split()})


def load(split: str, where: str | Path | None = None, n: int | None = None) -> list[Photograph]:
    """The annotated photographs of a split, or `n` of them, evenly over its table.

    Args:
        where: a folder with parquet files, or one of pictures, with an annotations.csv of its own
            or named as in the package's; None: the photographs that ship with the package.
    Photographs whose picture is missing are left out. Raises ValueError for an unknown split or
    annotation and FileNotFoundError where no picture is found."""
    found = _load(split, Path(where or ASSETS))
    some = len(found) if n is None else min(n, len(found))
    return [found[i * len(found) // some] for i in range(some)]


def _load(split: str, where: Path) -> list[Photograph]:
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    if files := sorted(where.glob("annotated-*.parquet")):
        import pyarrow.parquet as parquet  # comes with datasets; slow to import

        if rows := parquet.read_table(files, filters=[("split", "==", split)]).to_pylist():
            return [from_row(r, partial(r.get, "image")) for r in rows]
    table = next(p for w in (where, ASSETS) if (p := w / "annotations.csv").exists())
    with table.open(newline="", encoding="utf-8-sig") as f:
        rows = [r for r in csv.DictReader(f) if r.get("split", split) == split]
    found = []
    for row in rows:
        file = row.get("file") or ""
        places = (where / (row.get("source") or "") / file, where / file)
        path = next((p for p in places if p.is_file()), None)
        found += [from_row(row, path.read_bytes)] if path else []
    if not found:
        raise FileNotFoundError(f"{where} holds none of the annotated photographs of {split}")
    return found


def crop(image: Image.Image, size: int, rng: np.random.Generator) -> tuple[Image.Image, bool]:
    """A random square of `size` pixels from 75% of the short side upward, so that the caption stays
    true, and whether it is mirrored."""
    short = min(image.size)
    side = rng.uniform(max(0.75, size / 2 / short), 1.0) * short if short > size / 2 else short
    x, y = (rng.uniform(0, n - side) for n in image.size)
    box = (x, y, x + side, y + side)
    cut = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    flip = bool(rng.random() < 0.5)
    return (ImageOps.mirror(cut) if flip else cut), flip


def relight(hr: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, h, w) in [0, 1] with saturation, contrast and brightness changed by up to 15%: too little
    to rename a color."""
    saturation, contrast, brightness = rng.uniform(0.85, 1.15, 3)
    gray, mean = hr.mean(0, keepdim=True), hr.mean()
    hr = gray + saturation * (hr - gray)
    return ((mean + contrast * (hr - mean)) * brightness).clamp(0, 1)


def center(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle, at `size` pixels: what evaluations look at."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_bytes(image: Image.Image) -> Tensor:
    """PIL RGB → (3, h, w) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Pairs(Dataset):
    """HR squares (3, 128, 128) and their LR photos as uint8, with labels, captions and tags.

    Item i is always the same: everything random comes from `seed` and i. In training there is no
    end of items: each is a random crop of a random photograph; otherwise item i is the center of
    photograph i."""

    def __init__(
        self,
        photos: list,
        preset: str = "nano",
        seed: int = 0,
        training: bool = True,
        labels: bool = True,
    ):
        self.photos, self.config = photos, degradation.preset(preset)
        self.seed, self.training, self.labels = seed, training, labels

    def __len__(self) -> int:
        return 10**9 if self.training else len(self.photos)

    def cut(self, image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, bool]:
        """A training square of SIDE pixels, and whether it is mirrored."""
        return crop(image, SIDE, rng)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):  # so that a plain loop over held-out pairs ends
            raise IndexError(f"there are {len(self)} pairs, asked for number {i}")
        rng = np.random.default_rng((self.seed, i))
        index = int(rng.integers(len(self.photos))) if self.training else i
        photo, flip = self.photos[index], False
        if self.training:
            image, flip = self.cut(photo.image(), rng)
            pixels = (relight(to_bytes(image) / 255, rng) * 255).round().byte()
        else:
            pixels = to_bytes(center(photo.image(), SIDE))
        hr = pixels / 255
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        ops = degradation.draw(hr.shape[-2:], self.config, generator)
        lr = (degradation.apply(hr[None], [ops])[0] * 255).round().byte()
        item = {"hr": pixels, "lr": lr, "index": index}
        if self.labels:
            photo = photo.mirrored() if flip else photo
            words = degradation.to_words(degradation.label(hr, ops))
            item |= {"degradation": words, "captions": photo.captions, "tags": photo.tags}
        return item
