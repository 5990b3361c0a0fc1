"""`realsr eval …`: figures on held-out photographs."""

import argparse
from pathlib import Path


def table(a: argparse.Namespace) -> None:
    import shlex
    import sys
    from datetime import date

    from realsr_r1 import photographs
    from realsr_r1.cli import model_of
    from realsr_r1.evaluation import nano
    from realsr_r1.sampling import Sampling

    photos = photographs.load(a.split, a.photographs)[: a.n]
    model = model_of(a)
    sampling = Sampling(image_temperature=a.temperature)
    rows = nano.measure(model, photos, sampling=sampling, seed=a.seed, batch=a.batch)
    command = shlex.join(["realsr", *sys.argv[1:]])
    note = f"`{command}` ({len(photos)} photographs, {model.device}, {date.today()})"
    nano.write(rows, a.out, note)
    print(a.out.with_suffix(".md").read_text(encoding="utf-8"))


def register(sub) -> None:
    from realsr_r1.cli import add_model, leaf

    text = "measure a model on held-out photographs"
    group = sub.add_parser("eval", help=text, description=text)
    leaves = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    p = leaf(leaves, "table", table, "the chain beside its controls, by severity")
    p.add_argument(
        "--photographs",
        type=Path,
        help="a folder of annotated photographs; those that ship if left out",
    )
    p.add_argument(
        "--split", default="val", choices=("val", "test"), help="test only for the last table"
    )
    p.add_argument("-n", type=int, help="only the first so many photographs")
    p.add_argument("--temperature", type=float, default=0.8, help="of the images' tokens")
    p.add_argument("--batch", type=int, default=48, help="chains at a time")
    p.add_argument(
        "-o", "--out", type=Path, default=Path("results"), help="writes OUT.md and OUT.csv"
    )
    add_model(p)
