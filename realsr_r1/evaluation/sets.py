"""Benchmark sets: named items of an LR photo, its original where there is one, and labels and scene
where they are known.

eval          offline: the shipped photos that no training has seen, the center square scaled to 256
              px, under three degradations with fixed seeds ("eval:light": one of the three)
real_lr       offline: the shipped real low-quality photos, whole; there is no original
photographs   offline: the annotated test photographs that ship, their middle squares at 128 px,
              under the same three; photographs:FOLDER has those of a folder
FOLDER        yours: pairs of one name in `hr/` and `lr/` (of LR, also 0001x4 or NAME_x4), or files
              NAME_HR and NAME_LR4 side by side; photos alone: LR without originals
hf:NAME       yours: a data set of the Hugging Face hub or a local folder of one, with columns lr
              and hr, or image alone; hf:NAME:SPLIT
realsr:FOLDER, reallq250:FOLDER, div2k-val:FOLDER, ost-val:FOLDER
              the paper's: a folder that must hold what KNOWN says

The scale is 4 throughout: an original has exactly four times the LR photo's width and height, and
nothing is cropped or scaled to make it so. Items of folders and data sets read their pictures when
asked to, so that a large one costs no memory.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from realsr_r1 import degradation, photographs
from realsr_r1 import images as photos
from realsr_r1.corpus.folders import pictures_in, same_name
from realsr_r1.evaluation.nano import SEVERITIES, cluster_of
from realsr_r1.tokenizer import SCALE

# pixels of the `eval` originals: a square of the photo's shorter side (288 px or more), scaled down
# to be sharp
SIDE = 256
# Names of the two folders of a set of pairs, in lower case; test_HR, gt and lq are those of
# StableSR's test sets.
HR_NAMES = ("hr", "gt", "test_hr", "hq", "div2k_valid_hr")
LR_NAMES = ("lr", "lq", "test_lr", "div2k_valid_lr_bicubic")


@dataclass
class Item:
    """One photo to restore. `read()` gives LR (3, h, w) and HR (3, 4h, 4w), or None for the latter,
    in [0, 1]."""

    id: str
    read: Callable[[], tuple[Tensor, Tensor | None]]
    labels: dict[str, str] | None = None  # the five of its degradation
    photo: photographs.Photograph | None = None
    group: str = ""  # items of one photo share it: not independent, intervals count them as one

    def __post_init__(self):
        self.group = self.group or self.id


@dataclass
class BenchSet:
    """A named list of items. `paired` says whether the items have originals; `note` how they were
    made."""

    name: str
    items: list[Item]
    paired: bool
    note: str = ""

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Prepared:
    """What a common preparation of a set holds; None where we know of no number to check."""

    count: int | None
    paired: bool
    lr: tuple[int, int] | None = None  # width, height
    hr: tuple[int, int] | None = None
    source: str = ""

    def __str__(self) -> str:
        parts = [
            f"{self.count or 'any number of'} "
            f"{'pairs' if self.paired else 'photos without originals'}"
        ]
        parts += [f"{k} {s[0]}x{s[1]}" for k, s in (("LR", self.lr), ("HR", self.hr)) if s]
        return f"{', '.join(parts)} ({self.source})"


KNOWN = {
    "realsr": (
        Prepared(
            100,
            True,
            (128, 128),
            (512, 512),
            "center crops of RealSR version 3's test photos, StableSR's test sets",
        ),
        Prepared(100, True, source="RealSR version 3, Test ×4, 50 photos of each camera, whole"),
    ),
    "reallq250": (Prepared(250, False, (256, 256), source="DreamClear's set"),),
    "div2k-val": (
        Prepared(
            3000,
            True,
            (128, 128),
            (512, 512),
            "crops under Real-ESRGAN's degradation, StableSR's test sets",
        ),
        Prepared(
            100,
            True,
            source="DIV2K's validation photos 0801 to 0900, whole, with their bicubic ×4 LR",
        ),
    ),
    # The paper names the set; how many crops, of which photos and how degraded we could not find.
    # So only pairs and scale are checked.
    "ost-val": (
        Prepared(
            None,
            True,
            source="outdoor scenes as the paper has them; no count or crop size is published",
        ),
    ),
}
NAMES = (
    "eval",
    *(f"eval:{d}" for d in SEVERITIES),
    "real_lr",
    "photographs",
    "photographs:FOLDER",
    "FOLDER",
    "hf:NAME",
    *(f"{k}:FOLDER" for k in KNOWN),
)


def load(spec: str, n: int | None = None) -> BenchSet:
    """The set that `spec` names (see NAMES), its first `n` items.

    Raises ValueError, in one sentence, for an unknown name, an empty or half-paired folder, pairs
    that are not ×4 (of a data set, when they are read), and a set that is not what KNOWN expects;
    FileNotFoundError for a folder or a data set that is not there.
    """
    if n is not None and n < 1:
        raise ValueError(f"a benchmark needs one item or more, got n = {n}")
    kind, _, rest = spec.partition(":")
    if spec == "real_lr":
        found = from_folder(
            photographs.ASSETS / "real_lr",
            "real_lr",
            "real photos of old cameras, phones and scans, whole",
        )
    elif kind == "photographs" and (rest or spec == kind):
        found = annotated(rest or None)
    elif kind == "eval" and rest in ("", *SEVERITIES):
        found = eval_photos((rest,) if rest else SEVERITIES)
    elif kind == "hf" and rest:
        found = from_hub(rest)
    elif kind in KNOWN and rest:
        found = prepared(kind, rest)
    elif Path(spec).is_dir():
        found = from_folder(spec)
    elif kind in (*KNOWN, "hf", "photographs"):
        ways = f"{kind}:{'NAME' if kind == 'hf' else 'FOLDER'}"
        ways = f"{kind} or {ways}" if kind == "photographs" else ways
        raise ValueError(f"{spec!r} does not say where {kind} lies: write {ways}")
    else:
        raise FileNotFoundError(f"no set and no folder {spec!r}: choose among {', '.join(NAMES)}")
    if n is not None and n < len(found):  # it has pictures and tables of its own
        found.items, found.name = found.items[:n], f"{found.name}-first-{n}"
    return found


# ---------------------------------------------------------------- the offline sets


def center_square(image: Image.Image, side: int = SIDE) -> Tensor:
    """The largest centered square of a photo, scaled to side × side by Lanczos: (3, side, side) in
    [0, 1]."""
    w, h = image.size
    short = min(w, h)
    left, top = (w - short) // 2, (h - short) // 2
    box = (left, top, left + short, top + short)
    return photos.to_tensor(image.crop(box).resize((side, side), Image.Resampling.LANCZOS))


def eval_photos(presets: tuple[str, ...] = SEVERITIES) -> BenchSet:
    """The shipped `eval` photos, photo by photo under each preset; the draw's seed is the photo's
    number, so it never changes."""
    items = []
    for i, path in enumerate(sorted((photographs.ASSETS / "eval").glob("*.webp"))):
        hr = center_square(photos.open_photo(path), SIDE)
        for preset in presets:
            d = degradation.degrade(hr[None], f"nano-{preset}", torch.Generator().manual_seed(i))
            pair = d.lr[0], hr
            name = f"{path.stem}-{preset}"
            items.append(Item(name, lambda x=pair: x, d.labels[0], group=path.stem))
    name = "eval" if presets == SEVERITIES else f"eval-{'-'.join(presets)}"
    note = (
        f"shipped photos that no training has seen, center squares of {SIDE} px, LR "
        f"{SIDE // SCALE} px, degradations {', '.join(presets)}"
    )
    return BenchSet(name, items, True, note)


def annotated(folder: str | None = None) -> BenchSet:
    """The annotated test photographs of a folder, or those that ship, photo by photo under each
    preset."""
    chosen = photographs.load("test", folder)
    sets = {d: photographs.Pairs(chosen, f"nano-{d}", training=False) for d in SEVERITIES}

    def item(i: int, preset: str) -> Item:
        pair, photo = sets[preset][i], chosen[i]
        both = tuple(pair[k].float() / 255 for k in ("lr", "hr"))
        labels, name = degradation.from_words(pair["degradation"]), f"{photo.file}-{preset}"
        return Item(name, lambda: both, labels, photo, cluster_of(vars(photo)))

    items = [item(i, preset) for i in range(len(chosen)) for preset in SEVERITIES]
    note = "annotated test photographs, HR 128 px, LR 32 px, degradations light, medium, heavy"
    return BenchSet(f"photographs-{_mark(folder)}" if folder else "photographs", items, True, note)


# ---------------------------------------------------------------- folders


def _opened(name: str, lr, hr) -> tuple[Tensor, Tensor | None]:
    """The pictures of two files (or rows), HR or None; the size is looked at again, because a
    photo's EXIF rotation may have turned one of them."""
    small, large = (photos.to_tensor(photos.open_photo(p)) if p else None for p in (lr, hr))
    if large is not None:
        _check_scale(name, small.shape[:0:-1], large.shape[:0:-1])
    return small, large


def _check_scale(name: str, lr: tuple[int, int], hr: tuple[int, int]) -> None:
    """ValueError unless (width, height) of HR are four times those of LR."""
    if tuple(hr) != (SCALE * lr[0], SCALE * lr[1]):
        what = f"HR must be {SCALE * lr[0]}x{SCALE * lr[1]}"
        if tuple(hr) == tuple(lr):
            what = "this is the set's version of equal sizes, take the one with true ×4 LR"
        raise ValueError(
            f"the pair of {name} is not ×{SCALE}, LR {lr[0]}x{lr[1]} and HR {hr[0]}x{hr[1]}: {what}"
        )


# What is taken off names that have no partner as they are, step by step: DIV2K's folder, then the
# mark of the side too, then that of the scale (0001x4, name_x4, babyx4).
MARKS = ("(?!)", *accumulate((r"^x4__", r"_(hr|lr)\d?$", r"[_-]?x\d$"), "{}|{}".format))


def _names(below: Path) -> dict[Path, str]:
    """The photos below a folder and their names: the path without the suffix, with __ for /."""
    files = pictures_in(below)[0]
    return {p: same_name("__".join(p.relative_to(below).with_suffix("").parts)) for p in files}


def _pair(folder: Path, lr: dict[Path, str], hr: dict[Path, str]) -> list[tuple[str, Path, Path]]:
    """(id, LR file, HR file) of files by name, sorted; DIV2K's X2 and X3 are passed over where
    there is X4.

    Raises ValueError where two files of one side would have one id, and where one has no partner.
    """
    left, found = (dict(lr), dict(hr)), ([], [])
    for mark in MARKS:
        keys = [{p: re.sub(f"(?i){mark}", "", name) for p, name in side.items()} for side in left]
        both = set(keys[0].values()) & set(keys[1].values())
        for side, done, key in zip(left, found, keys, strict=True):
            for path in [p for p in key if key[p] in both]:
                done.append((key[path], path))
                del side[path]
    small, large = (_unique(folder, side) for side in found)
    other = ("x2__", "x3__") if any(name.lower().startswith("x4__") for name in lr.values()) else ()
    if alone := sorted(
        name for side in left for name in side.values() if not name.lower().startswith(other)
    ):
        raise ValueError(
            f"{folder}: {len(alone)} photos have no partner, the first is {alone[0]}: HR and LR "
            f"of a pair must share their names"
        )
    return [(k, small[k], large[k]) for k in sorted(small)]


def _unique(folder: Path, found: list[tuple[str, Path]]) -> dict[str, Path]:
    """The files by id; ValueError where two have one id."""
    by_id: dict[str, Path] = {}
    for key, path in found:
        if (other := by_id.setdefault(key, path)) != path:
            two = " and ".join(p.relative_to(folder).as_posix() for p in (other, path))
            raise ValueError(
                f"{folder}: {two} would both be called {key}: rename one of them, or remove it"
            )
    return by_id


def find_pairs(folder: str | Path) -> list[tuple[str, Path, Path | None]]:
    """(id, LR file, HR file or None) of every photo in a folder, sorted by id; the layouts are in
    this module's docstring."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist: check the path")
    inside = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
    hr_dir, lr_dir = (
        next((inside[k] for k in names if k in inside), None) for names in (HR_NAMES, LR_NAMES)
    )
    if hr_dir and not lr_dir:
        raise ValueError(
            f"{folder} has {hr_dir.name}/ but no LR photos: put them into {folder.name}/lr/ "
            f"with the same names"
        )
    names = _names(lr_dir or folder)
    marked = {p: name for p, name in names.items() if re.search(r"(?i)_hr\d?$", name)}
    if hr_dir:
        found = _pair(folder, names, _names(hr_dir))
    elif marked:
        found = _pair(folder, {p: name for p, name in names.items() if p not in marked}, marked)
    else:
        found = [
            (key, p, None)
            for key, p in _unique(folder, [(name, p) for p, name in names.items()]).items()
        ]
    if not found:
        raise ValueError(f"{folder} holds no pictures that Pillow opens: check the path")
    return found


def from_folder(folder: str | Path, name: str | None = None, note: str = "") -> BenchSet:
    """A user's folder as a set. Every picture is looked at before anything is restored: one that
    cannot be read is left out, and the set's note says so; a pair's scale must be 4."""
    items, left_out, paired = [], [], False
    for key, lr, hr in find_pairs(folder):
        try:
            sizes = photos.open_photo(lr).size, hr and photos.open_photo(hr).size
        except ValueError as e:
            left_out.append(str(e))
            continue
        if hr:
            _check_scale(lr.name, *sizes)
        paired = hr is not None
        items.append(Item(key, partial(_opened, lr.name, lr, hr)))
    if not items:
        raise ValueError(f"{folder}: {left_out[0]}")
    if left_out:
        print(*(f"left out: {said}" for said in left_out), sep="\n")
        note = f"{note or 'a folder of photos'}; {len(left_out)} left out that cannot be read"
    name = name or f"{Path(folder).resolve().name}-{_mark(folder)}"
    return BenchSet(name, items, paired, note or "a folder of photos")


def _mark(folder: str | Path) -> str:
    """Six digits that stand for a folder: two may have one name, and their tables must not
    overwrite each other."""
    path = str(Path(folder).resolve())
    return hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:6]


def prepared(kind: str, folder: str | Path) -> BenchSet:
    """One of the paper's sets from a local folder, refused unless count and sizes are those of one
    entry of KNOWN[kind]."""
    found = find_pairs(folder)
    paired = found[0][2] is not None
    _, *sides = zip(*found, strict=True)
    sizes = [{photos.open_photo(f).size for f in side if f} for side in sides]
    for known in KNOWN[kind]:
        fits = (
            known.count in (None, len(found)),
            known.paired == paired,
            *(
                want is None or have == {want}
                for want, have in zip((known.lr, known.hr), sizes, strict=True)
            ),
        )
        if all(fits):
            return from_folder(folder, kind, str(known))
    seen = f"{len(found)} {'pairs' if paired else 'photos without originals'}"
    seen += f", LR of {len(sizes[0])} sizes, e.g. {'x'.join(map(str, min(sizes[0])))}"
    raise ValueError(
        f"{kind} is expected to be {', or '.join(map(str, KNOWN[kind]))}; {folder} holds {seen}: "
        f"check it, or measure it as a folder of your own, --data {folder}"
    )


# ---------------------------------------------------------------- data sets of the hub


def _split_of(name: str) -> tuple[str, str, object]:
    """Name, split and rows of the data set that `NAME` or `NAME:SPLIT` names."""
    import datasets

    split = ""
    if ":" in name and not Path(name).is_dir():  # a folder may have a colon, C:\sets
        name, _, split = name.rpartition(":")
    try:
        splits = datasets.load_dataset(name)
    except Exception as e:  # datasets raises a dozen kinds, of its own and of the hub's client
        raise FileNotFoundError(
            f"data set {name} cannot be had ({type(e).__name__}): check its name, "
            "and set HF_HUB_OFFLINE=0 for this run if it has to be downloaded"
        ) from e
    usual = (s for s in ("test", "validation", "val") if s in splits)
    split = split or next(usual, next(iter(splits)))
    if split not in splits:
        raise ValueError(
            f"data set {name} has no split {split!r}: choose among {', '.join(splits)}"
        )
    return name, split, splits[split]


def from_hub(name: str) -> BenchSet:
    """`NAME` or `NAME:SPLIT` through `datasets`: the hub's, if it is in the local cache or the
    network is on, or a local folder."""
    import datasets

    name, split, data = _split_of(name)
    columns = {c.lower(): c for c in data.column_names}
    hr, lr = (
        next((columns[k] for k in (*names, *more) if k in columns), None)
        for names, more in ((HR_NAMES, ()), (LR_NAMES, ("image",)))
    )
    if lr is None:
        raise ValueError(
            f"data set {name} has the columns {', '.join(data.column_names)}: it needs lr and "
            f"hr, or image alone"
        )
    if wrong := [c for c in (lr, hr) if c and not isinstance(data.features[c], datasets.Image)]:
        raise ValueError(
            f"column {wrong[0]} of data set {name} does not hold images: cast it to "
            f"datasets.Image first"
        )

    def read(i: int) -> tuple[Tensor, Tensor | None]:
        row = data[i]
        if row[lr] is None or (hr and row[hr] is None):
            raise ValueError(f"row {i} has no picture: mend or remove it")
        return _opened(f"row {i}", row[lr], hr and row[hr])

    items = [Item(f"{i:05d}", partial(read, i)) for i in range(len(data))]
    title = f"hf-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}-{split}"
    return BenchSet(title, items, hr is not None, f"{name}, split {split}")
