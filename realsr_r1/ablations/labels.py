"""How well can the five degradation labels be named at all? A yardstick for the chain's first
sentence: a plain CNN, trained on the LR photo's pixels for nothing but these labels.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from realsr_r1 import photographs
from realsr_r1.degradation import LABELS, LEVELS, RESIZES, from_words
from realsr_r1.evaluation.experts import NanoExpert
from realsr_r1.evaluation.nano import SEVERITIES, cluster_of
from realsr_r1.pretraining.loop import Fit, FitConfig
from realsr_r1.pretraining.recipes import Machine, Replay, autocast, forever
from realsr_r1.stats import clustered
from realsr_r1.tokenizer import ResBlock

CLASSES = {name: RESIZES if name.endswith("resize") else LEVELS for name in LABELS}


class Namer(nn.Module):
    """LR photos (b, 3, 32, 32) in [0, 1] → logits of the five labels, side by side (b, 18). It sees
    what the nano expert sees, local contrast included; no norm, for levels of noise must stay."""

    def __init__(self, width: int = 128, blocks: int = 4):
        super().__init__()
        parts = [ResBlock(width, norm=False) for _ in range(blocks)]
        self.body = nn.Sequential(nn.Conv2d(7 * 16, width, 3, padding=1), *parts, nn.SiLU())
        sizes = sum(map(len, CLASSES.values()))
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, sizes))

    def forward(self, lr: Tensor) -> Tensor:
        x = self.body(NanoExpert.inputs(lr)).flatten(2).float()
        return self.head(torch.cat([x.mean(-1), x.std(-1)], 1))

    def parts(self, lr: Tensor) -> list[Tensor]:
        """The logits label by label, in the order of LABELS."""
        return list(self(lr).split([len(c) for c in CLASSES.values()], 1))


def targets(items: list[dict]) -> Tensor:
    """The true labels of pairs as class numbers (b, 5)."""
    named = [from_words(x["degradation"]) for x in items]
    return torch.tensor([[CLASSES[k].index(x[k]) for k in LABELS] for x in named])


def _collate(items: list[dict]) -> dict:
    out = {k: torch.stack([x[k] for x in items]) for k in ("hr", "lr")}
    return out | {"labels": targets(items)}


def _small(batches: Iterator[dict]) -> Iterator[dict]:
    for batch in batches:
        yield {"lr": (batch["lr"] * 255).round().byte(), "labels": batch["labels"]}


def train(data: Dataset, out: Path, machine: Machine, fit: FitConfig, reuse: int = 2) -> Namer:
    """Cross-entropy on damaged photographs, each pair used about `reuse` times; returns the
    averaged weights. They stay in the checkpoint, for a measuring that is stopped."""
    torch.manual_seed(fit.seed)
    model = Namer().to(machine.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.lr, weight_decay=0.02)
    training = Fit(model, optimizer, out, fit)
    pairs = forever(data, machine, lambda: training.step * machine.batch / reuse, _collate)
    source = Replay(_small(pairs), machine.batch, reuse)

    def loss_of(step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(source)
        with autocast(machine.device):
            parts = model.parts(batch["lr"].float() / 255)
        each = zip(parts, batch["labels"].unbind(1), strict=True)
        return sum(F.cross_entropy(p.float(), t) for p, t in each), {}

    trained = training.run(loss_of).eval()
    training.save()
    return trained


@dataclass(frozen=True)
class Right:
    """Whether each label or name of one photo was right, 1 or 0, and which photo it was."""

    severity: str
    file: str
    cluster: str
    labels: dict[str, float]


@torch.no_grad()
def measured(
    photos: list, right: Callable[[Tensor, dict], dict[str, float]], seed: int = 0
) -> list[Right]:
    """What is `right`, given an LR photo (1, 3, 32, 32) in [0, 1] and its item, on the pairs of
    `realsr eval table` with the same seed, so that the two can be compared."""
    rows = []
    for severity in SEVERITIES:
        data = photographs.Pairs(photos, f"nano-{severity}", seed=seed, training=False)
        for i, photo in enumerate(photos):
            item = data[i]
            found = right(item["lr"][None].float() / 255, item)
            rows.append(Right(severity, photo.file, cluster_of(vars(photo)), found))
    return rows


def measure(model: Namer, photos: list, seed: int = 0) -> list[Right]:
    """Which labels the network names right."""

    def right(lr: Tensor, item: dict) -> dict[str, float]:
        found = [int(p.argmax()) for p in model.parts(lr.to(next(model.parameters()).device))]
        pairs = zip(LABELS, found, targets([item])[0].tolist(), strict=True)
        return {k: float(a == b) for k, a, b in pairs}

    return measured(photos, right, seed)


Said = dict[tuple[str, str], dict]  # by severity and file what the chain named rightly


def said_in(table: Path | None, photos: list, names: tuple[str, ...] = LABELS) -> Said:
    """The chain's rows of a CSV of `realsr eval table`; {} for None. ValueError for another CSV, or
    one without all `photos`: said before a training, and not after it."""
    if table is None:
        return {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not rows or not {"severity", "file", "blur", *names} <= set(rows[0]):
        raise ValueError(f"{table} is no table that realsr eval table has written")
    said = {(r["severity"], r["file"]): r for r in rows if r["blur"]}
    if missing := [p.file for s in SEVERITIES for p in photos if (s, p.file) not in said]:
        what = "measure the same photographs (--split, --photographs)"
        raise ValueError(f"{table} lacks {missing[0]}: {what}")
    return said


def report(rows: list[Right], said: Said, who: str = "CNN on the LR pixels") -> str:
    """Markdown: the share of each label that `who` names right; beside the chain's share and its
    paired difference where it has `said` something of the same photos."""
    head = ["label", who] + ["the chain", "chain minus it"] * bool(said)
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    clusters = [r.cluster for r in rows]
    for k in rows[0].labels:
        right = [r.labels[k] for r in rows]
        cells = [k, str(clustered(right, clusters))]
        if said:
            chain = [float(said[r.severity, r.file][k]) for r in rows]
            minus = [a - b for a, b in zip(chain, right, strict=True)]
            cells += [str(clustered(chain, clusters)), str(clustered(minus, clusters))]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"
