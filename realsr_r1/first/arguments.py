"""What the command line takes: the subcommands of `python -m realsr_r1`, their options, and which
of them go together."""

import argparse
from pathlib import Path

ABOUT = "Command line: python -m realsr_r1.first {restore,train,annotate,cost} …"
FOLDERS = {"train": ("out", "data")}


def check(a: argparse.Namespace) -> None:
    """ValueError, in one sentence and before any work, for options that argparse takes one by one
    and that cannot be meant."""
    if getattr(a, "n", None) is not None and a.n < 1:
        raise ValueError(f"-n must be 1 or more, got {a.n}")
    for name in FOLDERS.get(a.command, ()):
        if (place := getattr(a, name)).is_file():
            raise ValueError(f"{place} is a file and --{name} takes a folder: choose another place")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="realsr_r1", description=ABOUT)
    sub = p.add_subparsers(dest="command", required=True)

    r = sub.add_parser("restore", help="restore one photo, four times larger")
    r.add_argument("photo")
    r.add_argument("-o", "--out", required=True, help="where the result goes, e.g. out.png")
    r.add_argument("--trace", help="write settings and every tile's chain of thought as JSON")
    r.add_argument("--seed", type=int, default=0)
    r.add_argument("--device", help="cpu, cuda or mps; default: the best there is")
    r.add_argument("--decoder", choices=("guided", "wavelet", "plain"), default="guided")
    r.add_argument(
        "--batch", type=int, help="tiles at a time (at most; default 48; 1 with --reference)"
    )
    r.add_argument("--weights", type=Path, help="a folder laid out like realsr_r1/assets/weights")
    r.add_argument(
        "--policy",
        default="policy-sft",
        help="folder of the policy in the weights: policy-sft or policy-grpo",
    )
    r.add_argument("--max-pixels", type=int, help="refuse larger LR photos (default 1 megapixel)")
    f = r.add_argument_group("a model of the paper's size instead of the shipped weights")
    f.add_argument(
        "--reference", help="folder or hub name of a Chameleon-class model, e.g. nonwhy/PURE"
    )
    f.add_argument(
        "--download", action="store_true", help="fetch what is absent from the hub (14 GB and more)"
    )
    f.add_argument(
        "--tokenizer", help="LlamaGen's vq_ds8_c2i.pt; default: beside the model, or from the hub"
    )
    f.add_argument("--adapter", help="folder of a PEFT adapter for it")
    f.add_argument(
        "--bits",
        type=int,
        default=16,
        choices=(4, 8, 16, 32),
        help="of its weights; 4 and 8 need bitsandbytes",
    )
    f.add_argument("--device-map", help="auto: spread it over all devices")
    f.add_argument(
        "--prompt",
        help="the sentence it was tuned with (PURE's is in its README); default: this course's",
    )
    f.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        help="pixels of its images: 128 256 512 (chain), 512 (PURE); default: it chooses",
    )
    f.add_argument(
        "--window",
        type=int,
        default=0,
        help="speculative Jacobi decoding: words guessed a pass (needs --sizes; 0: off)",
    )

    t = sub.add_parser(
        "train", help="train from scratch; the same command resumes a run that was killed"
    )
    t.add_argument(
        "what",
        choices=("tokenizer", "reader", "guided", "regression", "sft", "direct", "expert", "grpo"),
    )
    t.add_argument(
        "--out", type=Path, default=Path("runs/nano"), help="folder for weights and logs"
    )
    t.add_argument(
        "--data",
        type=Path,
        default=Path("runs/data"),
        help="folder that keeps the synthesised pairs",
    )
    t.add_argument("--pairs", type=int, default=24_000)
    t.add_argument(
        "--steps", type=int, help="optimisation steps; default: the shipped weights' recipe"
    )
    t.add_argument("--lr", type=float)
    t.add_argument("--batch", type=int, help="sft and direct only")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--device")
    t.add_argument("--threads", type=int, help="CPU threads")
    t.add_argument(
        "--init",
        type=Path,
        help="go on from the weights in this folder instead of from scratch (tokenizer: its "
        "decoder only)",
    )
    t.add_argument(
        "--said",
        type=int,
        default=0,
        help="guided only: half of each batch has codes drawn by policy-sft for this many pairs",
    )
    t.add_argument(
        "--crops",
        type=int,
        default=0,
        help="guided only: half of each batch are crops of photographs, mildly degraded, from "
        "this many",
    )
    m = t.add_argument_group(
        "sft and grpo of the middle size, a pretrained Qwen3 with our words, on one card of 16 "
        "GB (--out runs/middle)"
    )
    m.add_argument("--size", choices=("nano", "middle"), default="nano")
    m.add_argument(
        "--base",
        default="Qwen/Qwen3-0.6B",
        help="sft: folder in the hub's format, or a name on the hub",
    )
    m.add_argument("--full", action="store_true", help="train all weights, not LoRA adapters")
    m.add_argument(
        "--own-words",
        action="store_true",
        help="sft: drop the pretrained words that no caption uses: smaller and faster",
    )
    g = t.add_argument_group(
        "grpo, which starts from policy-sft in --out (or in the shipped weights)"
    )
    g.add_argument("--prompts", type=int, default=4, help="groups a step")
    g.add_argument("--group", type=int, default=8, help="chains a group")
    g.add_argument("--micro-batch", type=int, default=8, help="chains a forward and backward pass")
    g.add_argument(
        "--beta", type=float, default=0.02, help="weight of the KL to the SFT policy; 0: off"
    )
    g.add_argument(
        "--rewards",
        nargs="+",
        default=["format", "degradation", "understanding", "generation"],
        help="names, or name=weight",
    )
    g.add_argument("--expert", default="nano", help="visual expert of the generation reward")
    g.add_argument(
        "--words",
        type=int,
        help="sample only the first words of each chain (24: degradation and rough understanding)",
    )
    g.add_argument(
        "--greedy-text",
        action="store_true",
        help="as in the released code: kills the rewards on text",
    )
    g.add_argument(
        "--start",
        default="policy-sft",
        help="folder of the policy to start from, which the KL also keeps to",
    )
    g.add_argument(
        "--blend",
        type=float,
        help="start from this share of --start's weights and the rest of policy-sft's, e.g. 0.5",
    )
    g.add_argument(
        "--aggregation",
        choices=("sum_then_normalize", "normalize_then_sum"),
        default="sum_then_normalize",
        help="normalize_then_sum: each reward by its own spread in the group first, so that none "
        "drowns another",
    )
    g.add_argument("--name", default="policy-grpo", help="folder of the trained policy")

    n = sub.add_parser(
        "annotate", help="captions and tags for your own photos, by pretrained models; resumes"
    )
    n.add_argument(
        "photos", help="a folder of photos, parquet files or tar archives, or hf:OWNER/NAME"
    )
    n.add_argument(
        "-o", "--out", type=Path, help="folder for captions.jsonl; default: the photos' own"
    )
    n.add_argument("--model", choices=("florence-2", "qwen2.5-vl"), default="florence-2")
    n.add_argument("--weights", help="its folder or hub name, instead of the usual one")
    n.add_argument(
        "--tagger",
        choices=("none", "grounding-dino"),
        default="none",
        help="who names the things; none: the model itself",
    )
    n.add_argument("--tagger-weights", help="its folder or hub name")
    n.add_argument(
        "--masks",
        type=Path,
        help="folder for SAM's masks of the things; needs boxes: florence-2 or grounding-dino",
    )
    n.add_argument("--sam-weights", help="its folder or hub name")
    n.add_argument(
        "--shard", default="0/1", help="this process's share, e.g. 0/4, the first of four"
    )
    n.add_argument("--split", default="train", help="split of a hub dataset")
    n.add_argument("--batch", type=int, default=8, help="photos at a time")
    n.add_argument("--limit", type=int, help="photos at most")
    n.add_argument("--device", help="cpu, cuda or mps; default: the best there is")
    n.add_argument(
        "--download",
        action="store_true",
        help="fetch missing weights, or stream a dataset, from the hub",
    )

    c = sub.add_parser("cost", help="memory, seconds and money of a run before it is tried")
    c.add_argument(
        "model",
        nargs="?",
        default="nano",
        help="nano, middle, reference, or a folder in the hub's format",
    )
    c.add_argument("--phase", choices=("sft", "grpo"), default="grpo")
    c.add_argument(
        "--pixels",
        type=int,
        default=128,
        help="side of the final image; with --prompt and --completion, words instead",
    )
    for name in (
        "prompt",
        "completion",
        "batch",
        "accumulate",
        "prompts",
        "group",
        "lora",
        "devices",
    ):
        c.add_argument(f"--{name}", type=int)
    for name in ("precision", "optimizer"):
        c.add_argument(f"--{name}")
    for name in ("checkpointing", "sharded", "offload"):
        c.add_argument(f"--{name}", action="store_true")
    c.add_argument("--price", type=float, default=0.0, help="of a card and hour, in your currency")
    c.add_argument(
        "--table",
        action="store_true",
        help="instead: what fits on which card, and the paper's recipe",
    )
    c.add_argument(
        "--measure",
        action="store_true",
        help="with --table: run the nano policy's trainers and compare (minutes)",
    )
    c.add_argument(
        "--photos",
        type=int,
        default=95_000,
        help="with --table: cold-start photos (the paper does not say)",
    )
    c.add_argument(
        "--rl-photos",
        type=int,
        default=500,
        help="with --table: photos of reinforcement learning (the paper does not say)",
    )
    c.add_argument("-o", "--out", type=Path, help="write to this file instead")
    return p
