"""What fits where, what the paper's recipe costs, and measured peaks beside the counted ones.

`realsr cost` prints one run's memory; with --table all tables, with --measure the comparison.
Tables are counts (`cost`), except the measured column: there the real trainers ran in a process of
their own.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.optim.swa_utils import AveragedModel
from transformers import AutoConfig

from realsr_r1 import grpo, sft
from realsr_r1.planning.cost import (
    CARDS,
    GB,
    HEADROOM,
    Card,
    Memory,
    Run,
    Shape,
    chain_tokens,
    chameleon,
    memory,
    nano,
    qwen3,
    require,
    seconds,
)
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.pretraining.muon import MuonAdamW

# The reference chain at its longest: the limits of the release's RL script (prompt 5,000,
# completion 7,000 words).
REFERENCE = {"prompt": 5_000, "completion": 7_000, "precision": "bfloat16", "checkpointing": True}
PNG = 1.6  # bytes a pixel


def plans() -> dict[str, tuple[Shape, Run]]:
    """Runs whose fit is tabled. nano and 0.4 B (Qwen3-0.6B with our vocabulary): this project's
    chain with 20 words a text; 7 B: the paper's chain."""
    p, c = chain_tokens()
    middle, ours = qwen3(PolicyConfig().vocab_size), {"checkpointing": True, "fused": False}
    shards = REFERENCE | {"sharded": True}
    lora, seven = REFERENCE | {"lora": 16}, chameleon()
    groups = Run("grpo", p, c, 4, 4, 2, 8, **ours)
    return {
        "nano, SFT, batch 64": (nano(), Run("sft", p, c, 64, optimizer="muon", average=True)),
        "nano, GRPO, 4 × 8, micro-batch 8": (nano(), Run("grpo", p, c, 8, 4, 4, 8, fused=False)),
        "0.4 B, SFT, all weights, batch 4": (middle, Run("sft", p, c, 4, average=True, **ours)),
        "0.4 B, GRPO, all weights, KL, 2 × 8, micro-batch 4": (middle, groups),
        "7 B, SFT, LoRA": (seven, Run("sft", **lora)),
        "7 B, GRPO, LoRA, group 5": (seven, Run("grpo", **lora, group=5, accumulate=5)),
        "7 B, SFT, all weights, FSDP2 or ZeRO-3": (seven, Run("sft", **shards)),
        "7 B, GRPO, all weights, sharded, group 8": (seven, Run("grpo", **shards, reference=False)),
        "the same, KL and offload": (seven, Run("grpo", **shards, offload=True)),
    }


def fits(need: Memory, card: Card) -> bool:
    return need.peak <= card.bytes * (1 - HEADROOM)


def fit_table(cards: tuple[Card, ...] = CARDS) -> str:
    """Markdown: whether each plan fits on each card, and the GB (2^30 bytes) a device needs.
    Sharded plans use all devices of a card's row."""
    rows = [
        f"| run (peak GB a device) | {' | '.join(c.name for c in cards)} |",
        f"|---|{'---|' * len(cards)}",
    ]
    for name, (shape, run) in plans().items():
        cells = []
        for card in cards:
            need = memory(shape, replace(run, devices=card.devices) if run.sharded else run)
            host = f" (host {need.host / GB:.0f})" if need.host else ""
            cells.append(f"{'yes' if fits(need, card) else 'no'}, {need.peak / GB:.1f}{host}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def recipe(
    photos: int = 95_000, rl_photos: int = 500, price: float = 3.0, utilization: float = 0.35
) -> str:
    """Markdown: time, money and storage of the paper's recipe with the 7 B model on one row of
    cards.

    From the release: cold start of 2 epochs, RL of 2 epochs with groups of 5, chains at their
    limits. Not published and hence the caller's: the number of cold-start photos (default: LSDIR
    and 10 k FFHQ, PURE's data), of RL photos (the release's folder is named test500), the `price` a
    card and hour, and the `utilization` of the card's peak.
    """
    shape, epochs, card = chameleon(), 2, CARDS[-1]
    cold = Run("sft", **REFERENCE, sharded=True, devices=card.devices)
    rl = Run("grpo", **REFERENCE, group=5, reference=False)
    rows = ["| part | chains | hours on " + card.name + " | money |", "|---|---|---|---|"]
    for name, run, chains in (
        ("cold start", cold, photos * epochs),
        ("VLCoT-GRPO", rl, rl_photos * epochs * 5),
    ):
        step = sum(seconds(shape, run, card, utilization).values())
        step /= 5 if run.phase == "grpo" else 1
        hours = step * chains / card.devices / 3600
        rows.append(f"| {name} | {chains:,} | {hours:,.0f} | {hours * card.devices * price:,.0f} |")
    # A photo as PNG (`PNG` bytes a pixel: the shipped evaluation photos' mean), 11,000 tokens of
    # int32, 800 bytes of text.
    need = {"photos": PNG * 512**2, "tokens": 11_000 * 4.0, "captions": 800.0}
    text = ", ".join(f"{k} {photos * v / 1e9:,.1f} GB" for k, v in need.items())
    text = f"Storage for {photos:,} photos of 512 px: {text}; a checkpoint with optimizer"
    return "\n".join([*rows, "", f"{text} {14 * shape.parameters / 1e9:,.0f} GB."])


class Meter:
    """Peak megabytes inside a `with` block, above what the process held `before` the method was
    loaded: the system's own count on Linux, elsewhere looked at every 20 ms; of the allocator on
    CUDA, where the method uses it."""

    def __init__(self, before: float = 0):
        self.before = before

    @staticmethod
    def held() -> int:
        """Bytes that the process holds now, garbage collected and freed memory given back (on
        glibc), so that it is no gift to the next method."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
        if trim:
            trim(0)
        return psutil.Process().memory_info().rss

    def __enter__(self) -> "Meter":
        self.cuda, self.process = torch.cuda.is_initialized(), psutil.Process()
        self.peak, self.thread, self.stop = self.process.memory_info().rss, None, threading.Event()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: a new peak
        except OSError:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_) -> None:
        self.stop.set()
        if self.thread:
            self.thread.join()
        last = self.process.memory_info().rss if self.thread else status("VmHWM")
        self.peak = max(self.peak, last)

    @property
    def megabytes(self) -> float:
        cuda = torch.cuda.max_memory_allocated() if self.cuda else 0
        # Not so for a method of the CPU beside others on CUDA.
        used = self.cuda and cuda > self.start
        return (cuda if used else max(0, self.peak - self.before)) / 1e6


def status(name: str) -> float:
    """A field of this process's memory, in bytes."""
    return next(
        int(line.split()[1]) * 1024.0
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith(name + ":")
    )


def model_of(shape: Shape) -> ChainPolicy:
    """A policy of this shape with random weights; the vocabulary is this project's."""
    return ChainPolicy(
        PolicyConfig(
            hidden_size=shape.hidden,
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            mlp=shape.mlp,
        )
    )


def spread(completions, **_) -> list[float]:
    """A reward that differs within a group: the share of different tokens."""
    return [len(set(c.split())) / max(1, len(c.split())) for c in completions]


def fine_tune(policy: ChainPolicy, run: Run, steps: int) -> float:
    """Steps of supervised fine-tuning on random tokens, as `pretraining` takes them → seconds of
    the last one."""
    weights = sft.token_weights(policy.vocabulary).to(policy.device)
    if run.optimizer == "muon":
        optimizer = MuonAdamW(policy.train(), lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(policy.train().parameters(), lr=1e-4)
    average = AveragedModel(policy) if run.average else None
    first = policy.vocabulary.first_code
    prompt = torch.tensor(policy.vocabulary.prompt)
    for _ in range(steps):
        began = time.perf_counter()
        drawn = torch.randint(first, len(policy.vocabulary), (run.batch, run.completion))
        ids = torch.cat([prompt.expand(run.batch, -1), drawn], 1).to(policy.device)
        pixels = torch.rand(run.batch, 3, 32, 32, device=policy.device)
        loss = sft.chain_loss(policy, ids, pixels, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(policy)
    return time.perf_counter() - began


def reinforce(policy: ChainPolicy, run: Run, steps: int) -> float:
    """Steps of GRPO on random photos → seconds from the last but one step's rewards to the last
    one's: passes and update of the one, sampling of the other."""
    from datasets import Dataset

    pixels = {"lr": [[[[0] * 32] * 32] * 3] * (steps * run.prompts)}
    table = Dataset.from_dict(pixels | {"prompt": ["<restore>"] * (steps * run.prompts)})
    table = table.add_column("hr", [[0]] * len(table))
    settings = grpo.GrpoSettings(
        steps=steps,
        prompts=run.prompts,
        group=run.group,
        micro_batch=run.batch,
        beta=0.02 * run.reference,
    )
    began = []

    def reward(completions, **columns) -> list[float]:
        began.append(time.perf_counter())
        return spread(completions, **columns)

    with tempfile.TemporaryDirectory() as folder:
        grpo.train_grpo(policy, table, [reward], folder, settings, policy.device.type)
    return began[-1] - began[0] if steps == 2 else 0.0


def child(order: str) -> None:
    """What `measure` runs in a process of its own: prints peak bytes above the start, and seconds,
    as JSON."""
    task = json.loads(order)
    shape, run = Shape(**task["shape"]), Run(**task["run"])
    device, go = torch.device(task["device"]), fine_tune if run.phase == "sft" else reinforce
    # First in small: libraries load, threads start, kernels are made.
    small = replace(run, batch=2, prompts=1, group=2, accumulate=1)
    go(model_of(replace(nano(), layers=1)).to(device), small, 1)
    with Meter(Meter.held()) as meter:
        took = go(model_of(shape).to(device), run, 2)
    print(json.dumps({"peak": meter.megabytes * 1e6, "seconds": took}))


def measure(shape: Shape, run: Run, device: str = "cpu") -> dict[str, float]:
    """Peak bytes of two steps of the real trainer (above what the process held before), and the
    second step's seconds.

    In a process of its own: CUDA's count of allocated bytes, or on Linux the resident memory, with
    an allocator that hands large blocks back at once. RuntimeError with its last line if the
    process fails.
    """
    order = json.dumps({"shape": asdict(shape), "run": asdict(run), "device": device})
    # glibc keeps freed blocks below this size, which would count as in use.
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    code = "import sys; from realsr_r1.planning import budget; budget.child(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, order], capture_output=True, text=True, env=env
    )
    if done.returncode:
        said = [
            line for line in done.stderr.splitlines() if re.match(r"\w*(Error|Exception)\b", line)
        ]
        raise RuntimeError(
            f"measuring failed: "
            f"{said[-1] if said else 'it was killed, probably for want of memory'}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


# What is measured: on a CPU, as large as a laptop allows.
SFT, RL = {"optimizer": "muon", "average": True}, {"fused": False}
MEASURED = {
    "nano, SFT, batch 4": (nano(), Run("sft", batch=4, **SFT)),
    "nano, SFT, batch 16": (nano(), Run("sft", batch=16, **SFT)),
    "nano, GRPO, 2 × 8, micro-batch 8": (nano(), Run("grpo", 65, 454, 8, 2, 2, 8, **RL)),
    "nano, GRPO, 2 × 4, micro-batch 4": (nano(), Run("grpo", 65, 454, 4, 2, 2, 4, **RL)),
}


def measured_table(runs: dict[str, tuple[Shape, Run]] = MEASURED, device: str = "cpu") -> str:
    """Markdown: counted and measured peak of each run, their difference, and tokens per second."""
    rows = [
        "| run | counted MB | measured MB | counted / measured | tokens per second |",
        "|---|---|---|---|---|",
    ]
    for name, (shape, run) in runs.items():
        count = memory(shape, run).peak
        try:
            require(1.2 * count, torch.device(device), name)
            found = measure(shape, run, device)
        except RuntimeError as e:  # a row that cannot be measured says why, and the others stay
            rows.append(f"| {name} | {count / 2**20:,.0f} | {e} | | |")
            continue
        words = (run.chains or run.batch * run.accumulate) * run.length / found["seconds"]
        rows.append(
            f"| {name} | {count / 2**20:,.0f} | {found['peak'] / 2**20:,.0f} | "
            f"{count / found['peak']:.2f} | {words:,.0f} |"
        )
        print(rows[-1], file=sys.stderr)
    return "\n".join(rows)


def shape_of(name: str) -> Shape:
    """nano, middle (Qwen3-0.6B with our tokens), reference (Chameleon 7B), or a folder in the hub's
    format."""
    middle = qwen3(PolicyConfig().vocab_size)
    known = {"nano": nano(), "middle": middle, "reference": chameleon()}
    if name in known:
        return known[name]
    if not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(
            f"no model {name}: choose {', '.join(known)}, or give a folder with a config.json"
        )
    try:
        kind = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))["model_type"]
        ours = kind == PolicyConfig.model_type
        config = (PolicyConfig if ours else AutoConfig).from_pretrained(name)
        config = config.body if ours else config
    except (ValueError, KeyError, TypeError, ZeroDivisionError, StrictDataclassError) as e:
        raise ValueError(
            f"{name}'s config.json is damaged or of a class that this transformers does not know"
        ) from e
    return Shape.of(config)


def describe(shape: Shape, run: Run, price: float = 0.0) -> str:
    """One run in words and a table: parameters, chain, every part of memory at its peak, cards,
    seconds a step."""
    need, trained = (memory(shape, run), shape.lora(run.lora) if run.lora else shape.parameters)
    rows = [
        f"{shape.parameters / 1e6:,.0f} M parameters, {trained / 1e6:,.1f} M trained; "
        f"{run.prompt:,} + {run.completion:,} tokens a chain; "
        f"peak {need.peak / GB:.2f} GB a device ({need.when})"
        + (f", {need.host / GB:.1f} GB in the host" if need.host else ""),
        "",
        f"| part | {' | '.join(need.moments)} |",
        f"|---|{'---|' * len(need.moments)}",
    ]
    for part in dict.fromkeys(k for m in need.moments.values() for k in m):
        rows.append(
            f"| {part} | "
            f"{' | '.join(f'{m.get(part, 0) / GB:.2f}' for m in need.moments.values())} |"
        )
    rows += [
        "",
        "| card | fits | seconds a step |" + (" money for 1,000 steps |" if price else ""),
        "|---|---|---|" + "---|" * bool(price),
    ]
    for card in CARDS:
        time_ = sum(seconds(shape, run, card).values())
        cost_ = f" {time_ / 3.6 * run.devices * price:,.0f} |" if price else ""
        rows.append(
            f"| {card.name} | {'yes' if fits(need, card) else 'no'} | {time_:,.1f} |{cost_}"
        )
    return "\n".join(rows)


def report(
    photos: int = 95_000, rl_photos: int = 500, price: float = 3.0, measured: str = ""
) -> str:
    """The whole page: what fits, the paper's recipe, and, if given, the measured table."""
    parts = [
        "## What fits",
        fit_table(),
        f"Counted; what was measured, the last table says. A GB is 2^30 bytes. A card keeps "
        f"{HEADROOM:.0%} free for what is not counted. LoRA: rank 16; 4 × 8: four groups of eight.",
        "## The paper's recipe, 7 B, on 8×H100",
        recipe(photos, rl_photos, price),
        f"Assumed: {photos:,} cold-start and {rl_photos:,} RL photos, {price:g} a card and "
        f"hour, 35% of the cards' peak; sampling as eager transformers does it.",
    ]
    return "\n\n".join(parts + (["## Counted and measured", measured] if measured else [])) + "\n"
