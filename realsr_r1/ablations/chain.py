"""Is the chain worth it? Policies from scratch that draw the final image with or without what
comes before it in a chain, on the same photographs and with the same decoder.

Two comparisons: equal pairs (the direct policy sees as many photographs) and equal compute (as many
tokens: its sequences are shorter, so it sees more photographs). The ablation "1-D positions" takes
the aligned inputs away (`PolicyConfig.aligned`). "eye alone" is the control below both: every code
is drawn from the LR photo, knowing none of the other codes. `warm`: the controls of a trained
chain, which begin with its weights and forget the chain.
"""

import copy
import csv
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from realsr_r1 import perceptual, photographs, sft
from realsr_r1.common import atomic, seed_of
from realsr_r1.evaluation.chains import chain_metrics
from realsr_r1.evaluation.nano import cluster_of
from realsr_r1.files.writable import claim
from realsr_r1.grpo import without_dropout
from realsr_r1.pipeline import RealSR
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.pretraining import recipes
from realsr_r1.pretraining.loop import FitConfig
from realsr_r1.pretraining.recipes import Machine, PolicyLoss, Run
from realsr_r1.pretraining.redraw import blank_codes, final_codes, redraw
from realsr_r1.sampling import Sampling, sample
from realsr_r1.stats import clustered
from realsr_r1.vlcot import GRIDS, IMAGE_TAGS, PATCH_TOKENS, image_length

DIRECT = (IMAGE_TAGS[-1],)
SEVERITIES = ("medium", "heavy")
VARIANTS = (
    "chain",
    "direct, equal pairs",
    "direct, equal compute",
    "eye alone, equal pairs",
    "chain, 1-D positions",
)
MEASURED = VARIANTS[:4]  # unless others are asked for


@dataclass(frozen=True)
class Settings:
    """One run: `steps` of the chain policy, the other variants in proportion."""

    photographs: Path | None
    out: Path
    steps: int = 600
    seed: int = 0
    lr: float = 3e-3
    reuse: int = 1
    hidden: int = 224  # width of the policy; its other widths in proportion
    layers: int = 6
    variants: tuple[str, ...] = MEASURED
    warm: bool = False  # start from the model's policy, which is then the chain itself

    def __post_init__(self) -> None:
        if unknown := set(self.variants) - set(VARIANTS):
            raise ValueError(f"no variant {unknown.pop()!r}: choose from {'; '.join(VARIANTS)}")
        if self.warm and "chain, 1-D positions" in self.variants:
            raise ValueError(
                "a trained chain keeps its positions: 1-D ones are learnt from scratch"
            )
        if self.hidden % 8:
            raise ValueError(
                f"a width of {self.hidden} has no four even heads: take one of 8, 16 …"
            )

    def policy(self, codes: int, aligned: bool) -> PolicyConfig:
        """The policies' shape: at `hidden` 224 the shipped one's."""
        hidden = self.hidden
        return PolicyConfig(
            codes=codes,
            hidden_size=hidden,
            layers=self.layers,
            mlp=hidden * 18 // 7,
            eye_width=hidden * 3 // 7,
            dropout=0.0,  # a short run does not overfit, and attention without it is twice as fast
            aligned=aligned,
        )


def tags_of(variant: str) -> tuple[str, ...]:
    """The parts of a chain that a variant writes."""
    return sft.TAGS if variant.startswith("chain") else DIRECT


def length_ratio(words: int = 40) -> float:
    """Tokens of a chain with so many words for one token of a direct sequence."""
    chain = PATCH_TOKENS + 1 + words + 2 * len(sft.TAGS) + sum(map(image_length, GRIDS)) + 1
    return chain / (PATCH_TOKENS + 1 + 2 + image_length(GRIDS[-1]) + 1)


def place(s: Settings, variant: str) -> Path:
    """Where a variant's log, checkpoints and weights go."""
    return s.out / f"{variant.replace(', ', '-').replace(' ', '-')}-{s.seed}"


def train(model: RealSR, variant: str, s: Settings, machine: Machine) -> ChainPolicy:
    """One policy, from scratch or from the model's."""
    torch.manual_seed(s.seed)
    if s.warm and variant == "chain":
        return model.policy
    policy = without_dropout(copy.deepcopy(model.policy)).train()
    if not s.warm:
        aligned = variant != "chain, 1-D positions"
        policy = ChainPolicy(s.policy(model.tokenizer.config.codes, aligned))
        policy.start_from(model.tokenizer, s.seed)
    steps = round(s.steps * (length_ratio() if variant.endswith("compute") else 1))
    data = photographs.Pairs(
        photographs.load("train", s.photographs), seed=seed_of("chain", s.seed)
    )
    fit = FitConfig(minutes=10**6, steps=steps, lr=s.lr, ema=0.99, seed=s.seed)
    loss = PolicyLoss(tags=tags_of(variant), reuse=s.reuse, blank=variant.startswith("eye"))
    return recipes.train_policy(
        policy, model.tokenizer, data, Run(place(s, variant), machine, fit), loss
    )


@torch.no_grad()
def draw(policy: ChainPolicy, ids: Tensor, lr: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """Codes (b, 16, 16) of final images drawn for LR photos (b, 3, 32, 32), and the loss per code
    (b,) of the true ones in chains `ids` (b, n), given those before them."""
    if variant.startswith("eye"):
        seen = blank_codes(policy, ids)
        drawn = redraw(policy, seen, lr, Sampling().image_temperature)
        return final_codes(policy, drawn), chain_metrics(policy, ids, lr, seen)[IMAGE_TAGS[-1]]
    g = torch.Generator().manual_seed(0)
    codes = sample(policy, lr, Sampling(), g, policy.grammar(tags_of(variant))).codes
    return codes, chain_metrics(policy, ids, lr)[IMAGE_TAGS[-1]]


@torch.no_grad()
def measure(model: RealSR, policy: ChainPolicy, variant: str, photos: list) -> list[dict]:
    """LPIPS and PSNR of drawn final images, decoded beside the LR photo, and the loss of the true
    ones in nats a code; one row a photograph."""
    rows, device, collate = [], model.device, sft.collate(policy.vocabulary, tags_of(variant))
    for severity in SEVERITIES:
        data = photographs.Pairs(photos, f"nano-{severity}", training=False)
        for first in range(0, len(data), 48):
            items = [data[i] for i in range(first, min(first + 48, len(data)))]
            batch = {k: v.to(device) for k, v in collate(items).items()}
            lr, hr = (batch[k].float() / 255 for k in ("lr", "hr"))
            ids = sft.fill(policy, batch["ids"], model.tokenizer.encode_steps(hr))
            codes, nats = draw(policy, ids, lr, variant)
            made = model.tokenizer.decode(codes, lr, trust=1.0, clean=False)  # codes are compared
            figures = (perceptual.distance(made, hr), perceptual.psnr(made, hr), nats)
            for item, d, p, n in zip(items, *figures, strict=True):
                photo = photos[item["index"]]
                row = {k: getattr(photo, k) for k in ("source", "file", "author")}
                row |= {"severity": severity, "lpips": float(d), "psnr": float(p)}
                rows.append(row | {"nats": float(n)})
    return rows


def run(model: RealSR, photos: list, s: Settings, machine: Machine) -> Path:
    """Train and measure the variants of one seed; rows go to `out`/chain-<seed>.csv as each is
    done. Raises ValueError where `out` holds a run of other settings."""
    photographs.load("train", s.photographs)  # what is missing is told before a place is claimed
    how = asdict(s) | {"batch": machine.batch, "model": model.name, "n": len(photos)}
    claim(s.out / f"settings-{s.seed}.json", how)
    path = s.out / f"chain-{s.seed}.csv"
    rows: list[dict] = []
    for variant in s.variants:
        policy = train(model, variant, s, machine)
        if variant.startswith("direct"):  # for `realsr eval benchmark --methods direct`
            RealSR(model.tokenizer, policy.eval()).save_pretrained(
                place(s, variant), "policy-direct"
            )
        found = measure(model, policy, variant, photos)
        rows += [{"variant": variant, "seed": s.seed, **row} for row in found]
        with atomic(path) as part:
            pd.DataFrame(rows).to_csv(part, index=False)
    return path


def table(paths: list[Path]) -> str:
    """Markdown: every variant's LPIPS and PSNR over all seeds, and the paired difference of the
    first one, usually the chain, to each of the others."""
    rows = [
        r for path in paths for r in csv.DictReader(path.open(newline="", encoding="utf-8-sig"))
    ]

    def of(variant: str, key: str) -> np.ndarray:
        return np.array([float(r[key]) for r in rows if r["variant"] == variant])

    variants = list(dict.fromkeys(r["variant"] for r in rows))
    clusters = [cluster_of(r) for r in rows if r["variant"] == variants[0]]
    out = [
        f"| policy | LPIPS ↓ | PSNR ↑ | nats per final code ↓ | {variants[0]} minus it, LPIPS |",
        "|---|---|---|---|---|",
    ]
    for v in variants:
        difference = clustered(of(variants[0], "lpips") - of(v, "lpips"), clusters)
        last = "" if v == variants[0] else str(difference)
        lpips, psnr, nats = (of(v, key).mean() for key in ("lpips", "psnr", "nats"))
        out.append(f"| {v} | {lpips:.3f} | {psnr:.2f} | {nats:.2f} | {last} |")
    return "\n".join(out) + "\n"


def seeds(model: RealSR, photos: list, s: Settings, machine: Machine, n: int) -> list[Path]:
    """`run` with n seeds, one after another."""
    return [run(model, photos, replace(s, seed=s.seed + i), machine) for i in range(n)]
