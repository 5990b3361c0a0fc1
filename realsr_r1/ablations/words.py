"""Does GRPO make words righter, in the mode people use? From a small policy after a short cold
start, on photographs that the cold start has not seen, for the first two texts alone: minutes on
two cores. The control is as many sequences of more supervised fine-tuning.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from realsr_r1 import grpo, photographs, rewards
from realsr_r1.ablations.rewards import understanding_f1_reward
from realsr_r1.common import seed_of
from realsr_r1.evaluation import words
from realsr_r1.files.writable import claim
from realsr_r1.pipeline import RealSR
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.pretraining import recipes
from realsr_r1.pretraining.loop import FitConfig
from realsr_r1.pretraining.recipes import Machine, PolicyLoss, Run

SMALL = {"hidden_size": 128, "layers": 4, "mlp": 320, "eye_width": 64, "eye_blocks": 2}
BATCH = 24  # sequences per step of fine-tuning


@dataclass(frozen=True)
class Settings:
    """`cold` steps of fine-tuning on one half of the training photographs, then `steps` of GRPO on
    the other half, for which degradation labels and tags are known and captions are not."""

    photographs: Path | None
    out: Path
    cold: int = 100
    steps: int = 120
    prompts: int = 8  # groups per step of GRPO
    group: int = 8
    lr: float = 1e-4  # of GRPO
    reuse: int = 1  # of each pair in fine-tuning; see `PolicyLoss`
    f1: bool = True  # understanding as F1; else the paper's recall, which listing words earns
    seed: int = 0

    @property
    def judges(self) -> list[rewards.Reward]:
        understanding = understanding_f1_reward if self.f1 else rewards.understanding_reward
        return [rewards.degradation_reward, understanding]

    @property
    def run(self) -> grpo.GrpoSettings:
        return grpo.GrpoSettings(
            steps=self.steps,
            prompts=self.prompts,
            group=self.group,
            micro_batch=math.gcd(64, self.prompts * self.group),
            lr=self.lr,
            beta=0.01,
            parts=grpo.WORDS,
            save_steps=100,
            seed=self.seed,
        )


def halves(photos: list) -> tuple[list, list]:
    """Photographs for the cold start and for GRPO."""
    return photos[::2], photos[1::2]


def fine_tune(
    model: RealSR, policy: ChainPolicy, steps: int, name: str, s: Settings
) -> ChainPolicy:
    """The policy after `steps` more of true first words; a copy."""
    first = name == "cold"
    data = photographs.Pairs(
        halves(photographs.load("train", s.photographs))[0],
        seed=seed_of("chain", 2 * s.seed + (0 if first else 1)),
    )
    fit = FitConfig(
        minutes=10**6, steps=steps, lr=3e-3, ema=0.97, warmup=20, seed=s.seed, log_every=20
    )
    loss = PolicyLoss(tags=grpo.WORDS, own=0.0, reuse=s.reuse)
    run = Run(s.out / f"{name}-{s.seed}", Machine(str(policy.device), BATCH), fit)
    start = copy.deepcopy(policy)
    return recipes.train_policy(start, model.tokenizer, data, run, loss).eval()


def kept(folder: Path, make: Callable[[], ChainPolicy], device: torch.device) -> ChainPolicy:
    """The policy in a folder; where there is none, it is made and saved there."""
    if (folder / "model.safetensors").exists():
        return ChainPolicy.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    policy = make()
    policy.save_pretrained(folder)
    return policy


def run(model: RealSR, photos: list, s: Settings) -> dict[str, words.Words]:
    """Cold start, GRPO and its control, of one seed, measured on `photos`; the policies and the
    log go to `out`. Raises ValueError where `out` holds a run of other settings."""
    other = halves(photographs.load("train", s.photographs))[1]  # told before a place is claimed
    claim(s.out / f"settings-{s.seed}.json", asdict(s) | {"model": model.name})

    def cold() -> ChainPolicy:
        torch.manual_seed(s.seed)
        blank = ChainPolicy(PolicyConfig(codes=model.tokenizer.config.codes, **SMALL))
        blank.start_from(model.tokenizer, s.seed)
        return fine_tune(model, blank.to(model.device), s.cold, "cold", s)

    start = kept(s.out / f"start-{s.seed}", cold, model.device)
    found = {"cold start": words.measure(start, photos)}
    g, out = s.run, s.out / f"grpo-{s.seed}"

    def reinforced() -> ChainPolicy:
        asked = grpo.prompts(other, g.steps * g.prompts, seed=seed_of("grpo", s.seed))
        copied = copy.deepcopy(start)
        return grpo.train_grpo(copied, asked, s.judges, out, g, model.device.type)

    trained = kept(out, reinforced, model.device)
    found["GRPO"] = words.measure(trained.to(model.device), photos)
    steps = g.steps * g.prompts * g.group // BATCH
    control = partial(fine_tune, model, start, steps, "more", s)
    more = kept(s.out / f"more-{s.seed}", control, model.device)
    found["more fine-tuning"] = words.measure(more, photos)
    return found
