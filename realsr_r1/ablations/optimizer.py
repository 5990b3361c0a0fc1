"""Which optimizer for supervised fine-tuning from scratch: Muon on matrices, or AdamW alone?

The same minutes, photographs, seed and schedule; what differs is the optimizer and its learning
rate. Measured by the loss of true chains on validation photographs.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from realsr_r1 import photographs, sft
from realsr_r1.common import seed_of
from realsr_r1.evaluation.chains import chain_metrics
from realsr_r1.files.writable import append_row, claim
from realsr_r1.pipeline import RealSR
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.pretraining import recipes
from realsr_r1.pretraining.loop import FitConfig
from realsr_r1.pretraining.recipes import Machine, PolicyLoss, Run


@dataclass(frozen=True)
class Settings:
    """One run of one optimizer at one peak learning rate."""

    photographs: Path | None
    out: Path
    muon: bool = True
    lr: float = 4e-3
    minutes: float = 20.0
    steps: int = 10**9
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{'muon' if self.muon else 'adamw'}-{self.lr:g}-{self.seed}"


def train(model: RealSR, s: Settings, machine: Machine) -> ChainPolicy:
    """One policy from scratch."""
    torch.manual_seed(s.seed)
    policy = ChainPolicy(PolicyConfig(codes=model.tokenizer.config.codes, dropout=0.1))
    policy.start_from(model.tokenizer, s.seed)
    data = photographs.Pairs(
        photographs.load("train", s.photographs), seed=seed_of("optimizer", s.seed)
    )
    fit = FitConfig(
        minutes=s.minutes, steps=s.steps, lr=s.lr, ema=0.98, seed=s.seed, warmup=30, log_every=20
    )
    run, loss = Run(s.out / s.name, machine, fit), PolicyLoss(muon=s.muon)
    return recipes.train_policy(policy, model.tokenizer, data, run, loss)


@torch.no_grad()
def measure(model: RealSR, policy: ChainPolicy, photos: list) -> dict[str, float]:
    """Loss per code of each image and share of words guessed right, given true chains."""
    data = photographs.Pairs(photos, training=False)
    found: dict[str, list[float]] = {}
    for i in range(len(data)):
        item = data[i]
        batch = sft.collate(policy.vocabulary)([item])
        lr = item["lr"][None].float().to(model.device) / 255
        hr = item["hr"][None].float().to(model.device) / 255
        ids = sft.fill(policy, batch["ids"].to(model.device), model.tokenizer.encode_steps(hr))
        for name, value in chain_metrics(policy, ids, lr).items():
            found.setdefault(name, []).append(float(value.mean()))
    return {name: round(sum(x) / len(x), 4) for name, x in found.items()}


def run(model: RealSR, photos: list, s: Settings, machine: Machine) -> dict:
    """Train, measure, and add a row to `out`/optimizer.csv. Raises ValueError where `out` holds a
    run of this name with other settings."""
    photographs.load("train", s.photographs)  # what is missing is told before a place is claimed
    claim(
        s.out / s.name / "settings.json", asdict(s) | {"model": model.name, "batch": machine.batch}
    )
    policy = train(model, s, machine).eval()
    steps = int(pd.read_csv(s.out / s.name / "log.csv")["step"].max())
    row = {"optimizer": s.name, "seed": s.seed, "steps": steps}
    row |= measure(model, policy, photos)
    append_row(s.out / "optimizer.csv", row)
    return row
