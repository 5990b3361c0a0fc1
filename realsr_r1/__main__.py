"""Command line: python -m realsr_r1 {restore,demo,train,evaluate} …"""

import argparse
import os
import sys
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
    r.add_argument("--max-pixels", type=int, help="refuse larger LR photos (default 1 megapixel)")

    d = sub.add_parser("demo", help="restore the shipped real photos and draw figures/demo.png")
    d.add_argument("-o", "--out", type=Path, default=Path("figures/demo.png"))
    d.add_argument("--device")

    t = sub.add_parser("train", help="train from scratch; the same command resumes a run that was killed")
    t.add_argument("what", choices=("tokenizer", "reader", "guided", "regression", "sft", "direct"))
    t.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder for weights and logs")
    t.add_argument("--data", type=Path, default=Path("runs/data"), help="folder that keeps the synthesised pairs")
    t.add_argument("--pairs", type=int, default=24_000)
    t.add_argument("--steps", type=int, help="optimisation steps; default: the shipped weights' recipe")
    t.add_argument("--lr", type=float)
    t.add_argument("--batch", type=int, help="sft and direct only")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--device")
    t.add_argument("--threads", type=int, help="CPU threads")

    e = sub.add_parser("evaluate", help="the first results table, on held-out scenes")
    e.add_argument("-n", type=int, default=512, help="test scenes")
    e.add_argument("--cnn-steps", type=int, default=1200, help="training steps of the yardstick networks")
    e.add_argument("-o", "--out", type=Path, default=Path("figures"))
    e.add_argument("--data", type=Path, default=Path("runs/data"))
    e.add_argument("--seed", type=int, default=0)
    e.add_argument("--device")
    return p


# Steps of the shipped weights' recipe.
RECIPE = {"tokenizer": 5500, "reader": 1400, "guided": 750, "regression": 750, "sft": 600, "direct": 600}


def train(a: argparse.Namespace) -> None:
    import torch

    from realsr_r1 import pretrain, scenes, sft, vlcot, weights

    if a.threads:
        torch.set_num_threads(a.threads)
    data = scenes.cached_pairs(a.pairs, "train", cache=a.data)
    steps = a.steps or RECIPE[a.what]
    options = {"steps": steps, "seed": a.seed, "device": a.device} | ({"lr": a.lr} if a.lr else {})
    out = a.out / f"{a.what}.safetensors"
    if a.what == "tokenizer":
        pretrain.train_tokenizer(data, out, **options)
    elif a.what == "reader":
        pretrain.train_reader(data, out, crops=scenes.cached_pairs(a.pairs * 6 // 10, "train", cache=a.data, crops=True), **options)
    elif a.what in ("guided", "regression"):
        pretrain.train_guided(data, weights.load(a.out / "tokenizer.safetensors"), out, use_codes=a.what == "guided", **options)
    else:
        device = pretrain.device_of(a.device)
        vq, reader = (weights.load(a.out / f"{n}.safetensors", device) for n in ("tokenizer", "reader"))
        words, direct = vlcot.Vocabulary(vq.config.codes, reader.vocabulary), a.what == "direct"
        val = scenes.cached_pairs(96, "val", cache=a.data)
        sets = [sft.chains(d, vq, reader, words, direct, a.data, device) for d in (data, val)]
        extra = {k: v for k, v in (("lr", a.lr), ("batch", a.batch)) if v}
        sft.train_sft(*sets, a.out / f"policy-{a.what}", vq.cpu(), reader.cpu(), seed=a.seed, device=a.device, max_steps=steps, **extra)


def run(a: argparse.Namespace) -> None:
    if a.command == "train":
        return train(a)
    from realsr_r1.restore import MAX_PIXELS, load_models, restore_file

    if a.command == "restore":
        models = load_models(a.device, **({"weights": a.weights} if a.weights else {}))
        restore_file(
            a.photo, a.out, a.trace, models=models, seed=a.seed, decoder=a.decoder, batch=a.batch, max_pixels=a.max_pixels or MAX_PIXELS
        )
    else:
        from realsr_r1 import evaluate

        if a.command == "demo":
            evaluate.demo(a.out, load_models(a.device))
        else:
            evaluate.first_results(load_models(a.device), a.out, a.n, cnn_steps=a.cnn_steps, cache=a.data, seed=a.seed)


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
