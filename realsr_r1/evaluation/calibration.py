"""Experts side by side: how far each can be trusted as a reward, on held-out scenes.

    python -m realsr_r1.first evaluate --experts nano niqe piqe

An expert has to put pictures of rising severity in order, and to agree with LPIPS, which sees the
original: over spoilt codes, where differences are large, and over what policies really draw, where
they are small. Writes experts.md, .csv, .webp.
"""

import csv
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from realsr_r1 import perceptual
from realsr_r1.first import experts, policy, scenes, vlcot
from realsr_r1.first.policy import Sampling
from realsr_r1.first.restore import Models

COLUMNS = ("expert", "pairs in order", "of all pairs", "spoilt codes", "within a scene")


@torch.no_grad()
def drawn(
    models: Models, data: scenes.Pairs, batch: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """One chain for each pair, sampled as in reinforcement learning → final images by the plain
    decode (n, 3, h, w), on the CPU, as the generation reward sees them, and their LPIPS (n,)."""
    device, v, images, away = (
        next(models.tokenizer.parameters()).device,
        models.policy.vocabulary,
        [],
        [],
    )
    for at in range(0, len(data), batch):
        hr, lr = (t[at : at + batch].to(device).float() / 255 for t in (data.hr, data.lr))
        ids = policy.sample(
            models.policy,
            v.prompts(models.reader.encode(lr)),
            Sampling.rollout(),
            torch.Generator().manual_seed(seed + at),
        ).ids
        codes = torch.stack([vlcot.parse(v.decode(row)).final_image for row in ids.cpu()]).to(
            device
        )
        images.append(models.tokenizer.decode(codes).cpu())
        away.append(perceptual.distance(images[-1], hr.cpu()))
    return torch.cat(images), torch.cat(away)


def plot(found: dict[str, dict], path: Path) -> None:
    """A panel for each expert: its score against LPIPS, of spoilt codes and of what the policies
    drew."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(found), 3.2), layout="constrained")
    for axis, (name, c) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        spoilt = [
            (d, score)
            for kind, severity, _, score, d in c["rows"]
            if kind in experts.DECODED and severity > 0
        ]
        axis.scatter(*zip(*spoilt, strict=True), s=2, color="0.7", label="spoilt codes")
        for (label, (scores, away)), colour in zip(
            c["chains"].items(), ("#0072B2", "#D55E00", "#009E73"), strict=False
        ):
            axis.scatter(away, scores, s=4, color=colour, label=label)
        axis.set(title=name, xlabel="LPIPS (less is better)", ylim=(-0.02, 1.02))
    figure.axes[0].set_ylabel("score (more is better)")
    figure.axes[0].legend(fontsize=7, markerscale=2)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 85})


def calibrate(
    names: Iterable[str],
    models: dict[str, Models],
    out: Path,
    n: int = 64,
    chains: int = 256,
    cache: Path | None = None,
    nano: Path = experts.WEIGHTS / "expert.safetensors",
) -> dict[str, dict]:
    """Calibrate experts on the first `n` test scenes and on `chains` chains of each policy of
    `models`; write `out`/experts.*.

    An expert whose files are absent is skipped, with the reason in the table's text. Raises
    ValueError for an unknown name, and FileNotFoundError if none of the experts can be had.
    """
    out.mkdir(parents=True, exist_ok=True)
    started, first = time.time(), next(iter(models.values()))
    data = scenes.cached_pairs(max(n, chains), "test", cache=cache)
    some, many = (
        scenes.Pairs(data.hr[:k], data.lr[:k], data.labels[:k], data.scenes[:k])
        for k in (n, chains)
    )
    pictures = {label: drawn(m, many) for label, m in models.items()}
    found, skipped = {}, []
    for name in names:
        try:
            expert = experts.load_expert(name, first.device, nano)
        except FileNotFoundError as e:
            skipped.append(f"{name}: skipped, {experts.plain(e).removeprefix(f'{name}: ')}.")
            print(skipped[-1], flush=True)
            continue
        c = found[name] = experts.calibrate(expert, some, first.tokenizer, first.guided)
        c["chains"] = {
            label: (
                torch.cat([expert(x.to(first.device)).cpu() for x in images.split(16)]).tolist(),
                away.tolist(),
            )
            for label, (images, away) in pictures.items()
        }
    if not found:
        raise FileNotFoundError("; ".join(skipped))
    head = [*COLUMNS, *(f"chains of {label}" for label in models)]
    rows = [
        [
            name,
            c["ordered"],
            c["ordered_all"],
            c["spearman"],
            c["spearman_scene"],
            *(experts.spearman(*v) for v in c["chains"].values()),
        ]
        for name, c in found.items()
    ]
    kinds = list(next(iter(found.values()))["by_kind"])
    lines = [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(
            f"| {r[0]} | {r[1]:.1%} | {r[2]:.1%} | {' | '.join(f'{x:.2f}' for x in r[3:])} |"
            for r in rows
        ),
        "",
        "Pairs: two severities of one kind on one scene, ranked rightly; where LPIPS agrees by "
        "0.02, and all. The other columns are Spearman's rank correlation "
        "with LPIPS (-1 is perfect).",
        "",
        f"| pairs in order, by kind | {' | '.join(kinds)} |",
        "|---" * (1 + len(kinds)) + "|",
        *(
            f"| {name} | {' | '.join(format(c['by_kind'][k], '.0%') for k in kinds)} |"
            for name, c in found.items()
        ),
        "",
        *skipped,
        *[""] * bool(skipped),
        f"{n} test scenes at {len(experts.LEVELS)} severities, {chains} chains of each policy, "
        f"plain decode, {first.device}, {time.strftime('%Y-%m-%d')}, "
        f"{(time.time() - started) / 60:.0f} min.",
    ]
    (out / "experts.md").write_text("\n".join([*lines, ""]))
    with (out / "experts.csv").open("w", newline="") as f:
        csv.writer(f).writerows([head, *rows])
    plot(found, out / "experts.webp")
    print("\n".join(lines))
    return found
