"""Mutated picture files through the one reader: it opens them or says one sentence.

    python tests/benchmarks/fuzz.py --files 50000 -o figures/fuzz.md

Files of ten formats are cut short, overwritten, doubled and swapped at random places. Each is read
in a process with 2 GB of memory that is stopped after 10 s a file.
"""

import argparse
import collections
import io
import multiprocessing
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from realsr_r1.images import read

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "TGA")


def originals() -> list[tuple[str, bytes]]:
    """Small pictures in every format, in several modes, with EXIF and profile where they fit."""
    g, found = np.random.default_rng(0), []
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    for shape in ((24, 32, 3), (24, 32, 4), (24, 32)):  # RGB, RGBA, gray
        image = Image.fromarray(g.integers(0, 256, shape, dtype=np.uint8))
        for kind in FORMATS:
            out = io.BytesIO()
            try:
                image.save(out, kind, exif=exif)
            except (OSError, ValueError):
                continue
            found.append((kind, out.getvalue()))
    deep = Image.fromarray(g.integers(0, 65536, (24, 32), dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        out = io.BytesIO()
        deep.save(out, kind)
        found.append((kind, out.getvalue()))
    return found


def mutated(data: bytes, r: random.Random) -> bytes:
    """A few random changes."""
    x = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 4, 16))):
        at, n = r.randrange(len(x)), r.choice((1, 2, 4, 32))
        kind = r.randrange(5)
        if kind == 0:
            x[at : at + n] = bytes(r.randrange(256) for _ in range(n))
        elif kind == 1:
            x[at : at + n] = r.choice((b"\0", b"\xff", b"\x7f")) * n
        elif kind == 2:
            del x[at : at + n]
        elif kind == 3:
            x[at:at] = x[at : at + n]
        elif r.random() < 0.2:
            del x[at:]
        if not x:
            return bytes(data[:1])
    return bytes(x)


class Late(BaseException):
    """A file took too long; no `except Exception` of a reader may take it for a bad file."""


def work(order: tuple[int, int]) -> collections.Counter:
    """Read some mutated files; what became of them, by format."""
    seed, n = order
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
    warnings.simplefilter("ignore")
    r, files, found = random.Random(seed), originals(), collections.Counter()

    def late(*_) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    for _ in range(n):
        kind, data = r.choice(files)
        signal.alarm(10)
        started = time.monotonic()
        try:
            read(mutated(data, r))
            found[kind, "opened"] += 1
        except ValueError as e:
            found[kind, "one sentence" if "\n" not in str(e) else "many lines"] += 1
        except BaseException as e:
            found[kind, f"escaped: {type(e).__name__}"] += 1
        found["slowest", round(time.monotonic() - started, 1)] += 1
        signal.alarm(0)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--files", type=int, default=50_000)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("-o", "--out", type=Path)
    a = p.parse_args()
    each, total, died = 2500, collections.Counter(), 0
    for first in range(0, a.files, each * a.workers):
        seeds = range(first, min(first + each * a.workers, a.files), each)
        with multiprocessing.get_context("spawn").Pool(a.workers) as pool:
            jobs = [pool.apply_async(work, ((s, min(each, a.files - s)),)) for s in seeds]
            for job in jobs:
                try:
                    total += job.get(timeout=600)
                except multiprocessing.TimeoutError:  # the process was killed by a decoder
                    died += 1
    slowest = max((k[1] for k in total if k[0] == "slowest"), default=0)
    outcomes = sorted({k[1] for k in total if k[0] != "slowest"})
    rows = ["| format | " + " | ".join(outcomes) + " |", "|---|" + "---|" * len(outcomes)]
    for kind in FORMATS:
        rows.append(f"| {kind} | " + " | ".join(str(total[kind, o]) for o in outcomes) + " |")
    n = sum(v for k, v in total.items() if k[0] != "slowest")
    rows += ["", f"{n:,} files; slowest {slowest} s; processes that died: {died}."]
    head = "Picture files cut short, overwritten, doubled and swapped at random places: the reader "
    head += "refuses each with one sentence, or opens it.\n\n"
    text = head + "\n".join(rows) + "\n"
    print(text)
    if a.out:
        a.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
