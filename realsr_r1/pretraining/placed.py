"""GRPO with credit by place: each code of a picture answers for the region it draws.

One reward for a whole picture says the same to its 336 codes, the good and the bad. Where the truth
is known, the error of a restoration is known at each place, so each code can be compared with the
codes that the other chains of its group drew at the same place. Ours, not the paper's: it takes the
true HR photo, which a visual expert does not need.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from realsr_r1 import perceptual, rewards
from realsr_r1.ablations.rewards import pixels
from realsr_r1.experts import load_expert
from realsr_r1.photographs import Pairs, Photograph
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining.sharded import ShardedTrainer
from realsr_r1.rewards import column, text_of
from realsr_r1.sampling import Sampling
from realsr_r1.tokenizer import FACTOR
from realsr_r1.vlcot import GRIDS, parse, render

L1 = 2.0  # beside LPIPS, as in the training of the tokenizer


def error_map(made: Tensor, true: Tensor) -> Tensor:
    """LPIPS-alex + 2·L1 of pictures (b, 3, h, w) in [0, 1] at each code's place (b, h/8, w/8), each
    averaged over the 3×3 codes around it, as far as the decoder spreads a code."""
    net = perceptual.lpips_alex(str(made.device))
    net.spatial = True  # the published module's own switch: a map in place of its mean
    try:
        far = net(made, true, normalize=True)
    finally:
        net.spatial = False
    whole = far + L1 * (made - true).abs().mean(1, keepdim=True)
    cells = F.avg_pool2d(whole, FACTOR)
    return F.avg_pool2d(cells, 3, 1, padding=1, count_include_pad=False)[:, 0]


def place_advantages(errors: Tensor, group: int) -> Tensor:
    """Advantages (n, 336) of the codes of all three images, in the order in which they are written,
    from errors (n, 16, 16) of final images; the `group` chains of a photo are adjacent.

    A code of a coarser image answers for the mean over its region. Centered within the group at
    each place; divided by one standard deviation per image, so that places where chains hardly
    differ are not blown up (as in Dr. GRPO, arXiv 2503.20783)."""
    out = []
    for n in GRIDS:
        e = F.avg_pool2d(errors[:, None], GRIDS[-1] // n).flatten(1).unflatten(0, (-1, group))
        gain = (e.mean(1, keepdim=True) - e).flatten(0, 1)
        out.append(gain / (gain.std() + 1e-8))
    return torch.cat(out, 1)


class PlaceReward:
    """1 minus the mean error of the restoration, clipped to [0, 1], for the log; `errors`
    (n, 16, 16) of the last call are what the trainer takes its advantages from."""

    columns = ("lr", "hr")

    def __init__(self, model: RealSR):
        self.model, self.errors, self.__name__ = model, None, "place_reward"

    @torch.no_grad()
    def __call__(self, completions: Sequence, lr: Sequence, hr: Sequence, **_) -> list[float]:
        n = len(completions)
        small, true = (
            torch.stack([pixels(v, i) for i, v in enumerate(column(k, x, n))])
            for k, x in (("lr", lr), ("hr", hr))
        )
        codes = torch.stack([parse(text_of(c)).final_image for c in completions])
        made = self.model.decode(codes, small)
        self.errors = error_map(made, true.to(made.device))
        return (1 - self.errors.mean((1, 2))).clamp(0, 1).tolist()


class HeldOut(TrainerCallback):
    """Every few steps the error of the same held-out photographs, as `restore` draws them: CSV."""

    def __init__(self, model: RealSR, photos: list[Photograph], path: Path, every: int = 10):
        data = Pairs(photos, "nano", training=False)
        items = [data[i] for i in range(len(data))]
        self.lr, self.hr = (torch.stack([x[k] for x in items]) / 255 for k in ("lr", "hr"))
        self.truth = {k: [x[k] for x in items] for k in ("degradation", "tags")}
        self.rewards = {
            "degradation": rewards.degradation_reward,
            "understanding": rewards.understanding_reward,
            "generation": rewards.GenerationReward(load_expert(), model.tokenizer),
        }
        self.model, self.path, self.every = model, path, every

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Means over the photographs of lpips, psnr and three of the rewards."""
        own = [torch.Generator().manual_seed(i) for i in range(len(self.lr))]
        self.model.policy.eval()
        chains = self.model.sample(self.lr, Sampling(image_temperature=1.0), own).chains
        made = self.model.finish(chains, self.lr)
        measures = {"lpips": perceptual.distance, "psnr": perceptual.psnr}
        found = {k: float(f(made, self.hr).mean()) for k, f in measures.items()}
        said = [render(c) for c in chains]
        return found | {k: float(np.mean(r(said, **self.truth))) for k, r in self.rewards.items()}

    def _row(self, step: int) -> None:
        rows = pd.read_csv(self.path).to_dict("records") if self.path.exists() else []
        rows = [r for r in rows if r["step"] < step] + [{"step": step} | self.measure()]
        pd.DataFrame(rows).to_csv(self.path, index=False)

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step % self.every == 0 and state.is_world_process_zero:
            self._row(state.global_step)

    def on_train_end(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            self._row(state.global_step)


class PlacedTrainer(ShardedTrainer):
    """The trainer whose codes have their advantages by place, and its words those of the other
    rewards. Give a PlaceReward the weight 0: what it says of the whole is for the log."""

    def __init__(self, judge: PlaceReward, *args, weight: float = 1.0, **more):
        self.judge, self.weight = judge, weight
        super().__init__(*args, **more)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        out = super()._generate_and_score_completions(inputs)
        ids = out["completion_ids"]
        cell = self.grammar.cell[self.grammar.states(ids)]
        gain = place_advantages(self.judge.errors.to(ids.device), self.settings.group)
        by_place = gain.gather(1, cell.clamp(min=0)) * (cell >= 0)
        out["advantages"] = out["advantages"] + self.weight * by_place
        return out
