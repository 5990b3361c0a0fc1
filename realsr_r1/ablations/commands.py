"""`realsr ablate …`: what happens when a part of the method is left out."""

import argparse
from pathlib import Path

from realsr_r1.files.options import add_model, integer, leaf, model_of, place, real


def chain(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.ablations import chain as ablation
    from realsr_r1.pretraining.recipes import Machine

    model = model_of(a)
    names = ("photographs", "out", "steps", "seed", "lr", "reuse", "hidden", "layers", "warm")
    settings = ablation.Settings(
        **{k: getattr(a, k) for k in names}, variants=tuple(a.variants or ablation.MEASURED)
    )
    machine = Machine(str(model.device), a.batch, a.workers)
    photos = photographs.load(a.split, a.photographs, a.n)
    print(ablation.table(ablation.seeds(model, photos, settings, machine, a.seeds)))


def optimizer(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.ablations import optimizer as ablation
    from realsr_r1.pretraining.recipes import Machine

    model = model_of(a)
    names = ("photographs", "out", "muon", "lr", "minutes", "steps", "seed")
    settings = ablation.Settings(**{k: getattr(a, k) for k in names})
    photos = photographs.load("val", a.photographs, a.n)
    print(ablation.run(model, photos, settings, Machine(str(model.device), a.batch)))


def labels(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.ablations import labels as ablation
    from realsr_r1.common import device_of, seed_of
    from realsr_r1.pretraining.loop import FitConfig, forget, goes_on
    from realsr_r1.pretraining.recipes import Machine

    photos = photographs.load(a.split, a.photographs, a.n)
    said, seed = ablation.said_in(a.table, photos), seed_of("labels", a.seed)
    data = photographs.Pairs(photographs.load("train", a.photographs), seed=seed)
    fit = FitConfig(minutes=a.minutes, steps=a.steps, lr=a.lr, ema=0.99, seed=a.seed)
    machine = Machine(str(device_of(a.device)), a.batch, a.workers)
    goes_on(a.out, {k: getattr(a, k) for k in ("photographs", "batch", "reuse", "seed")})
    namer = ablation.train(data, a.out, machine, fit, a.reuse)
    print(ablation.report(ablation.measure(namer, photos), said))
    forget(a.out)


def names(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.ablations import labels
    from realsr_r1.ablations import names as ablation
    from realsr_r1.common import seed_of

    photos = photographs.load(a.split, a.photographs, a.n)
    said = labels.said_in(a.table, photos, ablation.NAMES)
    seed = seed_of("labels", a.seed)
    namer = ablation.train(photographs.load("train", a.photographs), a.crops, seed=seed)
    rows = ablation.measure(namer, photos)
    print(labels.report(rows, said, "AlexNet and two layers"))


def words(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.ablations import words as ablation
    from realsr_r1.evaluation.words import table

    model = model_of(a)
    names = "photographs out cold steps prompts group lr reuse f1 seed".split()
    settings = ablation.Settings(**{k: getattr(a, k) for k in names})
    photos = photographs.load(a.split, a.photographs, a.n)
    print(table(ablation.run(model, photos, settings)))


def add_chain(p: argparse.ArgumentParser) -> None:
    p.add_argument("--photographs", type=place, help="a folder of annotated photographs")
    p.add_argument("--out", type=place, default=Path("runs/chain"), help="logs and a CSV per seed")
    p.add_argument("--steps", type=integer(), default=600, help="of the chain policy")
    p.add_argument("--seeds", type=integer(), default=3, help="so many, from --seed on")
    text = "controls begin with the model's policy, which is the chain, instead of from scratch"
    p.add_argument("--warm", action="store_true", help=text)
    text = (
        "of 'chain', 'direct, equal pairs', 'direct, equal compute', 'eye alone, equal pairs' and "
        "'chain, 1-D positions'; the first is what others are held to"
    )
    p.add_argument("--variants", nargs="+", help=text)
    p.add_argument("--batch", type=integer(), default=12, help="chains per step")
    p.add_argument("--lr", type=real(), default=3e-3, help="peak learning rate")
    p.add_argument("--reuse", type=integer(), default=1, help="as in realsr train policy")
    p.add_argument("--hidden", type=integer(8), default=224, help="width of the policies")
    p.add_argument("--layers", type=integer(), default=6, help="of the policies")
    p.add_argument("--workers", type=integer(0), default=0, help="processes that prepare data")
    p.add_argument("--split", default="test", choices=("val", "test"), help="what is measured")
    p.add_argument("-n", type=integer(), default=200, help="photographs, spread over the split")
    add_model(p)
    p.set_defaults(policy="policy-sft")  # its controls are fine-tuned alone, too


def add_optimizer(p: argparse.ArgumentParser) -> None:
    p.add_argument("--photographs", type=place, help="a folder of annotated photographs")
    p.add_argument("--out", type=place, default=Path("runs/optimizer"), help="logs, optimizer.csv")
    p.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True, help="or AdamW")
    p.add_argument("--lr", type=real(), default=4e-3, help="peak learning rate")
    p.add_argument("--minutes", type=real(), default=20.0, help="of training")
    p.add_argument("--steps", type=integer(), default=10**9, help="at most so many steps")
    p.add_argument("--batch", type=integer(), default=12, help="chains per step")
    p.add_argument("-n", type=integer(), default=120, help="validation photographs")
    add_model(p)


def add_labels(p: argparse.ArgumentParser) -> None:
    p.add_argument("--photographs", type=place, help="a folder of annotated photographs")
    p.add_argument("--out", type=place, default=Path("runs/labels"), help="log and checkpoint")
    p.add_argument("--minutes", type=real(), default=30.0, help="of training")
    p.add_argument("--steps", type=integer(), default=10**9, help="at most so many steps")
    p.add_argument("--batch", type=integer(), default=32, help="photos per step")
    p.add_argument("--lr", type=real(), default=2e-3, help="peak learning rate")
    p.add_argument("--reuse", type=integer(), default=2, help="how often each pair is used")
    p.add_argument("--workers", type=integer(0), default=0, help="processes that prepare data")
    p.add_argument("--table", type=place, help="a CSV of realsr eval table, to compare with")
    p.add_argument("--split", default="val", choices=("val", "test"), help="what is measured")
    p.add_argument("-n", type=integer(), help="so many photographs, spread over the split")
    p.add_argument("--seed", type=integer(0), default=0, help="of weights and photographs")
    p.add_argument("--device", help="cpu, cuda or mps; the best there is if left out")


def add_names(p: argparse.ArgumentParser) -> None:
    p.add_argument("--photographs", type=place, help="a folder of annotated photographs")
    p.add_argument("--crops", type=integer(), default=18_000, help="damaged ones to learn from")
    p.add_argument("--table", type=place, help="a CSV of realsr eval table, to compare with")
    p.add_argument("--split", default="val", choices=("val", "test"), help="what is measured")
    p.add_argument("-n", type=integer(), help="so many photographs, spread over the split")
    p.add_argument("--seed", type=integer(0), default=0, help="of weights and photographs")


def add_words(p: argparse.ArgumentParser) -> None:
    p.add_argument("--photographs", type=place, help="a folder of annotated photographs")
    p.add_argument("--out", type=place, default=Path("runs/words"), help="logs and policies")
    p.add_argument("--cold", type=integer(), default=100, help="steps of fine-tuning at first")
    p.add_argument("--steps", type=integer(), default=120, help="of GRPO")
    p.add_argument("--prompts", type=integer(), default=8, help="groups per step of GRPO")
    p.add_argument("--group", type=integer(2), default=8, help="chains per group")
    p.add_argument("--lr", type=real(), default=1e-4, help="of GRPO")
    p.add_argument("--reuse", type=integer(), default=1, help="as in realsr train policy")
    text = "understanding as F1, or the paper's recall"
    p.add_argument("--f1", action=argparse.BooleanOptionalAction, default=True, help=text)
    p.add_argument("--split", default="val", choices=("val", "test"), help="what is measured")
    p.add_argument("-n", type=integer(), default=60, help="photographs, spread over the split")
    add_model(p)


def register(sub) -> None:
    text = "leave a part of the method out and measure"
    group = sub.add_parser("ablate", help=text, description=text)
    leaves = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    text = "the chain against the final image alone"
    add_chain(leaf(leaves, "chain", chain, text))
    text = "Muon or AdamW, the same minutes of fine-tuning"
    add_optimizer(leaf(leaves, "optimizer", optimizer, text))
    text = "how well a CNN names the degradation: a yardstick for the chain's first sentence"
    add_labels(leaf(leaves, "labels", labels, text))
    text = "how well frozen AlexNet names subject and background: what has seen more could say"
    add_names(leaf(leaves, "names", names, text))
    text = "whether GRPO makes first words righter than more fine-tuning does, from a short start"
    add_words(leaf(leaves, "words", words, text))
