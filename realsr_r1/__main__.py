"""Command line: python -m realsr_r1 {restore,demo,train,evaluate} …"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network; without this, absent networks cost minutes


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="realsr_r1", description=__doc__)
    sub = p.add_subparsers(dest="command", required=True)

    r = sub.add_parser("restore", help="restore one photo, four times larger")
    r.add_argument("photo")
    r.add_argument("-o", "--out", required=True, help="where the result goes, e.g. out.png")
    r.add_argument("--trace", help="write settings and every tile's chain of thought as JSON")
    r.add_argument("--seed", type=int, default=0)
    r.add_argument("--device", help="cpu, cuda or mps; default: the best there is")
    r.add_argument("--decoder", choices=("guided", "wavelet", "plain"), default="guided")
    r.add_argument("--batch", type=int, default=16, help="tiles at a time")
    r.add_argument("--weights", type=Path, help="a folder laid out like realsr_r1/assets/weights")
    r.add_argument("--policy", default="policy-sft", help="folder of the policy in the weights: policy-sft or policy-grpo")
    r.add_argument("--max-pixels", type=int, help="refuse larger LR photos (default 1 megapixel)")

    d = sub.add_parser("demo", help="restore the shipped real photos and draw figures/demo.png")
    d.add_argument("-o", "--out", type=Path, default=Path("figures/demo.png"))
    d.add_argument("--device")

    t = sub.add_parser("train", help="train from scratch; the same command resumes a run that was killed")
    t.add_argument("what", choices=("tokenizer", "reader", "guided", "regression", "sft", "direct", "expert", "grpo"))
    t.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder for weights and logs")
    t.add_argument("--data", type=Path, default=Path("runs/data"), help="folder that keeps the synthesised pairs")
    t.add_argument("--pairs", type=int, default=24_000)
    t.add_argument("--steps", type=int, help="optimisation steps; default: the shipped weights' recipe")
    t.add_argument("--lr", type=float)
    t.add_argument("--batch", type=int, help="sft and direct only")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--device")
    t.add_argument("--threads", type=int, help="CPU threads")
    t.add_argument("--init", type=Path, help="go on from the weights in this folder instead of from scratch (tokenizer: its decoder only)")
    t.add_argument("--said", type=int, default=0, help="guided only: half of each batch has codes drawn by policy-sft for this many pairs")
    g = t.add_argument_group("grpo, which starts from policy-sft in --out (or in the shipped weights)")
    g.add_argument("--prompts", type=int, default=4, help="groups a step")
    g.add_argument("--group", type=int, default=8, help="chains a group")
    g.add_argument("--micro-batch", type=int, default=8, help="chains a forward and backward pass")
    g.add_argument("--beta", type=float, default=0.02, help="weight of the KL to the SFT policy; 0: off")
    g.add_argument("--rewards", nargs="+", default=["format", "degradation", "understanding", "generation"], help="names, or name=weight")
    g.add_argument("--expert", default="nano", help="visual expert of the generation reward")
    g.add_argument("--words", type=int, help="sample only the first words of each chain (24: degradation and rough understanding)")
    g.add_argument("--greedy-text", action="store_true", help="as in the released code: kills the rewards on text")
    g.add_argument("--name", default="policy-grpo", help="folder of the trained policy")

    e = sub.add_parser("evaluate", help="the first results table, on held-out scenes")
    e.add_argument("-n", type=int, default=512, help="test scenes")
    e.add_argument("--compare", nargs="+", help="policies side by side, the first is the baseline: e.g. policy-sft policy-grpo")
    e.add_argument("--weights", type=Path, help="a folder laid out like realsr_r1/assets/weights")
    e.add_argument("--cnn-steps", type=int, default=1200, help="training steps of the yardstick networks")
    e.add_argument("-o", "--out", type=Path, default=Path("figures"))
    e.add_argument("--data", type=Path, default=Path("runs/data"))
    e.add_argument("--seed", type=int, default=0)
    e.add_argument("--device")
    return p


# Steps of the shipped weights' recipe.
RECIPE = {"tokenizer": 5500, "reader": 1400, "guided": 750, "regression": 750, "sft": 600, "direct": 600, "expert": 3000, "grpo": 20}


def train(a: argparse.Namespace) -> None:
    import torch

    from realsr_r1 import experts, pretrain, scenes, sft, vlcot, weights

    if a.threads:
        torch.set_num_threads(a.threads)
    data = scenes.cached_pairs(a.pairs, "train", cache=a.data)
    steps = a.steps or RECIPE[a.what]
    options = {"steps": steps, "seed": a.seed, "device": a.device} | ({"lr": a.lr} if a.lr else {})
    out = a.out / f"{a.what}.safetensors"
    init = {"init": weights.load(a.init / f"{a.what}.safetensors")} if a.init and a.what in ("tokenizer", "reader", "guided") else {}
    if a.what == "tokenizer":
        pretrain.train_tokenizer(data, out, **options, **init)
    elif a.what == "reader":
        crops = scenes.cached_pairs(a.pairs * 6 // 10, "train", cache=a.data, crops=True)
        pretrain.train_reader(data, out, crops=crops, summary_steps=a.steps or 5000, **options, **init)
    elif a.what in ("guided", "regression"):
        said = drawn(a, data) if a.said else None
        pretrain.train_guided(
            data, weights.load(a.out / "tokenizer.safetensors"), out, use_codes=a.what == "guided", said=said, **options, **init
        )
    elif a.what == "expert":
        folder = a.out if (a.out / "tokenizer.safetensors").exists() else weights.WEIGHTS
        vq, guided = (weights.load(folder / f"{n}.safetensors") for n in ("tokenizer", "guided"))
        experts.train_expert(data, vq, out, guided=guided, **options)
    else:
        device = pretrain.device_of(a.device)
        vq, reader = (weights.load(a.out / f"{n}.safetensors", device) for n in ("tokenizer", "reader"))
        words, direct = vlcot.Vocabulary(vq.config.codes, reader.vocabulary), a.what == "direct"
        val = scenes.cached_pairs(96, "val", cache=a.data)
        sets = [sft.chains(d, vq, reader, words, direct, a.data, device) for d in (data, val)]
        extra = {k: v for k, v in (("lr", a.lr), ("batch", a.batch), ("init", a.init and a.init / f"policy-{a.what}")) if v}
        sft.train_sft(*sets, a.out / f"policy-{a.what}", vq.cpu(), reader.cpu(), seed=a.seed, device=a.device, max_steps=steps, **extra)


def drawn(a: argparse.Namespace, data):
    """The codes that the policy in the output folder draws for the first pairs."""
    from realsr_r1 import policy, scenes, sft, weights

    lm, vq, reader = policy.load(a.out / "policy-sft"), *(weights.load(a.out / f"{n}.safetensors") for n in ("tokenizer", "reader"))
    first = scenes.Pairs(data.hr[: a.said], data.lr[: a.said], data.labels[: a.said], data.scenes[: a.said])
    return sft.drawn_codes(lm, sft.chains(first, vq, reader, lm.vocabulary, cache=a.data), seed=a.seed)


def train_grpo(a: argparse.Namespace) -> None:
    import torch

    from realsr_r1 import experts, grpo, weights

    if a.threads:
        torch.set_num_threads(a.threads)
    folder = a.init or (a.out if (a.out / "policy-sft").exists() else weights.WEIGHTS)
    settings = grpo.GrpoSettings(steps=a.steps or RECIPE["grpo"], prompts=a.prompts, group=a.group, micro_batch=a.micro_batch, beta=a.beta,
                                 greedy_text=a.greedy_text, words=a.words, seed=a.seed, **({"lr": a.lr} if a.lr else {}))  # fmt: skip
    vq, reader = (weights.load(folder / f"{n}.safetensors") for n in ("tokenizer", "reader"))
    expert = (
        experts.load_expert(a.expert, path=folder / "expert.safetensors") if any(r.startswith("generation") for r in a.rewards) else None
    )
    functions, reward_weights = grpo.named_rewards(a.rewards, vq, expert)
    first = grpo.FIRST_SEED + 100_000 * a.seed
    lm = grpo.policy.load(folder / "policy-sft")
    dataset = grpo.prompts(range(first, first + settings.steps * settings.prompts), reader, lm.vocabulary)
    sheet = grpo.GroupSheet(a.out / f"{a.name}.png", reader, vq, settings)
    settings = replace(settings, weights=reward_weights)
    grpo.train_grpo(folder / "policy-sft", dataset, functions, a.out / a.name, settings, [sheet], a.device)


def run(a: argparse.Namespace) -> None:
    if a.command == "train":
        return train_grpo(a) if a.what == "grpo" else train(a)
    from realsr_r1.restore import MAX_PIXELS, load_models, restore_file

    if a.command == "restore":
        models = load_models(a.device, **({"weights": a.weights} if a.weights else {}), policy_name=a.policy)
        restore_file(
            a.photo, a.out, a.trace, models=models, seed=a.seed, decoder=a.decoder, batch=a.batch, max_pixels=a.max_pixels or MAX_PIXELS
        )
    else:
        from realsr_r1 import evaluate

        if a.command == "demo":
            evaluate.demo(a.out, load_models(a.device))
        elif a.compare:
            from realsr_r1 import compare, experts, weights

            folder = a.weights or weights.WEIGHTS
            models = {name: load_models(a.device, folder, name) for name in a.compare}
            compare.compare(models, a.out, experts.load_expert(path=folder / "expert.safetensors"), a.n, a.data, a.seed)
        else:
            models = load_models(a.device, **({"weights": a.weights} if a.weights else {}))
            evaluate.first_results(models, a.out, a.n, cnn_steps=a.cnn_steps, cache=a.data, seed=a.seed)


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    import torch

    try:
        run(a)
    except torch.OutOfMemoryError:
        print("error: the device has too little memory: lower --batch, or use --device cpu", file=sys.stderr)
        return 2
    except (ValueError, FileNotFoundError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
