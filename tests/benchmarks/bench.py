"""`make bench`: speeds measured on this machine, ratios always of runs side by side. Not a test:
nothing is asserted.

    python tests/benchmarks/bench.py [SECTION ...] [--out figures] [--small]

Sections: degradation, data, sampling, rollouts, precision, grpo, restore, large, growth (none
named: all, in this order). Rows are written as they come (bench.csv), the table (bench.md) and the
figure (bench.webp) are made from them. `--small` is a trial at tiny sizes: its numbers mean
nothing. Peers that are not installed get a row that says what to install.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import peer_degradation
import peer_sampling
import torch
import torch.nn.functional as F
from PIL import Image
from record import SERIES, Peak, Record, side_by_side
from transformers import PreTrainedModel

from realsr_r1 import images as photos
from realsr_r1 import perceptual
from realsr_r1.evaluation import peers
from realsr_r1.evaluation import results as evaluate
from realsr_r1.first import degradation, experts, grpo, policy, restore, scenes, vlcot
from realsr_r1.first.policy import Sampling
from realsr_r1.first.tokenizer import guided_decode
from realsr_r1.first.vlcot import TAGS, LayoutGrammar
from realsr_r1.first.weights import WEIGHTS

PHOTO = Path(restore.__file__).parents[1] / "assets" / "eval" / "scikit-image-astronaut.webp"
HOW = (
    Sampling.rollout()
)  # text sampled, temperature 1, nothing else: what transformers' generate can do as well


@dataclass
class Bench:
    """What the sections share: the record, and the shipped models and pictures, loaded when first
    asked for."""

    record: Record
    small: bool = False

    @property
    def row(self):
        return self.record.row

    @cached_property
    def models(self) -> restore.Models:
        return restore.load_models("cpu")

    @cached_property
    def pairs(self) -> scenes.Pairs:
        n = 4 if self.small else 64
        return scenes.pairs(range(1_000_000, 1_000_000 + n), "val")

    @cached_property
    def prompts(self) -> torch.Tensor:
        return self.models.policy.vocabulary.prompts(
            self.models.reader.encode(self.pairs.lr.float() / 255)
        )

    @property
    def repeats(self) -> int:
        return 1 if self.small else 3


def chains(
    model: PreTrainedModel, prompts: torch.Tensor, max_new: int | None, **options
) -> torch.Tensor:
    """Completions of the prompts, with equal seeds."""
    return policy.sample(
        model, prompts, HOW, torch.Generator().manual_seed(0), max_new=max_new, **options
    ).ids


def degradation_section(b: Bench) -> None:
    """Our batched chain beside Real-ESRGAN's own code, which draws its settings once a batch:
    picture by picture for the variety that ours has, and as one batch."""
    theirs = peer_degradation.load()
    for size, n in ((64, 2),) if b.small else ((128, 8), (400, 8)):
        g = torch.Generator().manual_seed(0)
        hr = F.interpolate(
            torch.rand((n, 3, size // 8, size // 8), generator=g), size=size, mode="bicubic"
        ).clamp(0, 1)
        runs = {"ours": lambda hr=hr, g=g: degradation.degrade(hr, "paper", g)}
        if theirs:
            runs |= {
                "one by one": lambda hr=hr: [theirs(x[None]) for x in hr],
                "one batch": lambda hr=hr: theirs(hr),
            }
        seconds = {k: s / n for k, s in side_by_side(runs, 3 * b.repeats).items()}
        ours = seconds.pop("ours")
        b.row(f"degradation, paper preset, {n} of {size} px", f"{ours * 1e3:.1f} ms an image")
        for name, s in seconds.items():
            b.row(
                f"  Real-ESRGAN's own code, {name}, {size} px",
                f"{s * 1e3:.1f} ms an image: {s / ours:.1f}× our time",
            )
        if not theirs:
            b.row("  Real-ESRGAN's own code", peer_degradation.INSTALL)


def data_section(b: Bench) -> None:
    """Fresh scenes, and the tokenizer both ways."""
    n = 4 if b.small else 50
    start = [10_000]

    def fresh() -> None:
        start[0] += n  # new seeds each time: nothing is cached
        scenes.stack(range(start[0], start[0] + n))

    b.row("scenes", f"{n / side_by_side({'': fresh}, b.repeats)['']:.0f} a second")
    hr, vq = b.pairs.hr.float() / 255, b.models.tokenizer
    with torch.no_grad():
        codes = vq.encode(hr)
        seconds = side_by_side(
            {"encode": lambda: vq.encode(hr), "decode": lambda: vq.decode(codes)}, b.repeats
        )
    for name, s in seconds.items():
        b.row(f"tokenizer, {name} 128 px", f"{len(hr) / s:.0f} images a second")


def sampling_section(b: Bench) -> None:
    """The same policy and the same number of words: our sampling with and without the grammar,
    transformers' generate, and generate with a layout processor that works row by row."""
    model, new = b.models.policy, 24 if b.small else 200
    for batch in (1, 2) if b.small else (1, 16, 64):
        words: dict[str, int] = {}
        prompts = b.prompts[:batch]

        def ours(grammar: bool, prompts=prompts):
            return chains(model, prompts, new, use_grammar=grammar)

        def timed(name: str, sample, words=words):
            return lambda: words.update({name: sample().numel()})

        per_row = peer_sampling.PerRowLayout(model.vocabulary)
        runs = {
            "with the grammar": timed("with the grammar", lambda ours=ours: ours(True)),
            "without": timed("without", lambda ours=ours: ours(False)),
            "generate": timed(
                "generate", lambda prompts=prompts: peer_sampling.generate(model, prompts, new)
            ),
            "per row": timed(
                "per row",
                lambda prompts=prompts, p=per_row: peer_sampling.generate(model, prompts, new, p),
            ),
        }
        cost = {k: s / words[k] for k, s in side_by_side(runs, b.repeats).items()}
        with_it = cost["with the grammar"]
        b.row(
            f"sampled words, batch {batch}",
            f"{1 / with_it:.0f} a second with the grammar, {1 / cost['without']:.0f} without: "
            f"overhead {with_it / cost['without'] - 1:+.0%}",
        )
        b.row(
            f"  transformers' generate, batch {batch}",
            f"{1 / cost['generate']:.0f} a second: {cost['generate'] / with_it:.2f}× our time",
        )
        b.row(
            f"  generate, layout row by row, batch {batch}",
            f"{1 / cost['per row']:.0f} a second: {cost['per row'] / with_it:.2f}× our time; "
            f"the processor adds {cost['per row'] / cost['generate'] - 1:+.0%} to generate",
        )


def rollouts_section(b: Bench) -> None:
    """Whole chains: one at a time, sixteen together, all together; and groups that share their
    prompt or read it for each chain, of whole chains and of first texts only."""
    new, many, group = (24, 4, 2) if b.small else (None, 16, 8)

    def run(rows: torch.Tensor, copies: int = 1, new: int | None = new):
        return lambda: chains(b.models.policy, rows, new, copies=copies)

    p = b.prompts
    runs = {"one": run(p[:1]), "many": run(p[:many])} | ({} if b.small else {"step": run(p)})
    s = side_by_side(runs, b.repeats)
    b.row("a sampled chain, one at a time", f"{s['one']:.2f} s")
    for name, n in {"many": many, "step": len(p)}.items():
        if name in s:
            b.row(
                f"a sampled chain, {n} together",
                f"{s[name] / n:.3f} s: {s['one'] * n / s[name]:.1f}× faster",
            )
    for groups, words in ((2, new), (2, 8)) if b.small else ((2, None), (8, None), (8, 40)):
        each = p[:groups].repeat_interleave(group, 0)
        s = side_by_side(
            {"shared": run(p[:groups], group, words), "anew": run(each, new=words)}, b.repeats
        )
        ratio = s["anew"] / s["shared"]
        what = (
            f"{s['shared']:.1f} s sharing the prompt, {s['anew']:.1f} s reading it for each "
            f"chain: {ratio:.2f}×"
        )
        b.row(
            f"{groups} groups of {group}, "
            f"{f'the first {words} words' if words else 'whole chains'}",
            what,
        )


def precision_section(b: Bench) -> None:
    """What half precision and torch.compile bring to restoring, and what half precision costs in
    LPIPS."""
    m, lr, hr = b.models, b.pairs.lr.float() / 255, b.pairs.hr.float() / 255
    said: dict[str, torch.Tensor] = {}

    def run(name: str):
        g = torch.Generator().manual_seed(0)
        ids = policy.sample(m.policy, b.prompts, Sampling(), g, bfloat16=name == "bfloat16").ids
        said[name] = torch.stack(
            [vlcot.parse(m.policy.vocabulary.decode(row)).final_image for row in ids]
        )

    s = side_by_side({name: lambda name=name: run(name) for name in ("float32", "bfloat16")}, 1)

    def decode(codes, guided=m.guided):
        return guided_decode(guided, m.tokenizer, codes, lr)

    with torch.no_grad():
        away = {
            name: perceptual.distance(decode(codes), hr).numpy() for name, codes in said.items()
        }
        mean, low, high = evaluate.bootstrap(away["bfloat16"] - away["float32"])
        b.row(
            f"{len(lr)} chains sampled in bfloat16",
            f"{s['float32'] / s['bfloat16']:.2f}× faster than in float32; LPIPS {mean:+.4f} "
            f"[{low:+.4f}, {high:+.4f}]",
        )
        started = time.perf_counter()
        compiled = torch.compile(m.guided)
        try:
            decode(said["float32"], compiled)
        except Exception as e:  # no C++ compiler, or a torch that cannot
            b.row(
                "guided decode, compiled", f"torch.compile does not work here: {type(e).__name__}"
            )
            return
        once = time.perf_counter() - started
        s = side_by_side(
            {
                "eager": lambda: decode(said["float32"]),
                "compiled": lambda: decode(said["float32"], compiled),
            },
            b.repeats,
        )
        b.row(
            f"guided decode of {len(lr)} tiles, compiled",
            f"{s['compiled']:.2f} s, eager {s['eager']:.2f} s; compiling took {once:.0f} s",
        )


def timed(spent: dict[int, float], step: Callable[[], int], owner, *names: str) -> None:
    """Let these methods of `owner` add the seconds they take to `spent` of the present step; calls
    inside calls count once."""

    def wrap(method):
        def run(*arguments, **options):
            inside, timed.inside, started = timed.inside, True, time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                timed.inside = inside
                if not inside:
                    spent[step()] = spent.get(step(), 0) + time.perf_counter() - started

        return run

    for name in names:
        setattr(owner, name, wrap(getattr(owner, name)))


timed.inside = False


def grpo_step(
    prompts: int, group: int, words: int | None
) -> tuple[float, float, float, float, float]:
    """The second step of a run: seconds, those of sampling, of the rewards, and of forward and
    backward passes (the reference's too), and the process's peak memory in GiB."""
    models, expert = restore.load_models("cpu"), experts.load_expert()
    settings = grpo.GrpoSettings(
        steps=2,
        prompts=prompts,
        group=group,
        micro_batch=min(8, group),
        words=words,
        save_steps=100,
    )
    functions, _ = grpo.named_rewards(grpo.PAPER_REWARDS, models.tokenizer, expert)
    dataset = grpo.prompts(range(600_000, 600_004), models.reader, models.policy.vocabulary)
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        out = Path(folder) / "p"
        trainer, spent = (
            grpo.make_trainer(
                WEIGHTS / "policy-sft", dataset, functions, out, settings, device="cpu"
            ),
            {},
        )
        step = lambda: trainer.state.global_step  # noqa: E731
        timed(spent, step, trainer, "compute_loss", "_get_per_token_logps_and_entropies")
        timed(spent, step, trainer.accelerator, "backward")
        trainer.train()
        with out.with_suffix(".csv").open() as f:
            last = [r for r in csv.DictReader(f) if r.get("reward")][-1]
    return (
        *(float(last[f"seconds/{k}"]) for k in ("step", "sampling", "rewards")),
        spent[1],
        peak.gib,
    )


def grpo_section(b: Bench) -> None:
    """One GRPO step broken down, with peak memory, as the group and the chain grow; each in a
    process of its own, so that one does not inherit another's memory."""
    prompts = 1 if b.small else 2
    for group, words in (
        ((2, 24),)
        if b.small
        else ((8, 40), (8, 100), (8, 200), (2, None), (4, None), (8, None), (16, None))
    ):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            total, sampling, scoring, passes, gib = pool.submit(
                grpo_step, prompts, group, words
            ).result()
        rest = total - sampling - scoring - passes
        shares = (
            f"sampling {sampling / total:.0%}, forward and backward {passes / total:.0%}, "
            f"rewards {scoring / total:.0%}, other {rest / total:.0%}"
        )
        chain = f"the first {words} words of each chain" if words else "whole chains"
        b.row(
            f"GRPO step, {prompts} groups of {group}, {chain}",
            f"{total:.1f} s ({shares}), peak memory {gib:.1f} GiB",
        )


def restore_rows(b: Bench, sides: tuple[int, ...]) -> None:
    """A photo of side² LR pixels restored by the chain and by Real-ESRGAN x4plus, once each, after
    a small one to warm up."""
    photo = photos.open_photo(PHOTO)
    side = min(photo.size)
    photo = photo.crop((0, 0, side, side))
    runs = {"restore": lambda image: restore.restore(image, b.models, progress=False)}
    if sentence := peers.missing("realesrgan-x4plus"):
        b.row("  Real-ESRGAN x4plus", sentence)
    else:
        enlarge = peers.load("realesrgan-x4plus")
        runs["realesrgan"] = lambda image: enlarge(photos.to_tensor(image)[None])
    for run in runs.values():
        run(photo.resize((32, 32)))
    for side in sides:
        lr, seconds = photo.resize((side, side), Image.Resampling.LANCZOS), {}
        megapixels = (4 * side) ** 2 / 1e6
        for name, run in runs.items():
            with Peak() as peak:
                start = time.perf_counter()
                run(lr)
                s = seconds[name] = time.perf_counter() - start
            size = f"{side}×{side} → {4 * side}×{4 * side}"
            what = f"restore {size}" if name == "restore" else f"  Real-ESRGAN x4plus, {size}"
            ratio = "" if name == "restore" else f": our time is {seconds['restore'] / s:.2f}× its"
            result = (
                f"{s:.1f} s, {s / megapixels:.1f} s an output megapixel, peak memory "
                f"{peak.gib:.1f} GiB{ratio}"
            )
            b.row(what, result, series=name, x=side**2, seconds=s)


def restore_section(b: Bench) -> None:
    restore_rows(b, (32, 40) if b.small else (64, 128, 256))


def large_section(b: Bench) -> None:
    """512 × 512 LR pixels, 441 tiles: minutes."""
    restore_rows(b, (48,) if b.small else (512,))


def growth_section(b: Bench) -> None:
    """Seconds as a group and a chain grow. The long chain is the seven parts four times over, by a
    policy of the shipped shape with random weights: what is timed does not depend on them. Photo
    size comes from the section restore."""
    new = 16 if b.small else None
    for group in (1, 2) if b.small else (1, 2, 4, 8, 16, 32, 64):
        s = side_by_side(
            {"": lambda group=group: chains(b.models.policy, b.prompts[:1], new, copies=group)},
            b.repeats,
        )[""]
        b.row(
            f"a group of {group}",
            f"{s:.2f} s, {s / group:.2f} s a chain",
            series="group",
            x=group,
            seconds=s,
        )
    times = 4
    nano = b.models.policy.nano
    model = policy.build(
        replace(nano, sizes=nano.sizes * times)
    ).eval()  # these sizes only make room for the positions
    grammar = LayoutGrammar(model.vocabulary, nano.sizes, TAGS * times, nano.max_words)
    for words in (16, 32) if b.small else (100, 200, 400, 800, 1600):
        s = side_by_side(
            {"": lambda words=words: chains(model, b.prompts[:4], words, grammar=grammar)},
            b.repeats,
        )[""]
        b.row(
            f"4 chains of {words} words",
            f"{s:.2f} s, {s / words * 1e3:.1f} ms a word",
            series="chain",
            x=words,
            seconds=s,
        )


SECTIONS = {
    "degradation": degradation_section,
    "data": data_section,
    "sampling": sampling_section,
    "rollouts": rollouts_section,
    "precision": precision_section,
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
