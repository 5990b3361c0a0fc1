"""The command line: what each subcommand of `python -m realsr_r1` does; its options are in
`arguments`."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from realsr_r1.first.arguments import check, parser

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # nothing here needs the network; without this, absent networks cost minutes


# Steps of the shipped weights' recipe, its parts together.
RECIPE = {
    "tokenizer": 5500,
    "reader": 1400,
    "guided": 2900,
    "regression": 1500,
    "sft": 3450,
    "direct": 3450,
    "expert": 3000,
    "grpo": 20,
}


def train(a: argparse.Namespace) -> None:
    import torch

    from realsr_r1.first import experts, pretrain, scenes, sft, vlcot, weights

    if a.threads:
        torch.set_num_threads(a.threads)
    if a.size == "middle" and a.what != "sft":
        raise ValueError(f"train {a.what} has no middle size: only sft and grpo have")
    with sft.first_process(a.device):
        data = scenes.cached_pairs(a.pairs, "train", cache=a.data)
    steps = a.steps or RECIPE[a.what]
    options = {"steps": steps, "seed": a.seed, "device": a.device} | ({"lr": a.lr} if a.lr else {})
    out = a.out / f"{a.what}.safetensors"
    init = (
        {"init": weights.load(a.init / f"{a.what}.safetensors")}
        if a.init and a.what in ("tokenizer", "reader", "guided")
        else {}
    )
    if a.what == "tokenizer":
        pretrain.train_tokenizer(data, out, **options, **init)
    elif a.what == "reader":
        crops = scenes.cached_pairs(a.pairs * 6 // 10, "train", cache=a.data, crops=True)
        pretrain.train_reader(
            data, out, crops=crops, summary_steps=a.steps or 5000, **options, **init
        )
    elif a.what in ("guided", "regression"):
        said = drawn(a, data) if a.said else None
        crops = (
            scenes.cached_pairs(a.crops, "train", "mild", cache=a.data, crops=True)
            if a.crops
            else None
        )
        pretrain.train_guided(
            data,
            weights.load(a.out / "tokenizer.safetensors"),
            out,
            use_codes=a.what == "guided",
            said=said,
            crops=crops,
            **options,
            **init,
        )
    elif a.what == "expert":
        folder = a.out if (a.out / "tokenizer.safetensors").exists() else weights.WEIGHTS
        vq, guided = (weights.load(folder / f"{n}.safetensors") for n in ("tokenizer", "guided"))
        experts.train_expert(data, vq, out, guided=guided, **options)
    else:
        device = pretrain.device_of(a.device)
        middle_size = a.size == "middle"
        vq, reader = (
            weights.load((with_file(a.out, n) if middle_size else a.out) / n, device)
            for n in NETWORKS
        )
        words, direct = vlcot.Vocabulary(vq.config.codes, reader.vocabulary), a.what == "direct"
        extra = {
            k: v
            for k, v in (
                ("lr", a.lr),
                ("batch", a.batch),
                ("init", a.init and a.init / f"policy-{a.what}"),
            )
            if v
        }
        with sft.first_process(a.device):
            if middle_size:
                from realsr_r1.reference import qwen as middle

                begin = extra.get("init") or middle.start(
                    a.base, a.out / "policy-start", vq.cpu(), reader.cpu(), not a.own_words, a.seed
                )
                extra = middle.SFT | extra | {"init": begin}
                extra["scale"] = middle.prepare(begin, "sft", a.full, a.device, extra["batch"])
                words, vq, reader = (
                    middle.config_of(begin).vocabulary,
                    vq.to(device),
                    reader.to(device),
                )
            val = scenes.cached_pairs(96, "val", cache=a.data)
            sets = [sft.chains(d, vq, reader, words, direct, a.data, device) for d in (data, val)]
        sft.train_sft(
            *sets,
            a.out / f"policy-{a.what}",
            vq.cpu(),
            reader.cpu(),
            seed=a.seed,
            device=a.device,
            max_steps=steps,
            **extra,
        )


NETWORKS = ("tokenizer.safetensors", "reader.safetensors")


def with_file(folder: Path, name: str) -> Path:
    """`folder` if it has the file, else the shipped weights."""
    from realsr_r1.first import weights

    return folder if (folder / name).exists() else weights.WEIGHTS


def drawn(a: argparse.Namespace, data):
    """The codes that the policy in the output folder draws for the first pairs."""
    from realsr_r1.first import policy, scenes, sft, weights

    lm, vq, reader = (
        policy.load(a.out / "policy-sft"),
        *(weights.load(a.out / f"{n}.safetensors") for n in ("tokenizer", "reader")),
    )
    first = scenes.Pairs(
        data.hr[: a.said], data.lr[: a.said], data.labels[: a.said], data.scenes[: a.said]
    )
    return sft.drawn_codes(
        lm, sft.chains(first, vq, reader, lm.vocabulary, cache=a.data), seed=a.seed
    )


def train_grpo(a: argparse.Namespace) -> None:
    import torch

    from realsr_r1.common import device_of
    from realsr_r1.first import experts, grpo, sft, weights

    if a.threads:
        torch.set_num_threads(a.threads)
    folder = a.init or (a.out if (a.out / a.start).exists() else weights.WEIGHTS)
    settings = grpo.GrpoSettings(
        steps=a.steps or RECIPE["grpo"],
        prompts=a.prompts,
        group=a.group,
        micro_batch=a.micro_batch,
        beta=a.beta,
        greedy_text=a.greedy_text,
        words=a.words,
        aggregation=a.aggregation,
        seed=a.seed,
        **({"lr": a.lr} if a.lr else {}),
    )
    scale, home = sft.Scale(), lambda name: with_file(folder, name) / name
    if a.size == "middle":
        from realsr_r1.reference import qwen as middle

        folder, home = a.init or a.out, lambda name: with_file(folder, name) / name
        settings = replace(settings, lr=a.lr or middle.GRPO.lr)
        scale = middle.prepare(
            folder / a.start, "grpo", a.full, a.device, settings.micro_batch, settings
        )
    device = device_of(a.device)
    vq, reader = (
        weights.load(home(NETWORKS[0]), device),
        weights.load(home(NETWORKS[1])),
    )  # rewards decode on the device
    expert = (
        experts.load_expert(a.expert, device, home("expert.safetensors"))
        if any(r.startswith("generation") for r in a.rewards)
        else None
    )
    functions, reward_weights = grpo.named_rewards(a.rewards, vq, expert)
    first = grpo.FIRST_SEED + 100_000 * a.seed
    start = folder / a.start
    if a.blend is not None:
        start = a.out / f"{a.start}-blend"
        grpo.policy.blend(
            with_file(folder, "policy-sft") / "policy-sft", folder / a.start, a.blend, start
        )
    lm = grpo.policy.load(start)
    dataset = grpo.prompts(
        range(first, first + settings.steps * settings.prompts), reader, lm.vocabulary
    )
    sheet = grpo.GroupSheet(a.out / f"{a.name}.png", reader, vq, settings)
    settings = replace(settings, weights=reward_weights)
    grpo.train_grpo(start, dataset, functions, a.out / a.name, settings, [sheet], a.device, scale)


def annotate(a: argparse.Namespace) -> None:
    if a.download:
        os.environ["HF_HUB_OFFLINE"] = "0"  # read once, when the hub's client is imported
    from realsr_r1.common import device_of
    from realsr_r1.corpus import annotate, captioners

    device, shard = device_of(a.device), annotate.shard_of(a.shard)
    captioner = captioners.load(a.model, a.weights, device)
    tagger = None if a.tagger == "none" else captioners.load(a.tagger, a.tagger_weights, device)
    sam = captioners.load("sam", a.sam_weights, device) if a.masks else None
    count = annotate.annotate(
        a.photos, captioner, tagger, a.out, shard, a.batch, a.split, a.limit, sam, a.masks
    )
    print(
        f"{count['new']} photos noted, {count['known']} were noted before, {count['left out']} "
        f"left out"
    )


def restore_reference(a: argparse.Namespace) -> None:
    if a.download:
        os.environ["HF_HUB_OFFLINE"] = "0"  # read once, when the hub's client is imported
    from realsr_r1.reference import restoring as reference

    reference.check_places(a.out, a.trace)
    load = {
        "tokenizer": a.tokenizer,
        "device": a.device,
        "bits": a.bits,
        "adapter": a.adapter,
        "device_map": a.device_map,
    }
    model = reference.load_reference(a.reference, **load)
    options = {"prompt": a.prompt, "sizes": a.sizes and tuple(a.sizes), "max_pixels": a.max_pixels}
    given = {k: v for k, v in options.items() if v}
    batch = 1 if a.window else a.batch or 1
    reference.restore_file(
        a.photo, a.out, a.trace, reference=model, seed=a.seed, batch=batch, window=a.window, **given
    )


def run(a: argparse.Namespace) -> None:
    check(a)
    if a.command == "train":
        return train_grpo(a) if a.what == "grpo" else train(a)
    if a.command == "annotate":
        return annotate(a)
    if a.command == "cost":
        from realsr_r1.planning import budget

        return budget.command(a)
    if a.reference:
        return restore_reference(a)
    from realsr_r1.first.restore import MAX_PIXELS, load_models, restore_file

    models = load_models(
        a.device, **({"weights": a.weights} if a.weights else {}), policy_name=a.policy
    )
    restore_file(
        a.photo,
        a.out,
        a.trace,
        models=models,
        seed=a.seed,
        decoder=a.decoder,
        batch=a.batch or 48,
        max_pixels=a.max_pixels or MAX_PIXELS,
    )


def said(e: Exception) -> str:
    """An error as one sentence: what is raised here is one already, what the
    system raises is not."""
    if not isinstance(e, OSError) or isinstance(e, FileNotFoundError):
        return str(e)
    if e.strerror:
        return (
            f"{f'{e.filename} cannot be used' if e.filename else 'the system refused'}, "
            f"{e.strerror}"
        )
    return " ".join(str(e).split()) or type(e).__name__


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    import torch

    try:
        run(a)
    except torch.OutOfMemoryError:
        print(
            "error: the device has too little memory: lower --batch, or use --device cpu",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {said(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
