"""Photos at scale: LSDIR, FFHQ, DIV2K, OST or any others, from a folder, from archives, or streamed
from the hub.

A source is a `datasets.IterableDataset` of rows {"file", "path", "bytes"}: nothing is decoded
before it is needed, and `shard` splits it among processes. Each photo becomes pairs (`Recipe`: crop
and degradation, whose draws depend on the photo's name alone and not on who reads it). Captions
come from `annotate` and are joined by file name. What trainers read is made from the pairs in
`shards`.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import torch
from datasets import Features, Image, IterableDataset, Value, load_dataset
from PIL import Image as PILImage

from realsr_r1 import images as photos
from realsr_r1.corpus import folders
from realsr_r1.first import degradation, scenes

ROW = Features({"file": Value("string"), "path": Value("string"), "bytes": Value("binary")})
NAMES = (
    "file",
    "file_name",
    "filename",
    "path",
    "name",
    "__key__",
)  # columns that may name a hub dataset's photo
ARCHIVES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Source:
    """A published photo set: how many photos, and where they are to be had (each with its own
    licence: read it there)."""

    photos: int
    about: str
    get: str


# PURE trains on LSDIR and 10,000 faces of FFHQ. DIV2K and OST are Real-ESRGAN's; the paper also
# evaluates on OST.
KNOWN = {
    "lsdir": Source(
        84_991,
        "varied photographs",
        "hub repository ofsoundof/LSDIR (access on request), files shard-*.tar.gz, no need to "
        "unpack",
    ),
    "ffhq": Source(70_000, "faces, 1024x1024", "github.com/NVlabs/ffhq-dataset"),
    "div2k": Source(800, "2K photographs, the training part", "data.vision.ee.ethz.ch/cvl/DIV2K"),
    "ost": Source(
        10_324,
        "outdoor scenes of seven kinds, the training part",
        "mmlab.ie.cuhk.edu.hk/projects/SFTGAN (OutdoorSceneTrain_v2)",
    ),
}


# ---------------------------------------------------------------- rows of undecoded photos


def _from_files(folder: str, files: list[str]) -> Iterator[dict]:
    for name in files:
        yield {"file": name, "path": str(Path(folder) / name), "bytes": None}


def _from_archives(folder: str, archives: list[str]) -> Iterator[dict]:
    """The photos of tar archives, read from front to back without unpacking."""
    for name in archives:
        try:
            with tarfile.open(Path(folder) / name, "r|*") as tar:
                for member in tar:
                    if member.isfile() and Path(member.name).suffix.lower() in photos.SUFFIXES:
                        yield {
                            "file": member.name.removeprefix("./"),
                            "path": None,
                            "bytes": tar.extractfile(member).read(),
                        }
        except (tarfile.ReadError, EOFError, OSError) as e:
            raise ValueError(
                f"archive {name} is damaged or cut short ({e}): download it again"
            ) from e


def _from_column(data: IterableDataset, where: str) -> IterableDataset:
    """Rows of a dataset that has a column of images. A photo without a name is named by its bytes'
    digest."""
    features = data.features
    images = [k for k, v in features.items() if isinstance(v, Image)]
    if not images:
        raise ValueError(
            f"{where} has no column of images, only {', '.join(features)}: choose another dataset"
        )
    named = next((k for k in NAMES if k in features and k != images[0]), None)

    def row(example: dict) -> dict:
        image = example[images[0]]
        path, data = image["path"], image["bytes"]
        # hf://datasets/owner/name@revision/train/x.png → train/x.png; of a path on another machine
        # only x.png
        name = (example[named] if named else None) or (
            path and re.sub(r"^hf://datasets/[^@]+@[^/]+/|^/.*/", "", path)
        )
        return {
            "file": name or hashlib.sha256(data).hexdigest()[:20],
            "path": None if data else path,
            "bytes": data,
        }

    return data.cast_column(images[0], Image(decode=False)).map(
        row, remove_columns=list(features), features=ROW
    )


def _open(where: str | Path, split: str) -> IterableDataset:
    folder, name = Path(where), str(where)
    if name.startswith("hf:"):
        try:
            data = load_dataset(name[3:], split=split, streaming=True)
            data = data if data.features else data._resolve_features()
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as e:  # no network, offline, no such dataset or split, a loading script
            raise ValueError(
                f"{name} could not be streamed ({' '.join(str(e).split())[:200]}): check name, "
                f"split and network "
                "(HF_HUB_OFFLINE=0), or download it and give the folder"
            ) from e
        return _from_column(data, name)
    if not folder.is_dir():
        hint = (
            f"get {KNOWN[name.lower()].get} and give its folder"
            if name.lower() in KNOWN
            else "give a folder, or hf:OWNER/NAME for the hub"
        )
        raise ValueError(f"{name} is not a folder: {hint}")
    inside = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    if files := [n for n in inside if Path(n).suffix.lower() in photos.SUFFIXES]:
        return IterableDataset.from_generator(
            _from_files, ROW, {"folder": str(folder), "files": files}
        )
    if parquet := [str(folder / n) for n in inside if n.endswith(".parquet")]:
        return _from_column(
            load_dataset("parquet", data_files=parquet, split="train", streaming=True), name
        )
    if archives := [n for n in inside if n.endswith(ARCHIVES)]:
        return IterableDataset.from_generator(
            _from_archives, ROW, {"folder": str(folder), "archives": archives}
        )
    raise ValueError(
        f"{name} holds no photos ({', '.join(sorted(photos.SUFFIXES))}), parquet files or tar "
        f"archives: check the path"
    )


def open_source(
    where: str | Path, split: str = "train", shard: tuple[int, int] = (0, 1)
) -> IterableDataset:
    """Photos as undecoded rows {"file", "path", "bytes"} (see `open_row`), every row in exactly one
    of the shards.

    `where`: a folder of photos (searched in depth), of parquet files with an image column, or of
    tar archives; or "hf:OWNER/NAME", a hub dataset, streamed. `split`: of a hub dataset. `shard`:
    (index, number) of this process. Where there are fewer files than processes, rows are dealt out
    one by one, so every process reads all of them. Raises ValueError if there is nothing to read,
    with what to do.
    """
    index, number = shard
    if not 0 <= index < number:
        raise ValueError(
            f"shard {index}/{number} does not exist: the first of {number} is 0/{number}"
        )
    data = _open(where, split)
    if number == 1:
        return data
    if data.num_shards >= number:
        return data.shard(number, index, contiguous=False)
    return data.filter(lambda row, i: i % number == index, with_indices=True)


def open_row(row: dict) -> PILImage.Image:
    """The photo of a row, upright, RGB; ValueError with one sentence if it is missing or broken."""
    data = row["bytes"]
    if data is None and "://" not in row["path"]:
        return photos.open_photo(row["path"])
    if data is None:
        try:
            with fsspec.open(row["path"], "rb") as f:
                data = f.read()
        except OSError as e:
            raise ValueError(
                f"{row['file']} could not be fetched ({e}): check the network and run again"
            ) from e
    return photos.decode_photo(io.BytesIO(data), row["file"])


# ---------------------------------------------------------------- photos → pairs


@dataclass(frozen=True)
class Recipe:
    """How a photo becomes pairs: `size` HR pixels a side, a degradation preset, so many `copies`
    (crops) a photo, each a square as large as the photo allows times a draw from `zoom` (captions
    describe the whole photo: stay near 1)."""

    size: int = 128
    preset: str = "nano"
    copies: int = 1
    zoom: tuple[float, float] = (1.0, 1.0)
    seed: int = 0


@dataclass
class Sample:
    """What is known of a crop of a photo; it takes the place of `scenes.Scene` in Pairs."""

    file: str
    captions: tuple[str, str, str] | None = None
    tags: tuple[str, ...] = ()


def seed_of(recipe: Recipe, file: str, copy: int) -> int:
    """The seed of a crop: it depends on recipe, file name and copy alone, so any sharding gives the
    same pairs."""
    return int.from_bytes(
        hashlib.sha256(f"{recipe.seed}/{copy}/{file}".encode()).digest()[:4], "big"
    )


def pairs(
    rows: Iterable[dict], recipe: Recipe = Recipe(), notes: dict[str, dict] | None = None
) -> tuple[scenes.Pairs | None, list[dict]]:
    """Rows → pairs (None if there is none) and what was left out, as {"file", "why"}: broken photos
    and, where `notes` (`folders.read_captions`) are given, photos without captions."""
    hr, lr, labels, samples, skipped = [], [], [], [], []
    for row in rows:
        note = {} if notes is None else notes.get(row["file"])
        try:
            if note is None:
                raise ValueError("no captions")
            image = open_row(row)
        except ValueError as e:
            skipped.append({"file": row["file"], "why": str(e)})
            continue
        for copy in range(recipe.copies):
            seed = seed_of(recipe, row["file"], copy)
            x = photos.to_tensor(folders.largest_square(image, recipe.size, seed, recipe.zoom))
            d = degradation.degrade(x[None], recipe.preset, torch.Generator().manual_seed(seed))
            hr.append((x * 255).round().byte())
            lr.append((d.lr[0] * 255).round().byte())
            labels.append(d.labels[0])
            samples.append(
                Sample(
                    row["file"],
                    tuple(note["captions"]) if note else None,
                    tuple(note.get("tags", ())),
                )
            )
    return (
        scenes.Pairs(torch.stack(hr), torch.stack(lr), labels, samples) if hr else None
    ), skipped


def check_join(files: Iterable[str], notes: dict[str, dict]) -> int:
    """How many of the photos have captions; ValueError with an example of both
    names if none has."""
    files = list(files)
    found = sum(f in notes for f in files)
    if files and not found:
        raise ValueError(
            f"none of {len(files)} photos is named in the captions (the first photo is "
            f"{files[0]!r}, the first caption's file "
            f"{next(iter(notes), None)!r}): 'file' must be the path relative to the folder that "
            f"is read"
        )
    return found
