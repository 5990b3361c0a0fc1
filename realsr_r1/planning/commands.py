"""`realsr cost` and `realsr middle`: what a run needs before it is tried, and a larger policy."""

import argparse
from dataclasses import replace

from realsr_r1.files.options import filled, integer, leaf, place, real

COUNTS = ("batch", "accumulate", "prompts", "group", "lora", "devices")


def cost(a: argparse.Namespace) -> None:
    from realsr_r1.common import write_text
    from realsr_r1.files.writable import check_place
    from realsr_r1.planning import budget
    from realsr_r1.planning.cost import Run

    if a.out is not None:  # an impossible place is told before the work
        a.out.parent.mkdir(parents=True, exist_ok=True)
        check_place(a.out)
    if a.table or a.measure:
        measured = budget.measured_table() if a.measure else ""
        text = budget.report(a.photos, a.rl_photos, 3.0 if a.price is None else a.price, measured)
    else:
        given = dict(budget.REFERENCE) if a.model == "reference" else {"fused": False}
        names = ("prompt", "completion", "precision", "optimizer", *COUNTS)
        given |= {k: getattr(a, k) for k in names if getattr(a, k) is not None}
        given |= {k: True for k in ("checkpointing", "sharded", "offload") if getattr(a, k)}
        run = Run(a.phase, **given)
        if a.accumulate is None and run.chains:  # as the trainer does: all chains in a step
            run = replace(run, accumulate=-(-run.chains // run.batch))
        text = budget.describe(budget.shape_of(a.model), run, a.price or 0.0)
    if a.out is None:
        print(text)
        return
    write_text(a.out, text)


def middle(a: argparse.Namespace) -> None:
    import os

    os.environ["HF_HUB_OFFLINE"] = "0" if a.download else "1"
    from realsr_r1.pipeline import RealSR
    from realsr_r1.reference import qwen

    if any((a.out / part).exists() for part in ("tokenizer", "policy-sft")):
        raise ValueError(f"{a.out} holds weights already: choose another folder")
    a.out.mkdir(parents=True, exist_ok=True)  # an impossible place is told before the work
    model = RealSR.from_pretrained("nano", "cpu")
    model.policy = qwen.start(a.source, model.tokenizer, a.seed)
    model.save_pretrained(a.out)
    size = sum(p.numel() for p in model.policy.parameters()) / 1e6
    print(f"a policy of {size:.0f} M parameters: realsr train policy --init {a.out} --out {a.out}")


def register(sub) -> None:
    p = leaf(sub, "cost", cost, "memory, seconds and money of a run before it is tried")
    text = "nano, middle, reference, or a folder in the hub's format"
    p.add_argument("model", nargs="?", type=filled, default="nano", help=text)
    p.add_argument("--phase", choices=("sft", "grpo"), default="grpo", help="which training")
    for name in ("prompt", "completion"):
        p.add_argument(f"--{name}", type=integer(), help="its tokens")
    for name in COUNTS:
        text = "as in planning.cost.Run"
        text += "; of GRPO as its chains need, if left out" * (name == "accumulate")
        p.add_argument(f"--{name}", type=integer(), help=text)
    p.add_argument("--precision", help="float32, mixed or bfloat16")
    p.add_argument("--optimizer", help="adamw, muon, adamw8bit or sgd")
    p.add_argument("--checkpointing", action="store_true", help="activations are computed twice")
    p.add_argument("--sharded", action="store_true", help="FSDP2 or ZeRO-3")
    p.add_argument("--offload", action="store_true", help="weights and states in the host's memory")
    text = "of a card and hour, in your currency; of the table 3.0 if left out"
    p.add_argument("--price", type=real(zero=True), help=text)
    text = "instead: what fits on which card, and the paper's recipe"
    p.add_argument("--table", action="store_true", help=text)
    text = "as --table, and run the nano policy's trainers to compare (minutes)"
    p.add_argument("--measure", action="store_true", help=text)
    text = "with --table: cold-start photos (the paper does not say)"
    p.add_argument("--photos", type=integer(), default=95_000, help=text)
    text = "with --table: photos of reinforcement learning (the paper does not say)"
    p.add_argument("--rl-photos", type=integer(), default=500, help=text)
    p.add_argument("-o", "--out", type=place, help="write to this file instead")
    p = leaf(sub, "middle", middle, "a policy of 0.4 B from Qwen3-0.6B, to be trained")
    p.add_argument("out", type=place, help="the folder of weights, tokenizer included")
    text = "a Qwen3: a folder or a hub name"
    p.add_argument("--source", type=filled, default="Qwen/Qwen3-0.6B", help=text)
    p.add_argument("--download", action="store_true", help="fetch missing weights from the hub")
    p.add_argument("--seed", type=integer(0), default=0, help="of the new rows")
