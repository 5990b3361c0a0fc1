"""`make bench`: speeds measured on this machine, ratios always of runs side by side. Not a test:
nothing is asserted.

    python tests/benchmarks/bench.py [SECTION ...] [--out figures] [--small]

Sections: degradation, sampling, rollouts, grpo, restore, large, growth (none named: all, in this
order). Rows are written as they come (bench.csv), the table (bench.md) and the figure (bench.webp)
are made from them. `--small` is a trial at tiny sizes: its numbers mean nothing. Peers that are not
installed get a row that says what to install.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import peer_degradation
import torch
import torch.nn.functional as F
from PIL import Image
from record import SERIES, Record, side_by_side

from realsr_r1 import degradation, grpo, images, photographs, rewards
from realsr_r1.evaluation import experts, peers
from realsr_r1.pipeline import RealSR
from realsr_r1.planning import budget
from realsr_r1.sampling import Sampling, sample

PHOTO = photographs.ASSETS / "eval" / "scikit-image-astronaut.webp"


@dataclass
class Bench:
    """What the sections share: the record, and the shipped model and pictures, loaded when first
    asked for."""

    record: Record
    small: bool = False

    @property
    def row(self):
        return self.record.row

    @cached_property
    def model(self) -> RealSR:
        return RealSR.from_pretrained("nano", "cpu")

    @cached_property
    def lr(self) -> torch.Tensor:
        data = photographs.Pairs(photographs.load("train"), labels=False)
        return torch.stack([data[i]["lr"] for i in range(4 if self.small else 64)]).float() / 255

    @property
    def repeats(self) -> int:
        return 1 if self.small else 3

    def chains(self, lr: torch.Tensor, copies: int = 1, words: bool = False) -> torch.Tensor:
        """Completions for LR photos at temperature 1; `words`: the first two parts alone."""
        grammar = self.model.policy.grammar(grpo.WORDS) if words else None
        g = torch.Generator().manual_seed(0)
        return sample(self.model.policy, lr, Sampling.rollout(copies), g, grammar).ids


def degradation_section(b: Bench) -> None:
    """Our chain beside Real-ESRGAN's own code, which finds no labels and draws its settings once a
    batch: picture by picture for the variety that ours has, and as one batch. One thread, as in
    a process that prepares data."""
    theirs, threads = peer_degradation.load(), torch.get_num_threads()
    torch.set_num_threads(1)
    for size, n in ((64, 2),) if b.small else ((128, 8), (400, 8)):
        g = torch.Generator().manual_seed(0)
        hr = F.interpolate(
            torch.rand((n, 3, size // 8, size // 8), generator=g), size=size, mode="bicubic"
        ).clamp(0, 1)

        def alone(x: torch.Tensor, g=g) -> torch.Tensor:
            config = degradation.PRESETS["paper"]
            draws = [degradation.draw(tuple(x.shape[-2:]), config, g) for _ in x]
            return degradation.apply(x, draws)

        runs = {
            "one by one": lambda hr=hr, alone=alone: [alone(x[None]) for x in hr],
            "one batch": lambda hr=hr, alone=alone: alone(hr),
            "one batch, with labels": lambda hr=hr, g=g: degradation.degrade(hr, "paper", g),
        }
        if theirs:
            runs |= {
                "theirs, one by one": lambda hr=hr: [theirs(x[None]) for x in hr],
                "theirs, one batch": lambda hr=hr: theirs(hr),
            }
        ms = {k: s / n * 1e3 for k, s in side_by_side(runs, 5 * b.repeats).items()}
        for name, each in ms.items():
            if not name.startswith("theirs"):
                text = f"degradation, one thread, paper preset, {n} of {size} px, {name}"
                b.row(text, f"{each:.1f} ms each")
                continue
            name = name.removeprefix("theirs, ")
            times = f"{each:.1f} ms each: {each / ms[name]:.1f}× our time"
            b.row(f"  Real-ESRGAN's own code, {name}, {size} px", times)
        if not theirs:
            b.row("  Real-ESRGAN's own code", peer_degradation.INSTALL)
    torch.set_num_threads(threads)


def sampling_section(b: Bench) -> None:
    """Tokens per second by batch, and the tokenizer both ways."""
    for batch in (1, 2) if b.small else (1, 16, 64):
        tokens: dict[str, int] = {}

        def run(batch=batch, tokens=tokens) -> None:
            tokens["n"] = b.chains(b.lr[:batch]).numel()

        seconds = side_by_side({"": run}, b.repeats)[""]
        b.row(f"sampled tokens, batch {batch}", f"{tokens['n'] / seconds:.0f} per second")
    codes = torch.zeros(len(b.lr), 16, 16, dtype=torch.long)
    hr = F.interpolate(b.lr, scale_factor=4, mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        runs = {
            "encode": lambda: b.model.tokenizer.encode(hr),
            "decode codes": lambda: b.model.decode(codes),
            "decode codes and LR": lambda: b.model.decode(codes, b.lr),
        }
        for name, s in side_by_side(runs, b.repeats).items():
            b.row(f"tokenizer, {name}, 128 px", f"{len(hr) / s:.0f} images per second")


def rollouts_section(b: Bench) -> None:
    """Whole chains one at a time and together; groups that share their prompt or read it for each
    chain, of whole chains and of first words only."""
    many = 4 if b.small else 16
    runs = {"one": lambda: b.chains(b.lr[:1]), "many": lambda: b.chains(b.lr[:many])}
    s = side_by_side(runs, b.repeats)
    b.row("a sampled chain, one at a time", f"{s['one']:.2f} s")
    b.row(
        f"a sampled chain, {many} together",
        f"{s['many'] / many:.3f} s: {s['one'] * many / s['many']:.1f}× faster",
    )
    sizes = ((2, 8, False), (8, 8, False), (8, 8, True), (2, 16, True))
    for groups, group, words in ((2, 2, False), (2, 2, True)) if b.small else sizes:
        some = b.lr[:groups]
        s = side_by_side(
            {
                "shared": lambda some=some, group=group, words=words: b.chains(some, group, words),
                "anew": lambda some=some, group=group, words=words: b.chains(
                    some.repeat_interleave(group, 0), 1, words
                ),
            },
            b.repeats,
        )
        b.row(
            f"{groups} groups of {group}, {'the first words' if words else 'whole chains'}",
            f"{s['shared']:.1f} s sharing the prompt, {s['anew']:.1f} s reading it for each chain: "
            f"{s['anew'] / s['shared']:.2f}×",
        )


def timed(spent: dict[str, float], owner, **names: str) -> None:
    """Let methods of `owner` (name=label) add the seconds they take to `spent`."""

    def wrap(method: Callable, label: str) -> Callable:
        def run(*arguments, **options):
            started = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                spent[label] = spent.get(label, 0.0) + time.perf_counter() - started

        return run

    for name, label in names.items():
        setattr(owner, name, wrap(getattr(owner, name), label))


def grpo_step(prompts: int, group: int, words: bool) -> tuple[float, float, float, float]:
    """One step: seconds, those of sampling and of the rewards, and the peak memory in GiB."""
    model = RealSR.from_pretrained("nano", "cpu")
    settings = grpo.GrpoSettings(
        steps=1, prompts=prompts, group=group, micro_batch=min(8, group), save_steps=100
    )
    judges = [rewards.format_reward, rewards.degradation_reward, rewards.understanding_reward]
    judges.append(rewards.GenerationReward(experts.load_expert(), model.tokenizer))
    if words:
        settings = replace(settings, parts=grpo.WORDS)
        judges = judges[1:3]
    data = grpo.prompts(photographs.load("train"), prompts)
    with tempfile.TemporaryDirectory() as folder, budget.Meter() as peak:
        trainer = grpo.ChainGRPOTrainer(model.policy, data, judges, Path(folder), settings, "cpu")
        spent: dict[str, float] = {}
        timed(spent, trainer, rollout_func="sampling", _calculate_rewards="rewards")
        started = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - started
    return total, spent["sampling"], spent["rewards"], peak.megabytes * 1e6 / 2**30


def grpo_section(b: Bench) -> None:
    """One GRPO step broken down, as the group grows; each in a process of its own, so that one does
    not inherit another's memory."""
    prompts = 1 if b.small else 2
    for group, words in (
        ((2, True),) if b.small else ((16, True), (4, False), (8, False), (16, False))
    ):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            step = pool.submit(grpo_step, prompts, group, words)
            total, sampling, scoring, gib = step.result()
        passes = total - sampling - scoring
        shares = (
            f"sampling {sampling / total:.0%}, rewards {scoring / total:.0%}, "
            f"forward, backward and rest {passes / total:.0%}"
        )
        b.row(
            f"GRPO step, {prompts} groups of {group}, {'first words' if words else 'whole chains'}",
            f"{total:.1f} s ({shares}), peak memory {gib:.1f} GiB",
        )


def restore_rows(b: Bench, sides: tuple[int, ...]) -> None:
    """A photo of side² LR pixels restored by the chain and by Real-ESRGAN x4plus, once each, after
    a small one to warm up."""
    photo = images.open_photo(PHOTO)
    side = min(photo.size)
    photo = photo.crop((0, 0, side, side))
    runs = {"restore": lambda image: b.model(image, progress=False)}
    if sentence := peers.missing("realesrgan-x4plus"):
        b.row("  Real-ESRGAN x4plus", sentence)
    else:
        enlarge = peers.load("realesrgan-x4plus")
        runs["realesrgan"] = lambda image: enlarge(images.to_tensor(image)[None])
    for run in runs.values():
        run(photo.resize((32, 32)))
    for side in sides:
        lr, seconds = photo.resize((side, side), Image.Resampling.LANCZOS), {}
        megapixels = (4 * side) ** 2 / 1e6
        for name, run in runs.items():
            with budget.Meter() as peak:
                start = time.perf_counter()
                run(lr)
                s = seconds[name] = time.perf_counter() - start
            size = f"{side}×{side} → {4 * side}×{4 * side}"
            what = f"restore {size}" if name == "restore" else f"  Real-ESRGAN x4plus, {size}"
            ratio = "" if name == "restore" else f": our time is {seconds['restore'] / s:.2f}× its"
            result = (
                f"{s:.1f} s, {s / megapixels:.1f} s per output megapixel, peak memory "
                f"{peak.megabytes * 1e6 / 2**30:.1f} GiB{ratio}"
            )
            b.row(what, result, series=name, x=side**2, seconds=s)


def restore_section(b: Bench) -> None:
    restore_rows(b, (32, 40) if b.small else (64, 128, 256))


def large_section(b: Bench) -> None:
    """512 × 512 LR pixels: minutes."""
    restore_rows(b, (48,) if b.small else (512,))


def growth_section(b: Bench) -> None:
    """Seconds as a group grows. Photo size comes from the section restore."""
    for group in (1, 2) if b.small else (1, 2, 4, 8, 16, 32, 64):
        run = {"": lambda group=group: b.chains(b.lr[:1], group)}
        s = side_by_side(run, b.repeats)[""]
        b.row(
            f"a group of {group}",
            f"{s:.2f} s, {s / group:.2f} s per chain",
            series="group",
            x=group,
            seconds=s,
        )


SECTIONS = {
    "degradation": degradation_section,
    "sampling": sampling_section,
    "rollouts": rollouts_section,
    "grpo": grpo_section,
    "restore": restore_section,
    "large": large_section,
    "growth": growth_section,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("figures"),
        help="folder of bench.csv, bench.md and bench.webp",
    )
    parser.add_argument(
        "--small", action="store_true", help="a trial at tiny sizes; give --out a folder of its own"
    )
    a = parser.parse_args(arguments)
    if unknown := set(a.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if a.small and a.out == Path("figures"):
        parser.error("--small would mix its numbers with real ones: give --out a folder of its own")
    torch.manual_seed(0)
    b = Bench(Record(a.out), a.small)
    for name in a.sections or SECTIONS:
        b.record.section = name
        print(f"\n{name}\n| what | result |\n|---|---|", flush=True)
        SECTIONS[name](b)
    b.record.section = "growth"
    for series, k in b.record.write_figure().items():
        what, axis, *_ = SERIES[series]
        xs, _ = b.record.points(series)
        b.row(
            f"exponent: {what}, by {axis}",
            f"{k:.2f} over {len(xs)} sizes, {xs[0]:.0f} to {xs[-1]:.0f}",
        )


if __name__ == "__main__":
    main()
