"""`realsr train …`: the recipes on the command line."""

import argparse
from pathlib import Path


def train(a: argparse.Namespace) -> None:
    from realsr_r1.pretraining import stages

    stages.run(a.what, stages.Settings.of(a))


def register(sub) -> None:
    from realsr_r1.cli import leaf

    text = "train the tokenizer, the policy, or the decoder on the policy's codes"
    group = sub.add_parser("train", help=text, description=text)
    leaves = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    stages = {
        "tokenizer": "encoder, codebook and decoder on crops of photographs",
        "policy": "the policy on true chains (supervised fine-tuning, from scratch)",
        "decoder": "the decoder on codes that the policy draws",
        "all": "the three one after another, sharing the minutes",
    }
    for name, what in stages.items():
        p = leaf(leaves, name, train, what)
        p.add_argument(
            "--photographs",
            type=Path,
            help="a folder of annotated photographs; those that ship if left out",
        )
        p.add_argument(
            "--out", type=Path, default=Path("runs/nano"), help="weights, logs, checkpoints"
        )
        p.add_argument("--minutes", type=float, default=60.0, help="how long; a killed run goes on")
        p.add_argument("--steps", type=int, default=10**9, help="at most so many steps")
        p.add_argument("--init", type=Path, help="a folder of weights to start from")
        p.add_argument(
            "--batch", type=int, help="8 crops or 12 chains on a CPU, 64 or 128 on a GPU"
        )
        p.add_argument("--lr", type=float, help="peak learning rate; each stage has its own")
        p.add_argument("--workers", type=int, help="processes that prepare data")
        p.add_argument("--device", help="cpu, cuda or mps; the best there is if left out")
        p.add_argument("--seed", type=int, default=0, help="of weights and data")
        if name != "policy":
            p.add_argument(
                "--vgg",
                default="",
                help="VGG16 weights for the tokenizer's loss, see perceptual.vgg_features",
            )
