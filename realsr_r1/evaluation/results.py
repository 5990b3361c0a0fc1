"""The first results table: what the shipped weights do on held-out scenes, with bootstrap
intervals, by one command.

    python -m realsr_r1.first evaluate

Held-out means: cut-outs, background photographs and compositions of the `test` split, which no
training has seen.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from realsr_r1 import images as photos
from realsr_r1 import images as viz
from realsr_r1 import perceptual
from realsr_r1.first import degradation, policy, pretrain, probe, scenes, tokenizer, vlcot, weights
from realsr_r1.first.policy import Sampling
from realsr_r1.first.restore import Models, decode_final, restore, think


def bootstrap(
    values: np.ndarray | Tensor, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of (n,) values and the 95% percentile interval of the mean over
    `resamples` resamples."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or len(v) == 0:
        raise ValueError(f"bootstrap needs a non-empty list of values, got shape {v.shape}")
    rng = np.random.default_rng(seed)
    means = v[rng.integers(0, len(v), (resamples, len(v)))].mean(1)
    lo, hi = np.percentile(means, [2.5, 97.5])
    return float(v.mean()), float(lo), float(hi)


@torch.no_grad()
def picture_scores(output: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """PSNR (RGB, dB, higher is better) and LPIPS-alex (lower is better) of (b, 3, h, w) in [0, 1] →
    (b,) each."""
    return {"PSNR": perceptual.psnr(output, hr), "LPIPS": perceptual.distance(output, hr)}


def text_scores(
    chain: vlcot.Chain, scene: scenes.Scene, labels: dict[str, str]
) -> dict[str, float]:
    """1 for each statement of the chain that is true: the five labels, and the words for the object
    and background."""
    found = chain.labels
    scores = {k: float(found.get(k) == v) for k, v in labels.items()}
    rough, middle = (chain.rough_understand or "").split(), (chain.middle_understand or "").split()
    return scores | {
        "category": float(scene.category in rough),
        "kind": float(scene.kind in middle),
        "background": float(scene.background in rough),
    }


@torch.no_grad()
def run_methods(
    models: Models,
    data: scenes.Pairs,
    direct: policy.Qwen3ForCausalLM | None,
    regression: tokenizer.GuidedDecoder | None,
    how: Sampling,
    seed: int = 0,
    batch: int = 32,
) -> tuple[dict, dict, dict]:
    """Restore every LR image by every method: picture scores, the chain's text scores, and the
    first 24 outputs of each."""
    pictures: dict[str, dict[str, list]] = {}
    texts: dict[str, list[float]] = {}
    keep: dict[str, list[Tensor]] = {}
    for at in tqdm(range(0, len(data), batch), desc="evaluate", mininterval=10):
        hr, lr = data.hr[at : at + batch].float() / 255, data.lr[at : at + batch].float() / 255
        g = torch.Generator().manual_seed(seed + at)
        chains = think(models, lr, how, g)
        codes = torch.stack([c.final_image for c in chains])
        up = F.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
        outputs = {
            "bicubic": up,
            "chain, guided decoder": decode_final(models, codes, lr),
            "chain, plain + wavelet": decode_final(models, codes, lr, "wavelet"),
            "true codes, guided (upper bound)": decode_final(
                models, models.tokenizer.encode(hr), lr
            ),
            "random codes, guided (control)": decode_final(
                models,
                torch.randint(0, models.tokenizer.config.codes, codes.shape, generator=g),
                lr,
            ),
            "LR's own codes, guided (control)": decode_final(
                models, models.tokenizer.encode(up), lr
            ),
        }
        if direct is not None:
            own = Models(models.tokenizer, models.reader, models.guided, direct)
            outputs["direct, guided decoder"] = decode_final(
                models,
                torch.stack([c.final_image for c in think(own, lr, how, g, direct=True)]),
                lr,
            )
        if regression is not None:
            outputs["feed-forward regression"] = regression(lr).clamp(0, 1)
        for name, y in outputs.items():
            for metric, v in picture_scores(y, hr).items():
                pictures.setdefault(name, {}).setdefault(metric, []).extend(v.tolist())
            if at < 24:
                keep.setdefault(name, []).extend(y[: 24 - at])
        for i, chain in enumerate(chains):
            for k, v in text_scores(chain, data.scenes[at + i], data.labels[at + i]).items():
                texts.setdefault(k, []).append(v)
    return pictures, texts, keep


def valid_share(
    models: Models, data: scenes.Pairs, n: int, how: Sampling, seed: int = 0, batch: int = 32
) -> Tensor:
    """Free sampling, no grammar: 1 for each of the first n completions that is a well-formed chain,
    (n,)."""
    v, out = models.policy.vocabulary, []
    for at in range(0, min(n, len(data)), batch):
        lr = data.lr[at : min(at + batch, n)].float() / 255
        ids = policy.sample(
            models.policy,
            v.prompts(models.reader.encode(lr)),
            how,
            torch.Generator().manual_seed(seed + at),
            use_grammar=False,
        ).ids
        out += [float(vlcot.well_formed(v.decode(row))) for row in ids]
    return torch.tensor(out)


def cell(values, digits: int = 3, percent: bool = False) -> str:
    """Mean and interval for a table, as in 0.123 [0.100, 0.150]."""
    m, lo, hi = bootstrap(values)
    return (
        f"{m:.1%} [{lo:.1%}, {hi:.1%}]"
        if percent
        else f"{m:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]"
    )


def first_results(
    models: Models,
    out: Path,
    n: int = 512,
    cnn_pairs: int = 12_000,
    cnn_steps: int = 1200,
    cache: Path | None = None,
    seed: int = 0,
    how: Sampling | None = None,
) -> dict:
    """Measure everything of the first table on `n` test scenes and write results.json, results.md
    and contact_sheet.webp.

    The CNN on LR pixels and the probe on the reader's codes are trained here, on training scenes,
    as yardsticks.
    """
    out.mkdir(parents=True, exist_ok=True)
    how = how or Sampling()
    started = time.time()
    data = scenes.cached_pairs(n, "test", cache=cache)
    train, crops = (
        scenes.cached_pairs(k, "train", cache=cache, crops=c)
        for k, c in ((cnn_pairs, False), (cnn_pairs // 2, True))
    )
    folder = weights.WEIGHTS
    direct = policy.load(folder / "policy-direct") if (folder / "policy-direct").exists() else None
    regression = (
        weights.load(folder / "regression.safetensors")
        if (folder / "regression.safetensors").exists()
        else None
    )
    pictures, texts, keep = run_methods(models, data, direct, regression, how, seed)
    valid = valid_share(models, data, min(n, 256), replace(how, greedy_text=False), seed)
    yardsticks = {}
    for name, reader in (("cnn", None), ("probe", models.reader)):
        net = probe.train_labelnet(train, reader, crops, steps=cnn_steps, seed=seed)
        yardsticks[name] = {k: v.tolist() for k, v in probe.label_accuracy(net, data).items()}

    lines = ["| method | PSNR (RGB, dB) ↑ | LPIPS-alex ↓ |", "|---|---|---|"]
    lines += [f"| {m} | {cell(s['PSNR'], 2)} | {cell(s['LPIPS'])} |" for m, s in pictures.items()]
    lines += [
        "",
        "| said by the chain | right | CNN on LR pixels | probe on the reader's codes |",
        "|---|---|---|---|",
    ]
    for k in (*degradation.LABELS, "category", "kind", "background"):
        lines.append(
            f"| {k} | {cell(texts[k], percent=True)} | "
            f"{cell(yardsticks['cnn'][k], percent=True)} | "
            f"{cell(yardsticks['probe'][k], percent=True)} |"
        )
    tables, used = pretrain.measure_tokenizer(models.tokenizer, models.guided, data, seed=seed)
    vgg = perceptual.lpips_vgg() is not None
    lines += [
        "",
        f"| the tokenizer alone ({used:.0%} of its codes in use) | PSNR | LPIPS-alex "
        f"|{' LPIPS-vgg |' if vgg else ''}",
        "|---|---|---|" + "---|" * vgg,
    ]
    for name, v in tables.items():
        extra = (f" {cell(v['LPIPS-vgg'])} |" if "LPIPS-vgg" in v else " |") if vgg else ""
        lines.append(f"| {name} | {cell(v['PSNR'], 2)} | {cell(v['LPIPS-alex'])} |{extra}")
    lines += [
        "",
        f"Free sampling without the grammar gives a well-formed chain in "
        f"{cell(valid, percent=True)} of {len(valid)}.",
    ]
    base = np.array(pictures["bicubic"]["LPIPS"])
    for m in (
        "direct, guided decoder",
        "feed-forward regression",
        "LR's own codes, guided (control)",
        "bicubic",
    ):
        if m in pictures:
            diff = np.array(pictures["chain, guided decoder"]["LPIPS"]) - np.array(
                pictures[m]["LPIPS"]
            )
            lines.append(
                f"LPIPS, chain minus {m} (paired): {cell(diff)}"
                + (f", that is {diff.mean() / base.mean():+.0%}." if m == "bicubic" else ".")
            )
    note = (
        f"{n} test scenes, preset nano, seed {seed}, {models.device}, "
        f"{time.strftime('%Y-%m-%d')}, {(time.time() - started) / 60:.0f} min; 95% bootstrap "
        f"intervals."
    )
    (out / "results.md").write_text("\n".join([*lines, "", note, ""]))
    record = {
        "note": note,
        "pictures": pictures,
        "texts": texts,
        "yardsticks": yardsticks,
        "tokenizer": tables,
        "valid": valid.tolist(),
    }
    (out / "results.json").write_text(json.dumps(record))
    columns = [
        "bicubic",
        "chain, plain + wavelet",
        *(["direct, guided decoder"] if direct is not None else []),
        *(["feed-forward regression"] if regression is not None else []),
        "chain, guided decoder",
    ]
    rows = [
        [data.lr[i].float() / 255, *(keep[c][i] for c in columns), data.hr[i].float() / 255]
        for i in range(min(24, n))
    ]
    viz.grid(rows, ["LR", *columns, "HR"], side=128).save(
        out / "contact_sheet.webp", quality=85, method=6
    )
    print("\n".join([*lines, "", note]))
    return record


def demo(out: Path, models: Models, crop: tuple[int, int] = (80, 56), seed: int = 0) -> Image.Image:
    """Restore the centre of each shipped real low-quality photo, print its chain of thought, and
    draw the picture."""
    rows = []
    for path in sorted((scenes.ASSETS / "real_lr").glob("*.webp")):
        image = photos.open_photo(path)
        w, h = min(crop[0], image.width), min(crop[1], image.height)
        left, top = (image.width - w) // 2, (image.height - h) // 2
        image = image.crop((left, top, left + w, top + h))
        result, trace = restore(image, models, seed=seed, progress=False)
        middle = trace["tiles"][len(trace["tiles"]) // 2]
        print(
            f"\n{path.stem}  {w}x{h} → {result.width}x{result.height}, {len(trace['tiles'])} "
            f"tiles; the chain of the middle tile:",
            flush=True,
        )
        for tag in vlcot.TAGS:
            part = middle[tag]
            if isinstance(part, list):
                part = f"{len(part) * 8}x{len(part[0]) * 8} px image"
            print(f"  {tag:18s} {part}")
        x, y = middle["x"], middle["y"]
        steps = [
            models.tokenizer.decode(torch.tensor(middle[t])[None].to(models.device))[0].cpu()
            for t in vlcot.IMAGE_TAGS
        ]
        box = (x, y, x + 32, y + 32)
        tile = result.crop(tuple(4 * v for v in box))
        rows.append(
            [
                photos.to_tensor(image.crop(box)),
                *steps,
                photos.to_tensor(tile),
                photos.to_tensor(image),
                photos.to_tensor(result),
            ]
        )
    picture = viz.grid(
        rows,
        [
            "LR tile",
            "rough image",
            "middle image",
            "final image",
            "restored tile",
            "LR photo",
            "restored photo",
        ],
        side=176,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    print(f"\nwrote {out.name}")
    return picture
