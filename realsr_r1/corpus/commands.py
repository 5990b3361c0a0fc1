"""`realsr data …`: photographs to train and measure on."""

import argparse
from pathlib import Path

NAMES = ("flowers", "caltech101", "pets")


def get(a: argparse.Namespace) -> None:
    from realsr_r1.corpus import download

    for name in a.names:
        download.get(name, a.out, a.keep)


def register(sub) -> None:
    from realsr_r1.cli import leaf

    text = "photographs to train and measure on"
    group = sub.add_parser("data", help=text, description=text)
    leaves = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    p = leaf(leaves, "get", get, "download the public data sets that the annotations are for")
    p.add_argument("names", nargs="+", choices=NAMES, help="229, 137 and 792 MB")
    p.add_argument("--out", type=Path, default=Path("photographs"), help="the folder they go to")
    p.add_argument("--keep", action="store_true", help="keep the archives, too")
