"""The public data sets behind the annotations: downloaded, checked, unpacked where `load` looks."""

import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from csv import DictReader
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from tqdm.auto import tqdm

from realsr_r1.photographs import ASSETS


@dataclass(frozen=True)
class Archive:
    """Where a data set lies. `prefix` is what stands before a photograph's path in the archive."""

    url: str
    source: str  # as in annotations.csv
    prefix: str
    megabytes: int
    licence: str
    inner: str = ""  # an archive inside the archive


ARCHIVES = {
    "flowers": Archive(
        "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz",
        "flower_photos",
        "flower_photos/",
        229,
        "CC BY 2.0, photographers in its LICENSE.txt",
    ),
    "caltech101": Archive(
        "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
        "caltech101",
        "101_ObjectCategories/",
        137,
        "CC BY 4.0",
        inner="101_ObjectCategories.tar.gz",
    ),
    "pets": Archive(
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
        "pets600",
        "images/",
        792,
        "CC BY-SA 4.0",
    ),
}
CHUNK = 1 << 20  # bytes


def _open(url: str, first: int) -> BinaryIO:
    """The bytes of `url` from `first` on; FileNotFoundError, in one sentence, if out of reach."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={first}-"} if first else {})
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing is left to send
            raise EOFError from e
        raise FileNotFoundError(
            f"{url} answers {e.code} ({e.reason}): look for a new address"
        ) from e
    except (OSError, HTTPException) as e:
        raise FileNotFoundError(f"{url} cannot be reached: is there a network?") from e


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path` with a progress bar, going on where an earlier try stopped.

    Raises FileNotFoundError if it is out of reach, ValueError if fewer bytes came than announced
    (call again to go on)."""
    part = path.with_name(path.name + ".part")
    first = part.stat().st_size if part.exists() else 0
    try:
        answer = _open(url, first)
    except EOFError:
        part.replace(path)
        return
    with answer:
        if first and answer.status != 206:  # this server cannot go on: start again
            first = 0
        total = first + int(answer.headers.get("Content-Length", 0))
        bar = tqdm(total=total or None, initial=first, unit="B", unit_scale=True, desc=path.name)
        with bar, part.open("ab" if first else "wb") as out:
            try:
                while block := answer.read(CHUNK):
                    out.write(block)
                    bar.update(len(block))
            except (OSError, HTTPException) as e:
                raise ValueError(f"{path.name} broke off: call again") from e
    if total and part.stat().st_size < total:
        raise ValueError(
            f"{path.name} broke off after {part.stat().st_size} of {total} bytes: call again"
        )
    part.replace(path)


DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError)


def members(stream: BinaryIO, inner: str = "") -> Iterator[tuple[str, BinaryIO]]:
    """Names and contents of the files in a .tar.gz or .zip archive, or in the one inside it whose
    name ends with `inner`; read to its end. Raises one of DAMAGED where it is."""
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.namelist():
                if not inner:
                    yield entry, archive.open(entry)
                elif entry.endswith(inner):
                    yield from members(archive.open(entry))
        return
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:*") as archive:
        for entry in archive:
            if entry.isfile():
                yield entry.name, archive.extractfile(entry)
        while archive.fileobj.read(CHUNK):  # tarfile ends at a broken header and does not say so
            pass


def _wanted(path: Path, archive: Archive) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each annotated photograph in a downloaded archive. ValueError, in one
    sentence, for a damaged one, which is removed."""
    with (ASSETS / "annotations.csv").open(newline="", encoding="utf-8-sig") as f:
        wanted = {r["file"] for r in DictReader(f) if r["source"] == archive.source}
    try:
        with path.open("rb") as stream:
            for name, content in members(stream, archive.inner):
                file = name[name.find(archive.prefix) + len(archive.prefix) :]
                if archive.prefix in name and file in wanted:
                    yield file, content.read()
    except DAMAGED as e:
        path.unlink()
        raise ValueError(
            f"{path.name} is damaged and was removed: call again to load it anew"
        ) from e


def unpack(path: Path, archive: Archive, out: Path) -> int:
    """Write the annotated photographs of a downloaded archive to `out`/<source>/; returns how many.

    Raises ValueError, in one sentence, for a damaged archive, which is removed, and for one that
    holds none of them."""
    count = 0
    for file, data in _wanted(path, archive):
        place = out / archive.source / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        count += 1
    if not count:
        what = f"{path.name} holds none of the annotated photographs"
        raise ValueError(f"{what}: it is another archive than ours was, look for a new address")
    return count


def get(name: str, out: Path, keep: bool = False) -> int:
    """Download and unpack one of ARCHIVES; returns how many annotated photographs it gave.

    `photographs.load(split, out)` then reads them. `keep`: do not remove the archive afterwards."""
    archive = ARCHIVES[name]
    out.mkdir(parents=True, exist_ok=True)
    path = out / archive.url.rsplit("/", 1)[1]
    if not path.exists():
        print(f"{archive.url}: about {archive.megabytes} MB, {archive.licence}", flush=True)
        fetch(archive.url, path)
    count = unpack(path, archive, out)
    if not keep:
        path.unlink()
    print(f"{count} annotated photographs in {out / archive.source}")
    return count
