"""`realsr data …`: photographs to train and measure on; `realsr annotate`: captions of own ones."""

import argparse
import os
from pathlib import Path

from realsr_r1.files.options import integer, leaf, place

NAMES = ("flowers", "caltech101", "pets")
SPLITS = ("train", "val", "test")  # as in photographs, which loads torch


def get(a: argparse.Namespace) -> None:
    from realsr_r1.corpus import download

    for name in dict.fromkeys(a.names):
        download.get(name, a.out, a.keep)


def shards(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.corpus import shards

    photos = [
        p for s in dict.fromkeys(a.split or SPLITS) for p in photographs.load(s, a.photographs)
    ]
    files = shards.write_shards(photos, a.out, a.per_file)
    print(f"{len(photos)} photographs in {len(files)} files: use them with --photographs {a.out}")


def annotate(a: argparse.Namespace) -> None:
    # Read once, when the hub's client is imported.
    os.environ["HF_HUB_OFFLINE"] = "0" if a.download else "1"
    from realsr_r1.common import device_of
    from realsr_r1.corpus import annotate, captioners, folders

    device, shard = device_of(a.device), annotate.shard_of(a.shard)
    folders.photo_files(a.folder)  # a wrong path is told before large models load
    if a.masks:
        annotate.check_masks(a.folder, a.masks)
        if (a.model, a.tagger) == ("qwen2.5-vl", "none"):
            raise ValueError("masks need boxes, which qwen2.5-vl has not: add a --tagger")
    for out in filter(None, (a.out, a.masks)):  # so is a place where nothing can be
        out.mkdir(parents=True, exist_ok=True)
    captioner = captioners.load(a.model, a.weights, device, a.download)
    if a.tagger != "none":
        tagger = captioners.load(a.tagger, a.tagger_weights, device, a.download)
        captioner = captioners.Pair(captioner, tagger)
    sam = captioners.load("sam", a.sam_weights, device, a.download) if a.masks else None
    count = annotate.annotate(a.folder, captioner, a.out, shard, a.batch, a.limit)
    print(
        f"{count['new']} photos noted, {count['known']} were noted before, {count['left out']} "
        f"left out"
    )
    if sam:
        print(f"{annotate.outline(a.folder, sam, a.masks, a.out, shard)} masks drawn")


def add_annotate(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("folder", type=place, help="your photos, searched in depth")
    add("-o", "--out", type=place, help="where captions.jsonl goes; the photos' own if left out")
    add("--model", choices=("florence-2", "qwen2.5-vl"), default="florence-2", help="who captions")
    add("--weights", help="its folder or hub name, instead of the usual one")
    text = "who names the things; none: the captioner itself"
    add("--tagger", choices=("none", "grounding-dino"), default="none", help=text)
    add("--tagger-weights", help="its folder or hub name, instead of the usual one")
    text = "where SAM's masks of the things go; needs boxes, of florence-2 or grounding-dino"
    add("--masks", type=place, help=text)
    add("--sam-weights", help="its folder or hub name, instead of the usual one")
    add("--shard", default="0/1", help="this process's share, e.g. 0/4, the first of four")
    add("--batch", type=integer(), default=8, help="photos at a time")
    add("--limit", type=integer(), help="photos at most")
    add("--device", help="cpu, cuda or mps; the best there is if left out")
    add("--download", action="store_true", help="fetch missing weights from the hub")


def register(sub) -> None:

    text = "captions and tags for your own photos, by pretrained models; goes on after a kill"
    add_annotate(leaf(sub, "annotate", annotate, text))
    text = "photographs to train and measure on"
    group = sub.add_parser("data", help=text, description=text)
    leaves = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    p = leaf(leaves, "get", get, "download the public data sets that the annotations are for")
    p.add_argument("names", nargs="+", choices=NAMES, help="229, 137 and 792 MB")
    p.add_argument("--out", type=place, default=Path("photographs"), help="the folder they go to")
    p.add_argument("--keep", action="store_true", help="keep the archives, too")
    p = leaf(leaves, "shards", shards, "pack annotated photographs into parquet files to stream")
    p.add_argument("out", type=place, help="the folder they go to")
    p.add_argument("--photographs", type=place, help="a folder; the shipped ones if left out")
    p.add_argument("--split", nargs="+", choices=SPLITS, help="which; all if left out")
    p.add_argument("--per-file", type=integer(), default=1000, help="photographs in a file")
