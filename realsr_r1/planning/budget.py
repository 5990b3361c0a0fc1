"""What fits where, what the paper's recipe costs, and measured peaks beside the counted ones.

`python -m realsr_r1.first cost` prints one run's memory; with --table all tables, with --measure
the comparison. Tables are counts (`cost`), except the measured column: there the real trainers ran
in a process of their own.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil  # comes with accelerate
import torch
from datasets import Dataset
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from realsr_r1.common import fast_bfloat16
from realsr_r1.first import grpo, policy, sft
from realsr_r1.first.vlcot import Vocabulary
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
from realsr_r1.reference import qwen as middle

# The reference chain at its longest: the limits of the release's RL script (prompt 5,000,
# completion 7,000 words).
REFERENCE = {"prompt": 5_000, "completion": 7_000, "precision": "bfloat16", "checkpointing": True}
PNG = 1.6  # bytes a pixel


def plans() -> dict[str, tuple[Shape, Run]]:
    """Runs whose fit is tabled. 128 and 256 px: this project's chain with 20 words a text; 7 B: the
    paper's chain."""
    p, c = chain_tokens(128)
    p2, c2 = chain_tokens(256)
    ours, both = qwen3(len(Vocabulary())), qwen3(151_936 + len(Vocabulary()))
    full = {"precision": "mixed", "checkpointing": True}
    lora = {
        "precision": "bfloat16",
        "checkpointing": True,
        "lora": 16,
        "new_rows": len(Vocabulary()),
    }
    shards = REFERENCE | {"sharded": True}
    return {
        "nano, SFT, batch 64": (nano(), Run("sft", p, c, 64, optimizer="muon")),
        "nano, GRPO, 4 × 8, micro-batch 8": (nano(), Run("grpo", p, c, 8, 4, 4, 8)),
        "0.6 B, SFT, all weights, batch 4": (both, Run("sft", p, c, 4, **full)),
        "0.6 B, SFT, LoRA, batch 4": (both, Run("sft", p, c, 4, **lora)),
        "0.6 B, GRPO, LoRA, 2 × 8, micro-batch 4": (both, Run("grpo", p, c, 4, 4, 2, 8, **lora)),
        "the same, own words only": (ours, Run("grpo", p, c, 4, 4, 2, 8, **lora)),
        "the same, 256 px, micro-batch 1": (ours, Run("grpo", p2, c2, 1, 16, 2, 8, **lora)),
        "0.6 B, GRPO, all weights, KL, 2 × 8, micro-batch 4": (
            both,
            Run("grpo", p, c, 4, 4, 2, 8, checkpointing=True),
        ),
        "7 B, SFT, LoRA": (chameleon(), Run("sft", **REFERENCE, lora=16)),
        "7 B, GRPO, LoRA, group 5": (
            chameleon(),
            Run("grpo", **REFERENCE, lora=16, group=5, accumulate=5),
        ),
        "7 B, SFT, all weights, FSDP2 or ZeRO-3": (chameleon(), Run("sft", **shards)),
        "7 B, GRPO, all weights, sharded, group 8": (
            chameleon(),
            Run("grpo", **shards, reference=False),
        ),
        "the same, KL and offload": (chameleon(), Run("grpo", **shards, offload=True)),
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


def storage(
    photos: int, pixels: int = 512, tokens: int = 11_000, crops: int = 1, captions: float = 800
) -> dict[str, float]:
    """Bytes of a prepared set: crops as PNG at `PNG` bytes a pixel (the shipped evaluation photos'
    mean), token shards of int32, `captions` bytes of text each."""
    n = photos * crops
    return {
        "photos": n * PNG * pixels**2,
        "tokens": n * tokens * 4.0,
        "captions": n * float(captions),
    }


def recipe(
    photos: int = 95_000,
    rl_photos: int = 500,
    price: float = 3.0,
    card: Card = CARDS[-1],
    utilisation: float = 0.35,
) -> str:
    """Markdown: time, money and storage of the paper's recipe with the 7 B model on one row of
    cards.

    From the release: cold start of 2 epochs, RL of 2 epochs with groups of 5, chains at their
    limits. Not published and hence the caller's: the number of cold-start photos (default: LSDIR
    and 10 k FFHQ, PURE's data), of RL photos (the release's folder is named test500), the `price` a
    card and hour, and the `utilisation` of the card's peak.
    """
    shape, epochs = chameleon(), 2
    cold, rl = (
        Run("sft", **REFERENCE, sharded=True, devices=card.devices),
        Run("grpo", **REFERENCE, group=5, reference=False),
    )
    rows = ["| part | chains | hours on " + card.name + " | money |", "|---|---|---|---|"]
    for name, run, chains in (
        ("cold start", cold, photos * epochs),
        ("VLCoT-GRPO", rl, rl_photos * epochs * 5),
    ):
        step = sum(seconds(shape, run, card, utilisation).values()) / (
            5 if run.phase == "grpo" else 1
        )
        hours = step * chains / card.devices / 3600
        rows.append(f"| {name} | {chains:,} | {hours:,.0f} | {hours * card.devices * price:,.0f} |")
    need = storage(photos)
    text = ", ".join(f"{k} {v / 1e9:,.1f} GB" for k, v in need.items())
    return "\n".join(
        [
            *rows,
            "",
            f"Storage for {photos:,} photos of 512 px: {text}; a checkpoint with optimizer "
            f"{14 * shape.parameters / 1e9:,.0f} GB.",
        ]
    )


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
        self.cuda, self.process, self.stop = (
            torch.cuda.is_initialized(),
            psutil.Process(),
            threading.Event(),
        )
        self.peak, self.thread = self.process.memory_info().rss, None
        if self.cuda:
            self.start = reset_peak(torch.device("cuda"))
        try:
            reset_peak(torch.device("cpu"))
        except RuntimeError:
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
        self.peak = max(
            self.peak, self.process.memory_info().rss if self.thread else status("VmHWM")
        )

    @property
    def megabytes(self) -> float:
        cuda = torch.cuda.max_memory_allocated() if self.cuda else 0
        used = (
            self.cuda and cuda > self.start
        )  # not so for a method of the CPU beside others on CUDA
        return (cuda if used else max(0, self.peak - self.before)) / 1e6


class Peak(TrainerCallback):
    """Peak memory and seconds of the steps after the first, which makes the optimizer's states."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.top = device, [], 0.0

    def on_step_begin(self, args, state, control, **_):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.started)

    def on_train_begin(self, args, state, control, **_):
        reset_peak(self.device)

    def on_train_end(self, args, state, control, **_):
        self.top = (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else status("VmHWM")
        )


def reset_peak(device: torch.device) -> float:
    """Forget the peak so far; returns the bytes in use now. RuntimeError where the system keeps no
    such count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as e:
        raise RuntimeError(
            "peak memory is measured on CUDA, or on Linux, which resets a process's own count: "
            "use one of them"
        ) from e
    return status("VmRSS")


def status(name: str) -> float:
    """A field of this process's memory, in bytes."""
    return next(
        int(line.split()[1]) * 1024.0
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name + ":")
    )


def model_of(shape: Shape) -> Qwen3ForCausalLM:
    """A Qwen3 of this shape with random weights, as a policy with the words of
    `Vocabulary()` last."""
    if replace(shape, layers=nano().layers) == nano():
        return policy.build(policy.PolicyConfig(layers=shape.layers))
    base = shape.vocab - len(Vocabulary())
    config = policy.PolicyConfig(
        shape.hidden, shape.layers, shape.heads, shape.mlp, base=max(0, base)
    )
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(config.vocabulary),
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=shape.tied,
            pad_token_id=config.vocabulary.ids["<pad>"],
            eos_token_id=config.vocabulary.ids["<eos>"],
            bos_token_id=None,
        )
    )
    model.nano, model.vocabulary = config, config.vocabulary
    return model


def spread(completions, **_) -> list[float]:
    """A reward that differs within a group: the share of different words."""
    return [len(set(c.split())) / max(1, len(c.split())) for c in completions]


def train_once(folder: Path, run: Run, device: torch.device, peak: Peak, steps: int = 2) -> None:
    """A few steps of the real trainer on random chains, from the policy in `folder`/start."""
    model, g = policy.load(folder / "start"), torch.Generator().manual_seed(0)
    v = model.vocabulary
    scale = sft.Scale(
        middle.lora(v, run.lora) if run.lora else None,
        torch.bfloat16 if run.precision == "bfloat16" else torch.float32,
        run.checkpointing,
        run.accumulate,
        {"adamw": "adamw_torch"}.get(run.optimizer, run.optimizer),
    )
    del model
    if run.phase == "sft":
        ids = torch.randint(
            v.base + 4, len(v), (run.batch * run.accumulate, run.length), generator=g
        )
        labels = ids.masked_fill(torch.arange(run.length) < run.prompt, -100)
        table = Dataset.from_dict({"input_ids": ids.numpy(), "labels": labels.numpy()}).with_format(
            "numpy"
        )
        sft.train_sft(
            table,
            None,
            folder / "out",
            None,
            None,
            batch=run.batch,
            max_steps=steps,
            device=device.type,
            init=folder / "start",
            scale=scale,
            callbacks=[peak],
        )
        return
    texts = [
        v.decode(row)
        for row in v.prompts(
            torch.randint(0, v.lr_codes, (steps * run.prompts, 17, 16), generator=g)
        )
    ]
    settings = grpo.GrpoSettings(
        steps=steps,
        prompts=run.prompts,
        group=run.group,
        micro_batch=run.batch,
        beta=0.02 * run.reference,
    )
    grpo.train_grpo(
        folder / "start",
        Dataset.from_dict({"prompt": texts}),
        [spread],
        folder / "out",
        settings,
        [peak],
        device.type,
        scale,
    )


def child(order: str) -> None:
    """What `measure` runs in a process of its own: prints peak bytes above the start, and seconds,
    as JSON."""
    task = json.loads(order)
    shape, run, device = Shape(**task["shape"]), Run(**task["run"]), torch.device(task["device"])
    with tempfile.TemporaryDirectory() as folder:
        peak = Peak(device)
        # First with a batch of one: libraries load, threads start, kernels are made for these
        # shapes.
        policy.save(
            model_of(shape if shape.parameters < 64e6 else replace(nano(), layers=1)),
            Path(folder) / "start",
        )
        train_once(
            Path(folder), replace(run, batch=1, prompts=2, group=2, accumulate=1), device, peak, 1
        )
        shutil.rmtree(Path(folder) / "out-checkpoints")
        policy.save(model_of(shape), Path(folder) / "start")
        gc.collect()
        base = reset_peak(device)
        peak = Peak(device)
        train_once(Path(folder), run, device, peak)
    print(json.dumps({"peak": peak.top - base, "seconds": peak.seconds[-1]}))


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


# What is measured: on a CPU, as large as a laptop allows (the middle size needs 6 GB and stands for
# short chains).
BOTH = qwen3(151_936 + len(Vocabulary()))
MEASURED = {
    "nano, SFT, batch 4": (nano(), Run("sft", 294, 480, 4, optimizer="muon")),
    "nano, SFT, batch 16": (nano(), Run("sft", 294, 480, 16, optimizer="muon")),
    "nano, SFT, batch 8, checkpointing": (
        nano(),
        Run("sft", 294, 480, 8, optimizer="muon", checkpointing=True),
    ),
    "nano, GRPO, 2 × 8, micro-batch 8": (nano(), Run("grpo", 294, 487, 8, 2, 2, 8, triton=False)),
    "nano, GRPO, 2 × 4, micro-batch 4": (nano(), Run("grpo", 294, 487, 4, 2, 2, 4, triton=False)),
    "0.6 B, SFT, LoRA, 2 × 128 words": (
        BOTH,
        Run("sft", 60, 68, 2, precision="bfloat16", lora=16, new_rows=len(Vocabulary())),
    ),
    "0.6 B, SFT, all weights, SGD, 2 × 128 words": (BOTH, Run("sft", 60, 68, 2, optimizer="sgd")),
}


def measured_table(runs: dict[str, tuple[Shape, Run]] = MEASURED, device: str = "cpu") -> str:
    """Markdown: counted and measured peak of each run, their difference, and words a second."""
    fast = fast_bfloat16(torch.device(device))
    rows = [
        "| run | counted MB | measured MB | counted / measured | words a second |",
        "|---|---|---|---|---|",
    ]
    for name, (shape, run) in runs.items():
        if run.phase == "sft" and run.precision == "float32" and not run.lora and fast:
            run = replace(run, precision="mixed")  # as `sft.train_sft` does
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
    """nano, middle (Qwen3-0.6B with our words), reference (Chameleon 7B), or a folder in the hub's
    format."""
    known = {
        "nano": nano,
        "middle": lambda: qwen3(151_936 + len(Vocabulary())),
        "reference": chameleon,
    }
    if name in known:
        return known[name]()
    if not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(
            f"no model {name}: choose {', '.join(known)}, or give a folder with a config.json"
        )
    return Shape.of(AutoConfig.from_pretrained(name))


def describe(shape: Shape, run: Run, price: float = 0.0) -> str:
    """One run in words and a table: parameters, chain, every part of memory at its peak, cards,
    seconds a step."""
    need, trained = (
        memory(shape, run),
        shape.lora(run.lora) + run.new_rows * shape.hidden if run.lora else shape.parameters,
    )
    rows = [
        f"{shape.parameters / 1e6:,.0f} M parameters, {trained / 1e6:,.1f} M trained; "
        f"{run.prompt:,} + {run.completion:,} words a chain; "
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
        f"A card keeps {HEADROOM:.0%} free for what is not counted. LoRA: rank 16 and the new "
        f"rows.",
        "## The paper's recipe, 7 B, on 8×H100",
        recipe(photos, rl_photos, price),
        f"Assumed: {photos:,} cold-start and {rl_photos:,} RL photos, {price:g} a card and "
        f"hour, 35% of the cards' peak; sampling as eager transformers does it.",
    ]
    return "\n\n".join(parts + (["## Counted and measured", measured] if measured else [])) + "\n"


def command(a: argparse.Namespace) -> None:
    """What `python -m realsr_r1.first cost` prints, or writes to --out."""
    if a.table or a.measure:
        text = report(a.photos, a.rl_photos, a.price or 3.0, measured_table() if a.measure else "")
    else:
        names = (
            "prompt",
            "completion",
            "batch",
            "accumulate",
            "prompts",
            "group",
            "lora",
            "devices",
            "precision",
            "optimizer",
        )
        lengths = dict(zip(("prompt", "completion"), chain_tokens(a.pixels), strict=True))
        given = (REFERENCE if a.model == "reference" else lengths) | {
            k: getattr(a, k) for k in names if getattr(a, k) is not None
        }
        given |= {k: True for k in ("checkpointing", "sharded", "offload") if getattr(a, k)}
        new_rows = len(Vocabulary()) if a.lora and a.model == "middle" else 0
        text = describe(shape_of(a.model), Run(a.phase, **given, new_rows=new_rows), a.price)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(text)
    else:
        print(text)
