"""`realsr train …`: the recipes on the command line."""

import argparse
from dataclasses import replace
from pathlib import Path

from realsr_r1.files.options import filled, integer, leaf, place, real

REWARDS = ("format", "degradation", "understanding", "generation", "reference", "place")


def train(a: argparse.Namespace) -> None:
    from realsr_r1.pretraining import stages

    stages.run(a.what, stages.Settings.of(a))


def grpo(a: argparse.Namespace) -> None:
    from realsr_r1.grpo import WORDS, GrpoSettings
    from realsr_r1.pretraining import stages

    numbers = ("steps", "prompts", "group", "micro_batch", "lr", "beta", "seed")
    settings = GrpoSettings(**{k: getattr(a, k) for k in numbers}, by_part=not a.whole_chain)
    names = a.rewards or list(REWARDS[1:3] if a.words else REWARDS[:4])
    if a.words:
        settings = replace(settings, parts=WORDS)
        if images := sorted({"format", "generation", "reference", "place"} & set(names)):
            raise ValueError(f"words alone cannot earn {' or '.join(images)}: leave them out")
    if "place" in names and (len(names) > 1 or a.whole_chain):
        raise ValueError("the reward place gives each code its own credit: ask for it alone")
    stages.reinforce(a.model, a.photographs, names, a.out, settings, a.device)


def add_grpo(leaves) -> None:

    p = leaf(leaves, "grpo", grpo, "reinforcement learning: groups of chains, four rewards")
    text = "where to start: a name, a folder, a hub id"
    p.add_argument("--model", type=filled, default="nano", help=text)
    p.add_argument("--photographs", type=place, help="as in the other leaves")
    p.add_argument(
        "--out",
        type=place,
        default=Path("runs/nano"),
        help="gets policy-grpo, which restore then uses, and a log",
    )
    p.add_argument(
        "--rewards",
        nargs="+",
        choices=REWARDS,
        help="which rewards; if left out the paper's four, with --words the two on words. Two know "
        "the truth: reference, LPIPS of the picture; place, alone, that of each code's region",
    )
    p.add_argument("--steps", type=integer(), default=40, help="a killed run goes on")
    p.add_argument("--prompts", type=integer(), default=4, help="LR photos per step")
    p.add_argument("--group", type=integer(), default=8, help="chains per LR photo")
    p.add_argument("--micro-batch", type=integer(), default=8, help="chains in one backward pass")
    p.add_argument("--lr", type=real(), default=2e-4, help="learning rate")
    p.add_argument(
        "--beta", type=real(zero=True), default=0.02, help="weight of the KL to the start"
    )
    p.add_argument("--words", action="store_true", help="only the first words, without images")
    p.add_argument("--whole-chain", action="store_true", help="every reward on every token")
    p.add_argument("--seed", type=integer(0), default=0, help="of photos and chains")
    p.add_argument("--device", help="cpu, cuda or mps; the best there is if left out")


def expert(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.common import seed_of
    from realsr_r1.corpus.folders import alone
    from realsr_r1.pipeline import RealSR
    from realsr_r1.pretraining import expert as training
    from realsr_r1.pretraining.loop import FitConfig, goes_on

    model = RealSR.from_pretrained(a.model, a.device, "policy-sft")
    photos = photographs.load("train", a.photographs)
    seed = seed_of("expert", a.seed)
    fit = FitConfig(10**6, a.steps, lr=1e-3, warmup=50, ema=0.99, seed=a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    with alone(a.out, "training"):
        goes_on(a.out, {k: getattr(a, k) for k in ("model", "photographs", "n", "seed")})
        bank = training.make_bank(model, photographs.Pairs(photos, seed=seed), a.n, seed)
        judge = training.train_expert(bank, a.out, fit)
    held_out = photographs.load("val", a.photographs, 60)
    data = photographs.Pairs(held_out, training=False)
    found = training.agreement(judge, training.make_bank(model, data, len(held_out)))
    print(f"rank correlation with LPIPS among a photo's own chains, val: {found.mean():.2f}")


def add_expert(leaves) -> None:
    p = leaf(leaves, "expert", expert, "the visual expert, by ranking pictures, drawn ones too")
    p.add_argument("--model", type=filled, default="nano", help="whose pictures it learns to judge")
    p.add_argument("--photographs", type=place, help="as in the other leaves")
    text = "expert.safetensors and its log"
    p.add_argument("--out", type=place, default=Path("runs/expert"), help=text)
    p.add_argument(
        "-n", type=integer(), default=400, help="photographs in its bank, 26 pictures each"
    )
    p.add_argument("--steps", type=integer(), default=1500, help="of training")
    p.add_argument("--device", help="where the pictures are drawn; it learns on the CPU")
    p.add_argument("--seed", type=integer(0), default=0, help="of photos, pictures and weights")


def add_stage(p: argparse.ArgumentParser, name: str) -> None:
    p.add_argument(
        "--photographs",
        type=place,
        help="a folder of annotated photographs; those that ship if left out",
    )
    p.add_argument(
        "--out", type=place, default=Path("runs/nano"), help="weights, logs, checkpoints"
    )
    p.add_argument("--minutes", type=real(), default=60.0, help="how long; a killed run goes on")
    p.add_argument("--steps", type=integer(), default=10**9, help="at most so many steps")
    first = " (the tokenizer alone)" if name == "all" else ""
    p.add_argument("--init", type=place, help=f"a folder of weights to start from{first}")
    p.add_argument(
        "--batch", type=integer(), help="8 crops or 12 chains on a CPU, 64 or 128 on a GPU"
    )
    p.add_argument("--lr", type=real(), help="peak learning rate; each stage has its own")
    p.add_argument("--workers", type=integer(0), help="processes that prepare data")
    p.add_argument("--device", help="cpu, cuda or mps; the best there is if left out")
    p.add_argument("--seed", type=integer(0), default=0, help="of weights and data")
    if name in ("policy", "all"):
        text = "how often the policy sees each pair: on a GPU, 5 keeps up with 16 cores"
        p.add_argument("--reuse", type=integer(), default=1, help=text)
    if name in ("ending", "all"):
        text = "whose clean pictures the ending learns from: one that `realsr peers` lists"
        p.add_argument("--teacher", default="realesrgan-x4plus", help=text)
    if name not in ("policy", "ending"):
        p.add_argument(
            "--vgg",
            default="",
            help="VGG16 weights for the tokenizer's loss, see losses.vgg_features",
        )


def register(sub) -> None:
    text = "train the networks, stage by stage or all, the visual expert, or by GRPO"
    group = sub.add_parser("train", help=text, description=text)
    leaves = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    stages = {
        "tokenizer": "encoder, codebook and decoder on crops of photographs",
        "policy": "the policy on true chains (supervised fine-tuning, from scratch)",
        "decoder": "the decoder on codes that the policy draws",
        "ending": "a second ending of the decoder, for clean pictures",
        "all": "the four one after another, sharing the minutes",
    }
    for name, what in stages.items():
        add_stage(leaf(leaves, name, train, what), name)
    add_expert(leaves)
    add_grpo(leaves)
