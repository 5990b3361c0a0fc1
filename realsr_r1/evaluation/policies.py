"""Policies side by side: the same held-out scenes, the same noise, the four rewards and what was
not rewarded.

Chains are sampled as in reinforcement learning (temperature 1, under the grammar). LPIPS and FSIM
compare with the true photo and were in no reward; differences are paired by scene, with 95%
bootstrap intervals.
"""

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from realsr_r1 import perceptual
from realsr_r1.evaluation import results as evaluate
from realsr_r1.first import degradation, experts, policy, rewards, scenes, vlcot
from realsr_r1.first.policy import Sampling
from realsr_r1.first.restore import Models, decode_final

HIGHER = {"LPIPS": False}  # everything else: higher is better


@torch.no_grad()
def score_policy(
    models: Models,
    data: scenes.Pairs,
    expert: Callable[[Tensor], Tensor],
    how: Sampling,
    seed: int = 0,
    batch: int = 32,
) -> dict[str, list[float]]:
    """One chain for each pair: the four rewards and their sum, labels right, LPIPS and FSIM of the
    guided restoration. `expert` must take pictures on the tokenizer's device."""
    v, device = models.policy.vocabulary, next(models.tokenizer.parameters()).device
    structure = experts.create("fsim", device)
    generation = rewards.GenerationReward(expert, models.tokenizer)
    out: dict[str, list[float]] = {}
    for at in tqdm(range(0, len(data), batch), desc="chains", mininterval=10):
        hr, lr = (t[at : at + batch].to(device).float() / 255 for t in (data.hr, data.lr))
        # The noise depends on the seed alone, so every policy answers the same question with the
        # same luck.
        ids = policy.sample(
            models.policy,
            v.prompts(models.reader.encode(lr)),
            how,
            torch.Generator().manual_seed(seed + at),
        ).ids
        texts = [v.decode(row) for row in ids.cpu()]
        labels, shown = data.labels[at : at + batch], data.scenes[at : at + batch]
        row = {
            "format": rewards.format_reward(texts),
            "degradation": rewards.degradation_reward(
                texts, [degradation.to_words(la) for la in labels]
            ),
            "understanding": rewards.understanding_reward(texts, [s.tags for s in shown]),
            "generation": generation(texts),
        }
        row["total reward"] = [sum(r) for r in zip(*row.values(), strict=True)]
        chains = [vlcot.parse(t) for t in texts]
        for name in ("blur", "noise", "compression"):
            row[name] = [
                float(c.labels.get(name) == la[name]) for c, la in zip(chains, labels, strict=True)
            ]
        restored = decode_final(models, torch.stack([c.final_image for c in chains]).to(device), lr)
        row["LPIPS"] = perceptual.distance(restored, hr).tolist()
        row["FSIM"] = structure(restored, hr).flatten().tolist()
        for name, values in row.items():
            out.setdefault(name, []).extend(values)
    return out


def table(scores: dict[str, dict[str, list[float]]], base: str) -> list[str]:
    """Markdown: a row for each measure, each policy's mean, and the paired difference of every
    other policy to `base`."""
    others = [name for name in scores if name != base]
    lines = [
        f"| | {' | '.join(scores)} | {' | '.join(f'{o} - {base} (paired)' for o in others)} |",
        "|---" * (1 + len(scores) + len(others)) + "|",
    ]
    for measure in scores[base]:
        arrow = "↑" if HIGHER.get(measure, True) else "↓"
        cells = [evaluate.cell(s[measure]) for s in scores.values()]
        cells += [
            evaluate.cell(np.array(scores[o][measure]) - np.array(scores[base][measure]))
            for o in others
        ]
        lines.append(f"| {measure} {arrow} | {' | '.join(cells)} |")
    return lines


def compare(
    models: dict[str, Models],
    out: Path,
    expert: Callable[[Tensor], Tensor],
    n: int = 512,
    cache: Path | None = None,
    seed: int = 0,
    how: Sampling | None = None,
    name: str = "grpo",
    first: int = 0,
) -> dict:
    """Measure policies on `n` test scenes, from scene `first` on, and write `out`/`name`.md, .csv
    and .json; the first policy is the baseline. Where scenes have helped to choose a policy,
    `first` leaves them out."""
    out.mkdir(parents=True, exist_ok=True)
    started, data = time.time(), scenes.cached_pairs(first + n, "test", cache=cache)
    data = scenes.Pairs(data.hr[first:], data.lr[first:], data.labels[first:], data.scenes[first:])
    scores = {}
    for label, m in models.items():
        scores[label] = score_policy(m, data, expert, how or Sampling.rollout(), seed)
        (out / f"{name}.json").write_text(json.dumps(scores))  # what is done is kept
    lines = table(scores, next(iter(models)))
    note = (
        f"{n} test scenes{f' (from number {first} on)' if first else ''}, one chain each, seed "
        f"{seed}, {next(iter(models.values())).device}, {time.strftime('%Y-%m-%d')}, "
        f"{(time.time() - started) / 60:.0f} min; 95% bootstrap intervals."
    )
    (out / f"{name}.md").write_text("\n".join([*lines, "", note, ""]))
    with (out / f"{name}.csv").open("w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["policy", "measure", "mean", "low", "high"])
        w.writerows(
            [label, k, *evaluate.bootstrap(v)] for label, s in scores.items() for k, v in s.items()
        )
    print("\n".join([*lines, "", note]))
    return scores
