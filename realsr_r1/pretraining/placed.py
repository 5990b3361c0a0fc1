"""GRPO with credit by place: a code answers for its own region of the picture.

One reward for a whole picture says the same of its 336 codes. Here the picture is compared with
the photograph place by place, and each code of an image has the advantage, within the group, of
what lies around it. Five pairs of trainings learnt faster so (figures/RESULTS.md). It needs the
truth, as `ablations.rewards.ReferenceReward` does; words are not rewarded and only held by the KL.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from realsr_r1 import perceptual, vlcot
from realsr_r1.ablations.rewards import ReferenceReward
from realsr_r1.grpo import GrpoSettings
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining.sharded import ShardedTrainer

AROUND = 8  # pixels on each side of a code's own square that it answers for, too
ALONE = 0.3  # weight of the picture that the codes make without the LR photo


@torch.no_grad()
def errors(made: Tensor, hr: Tensor) -> Tensor:
    """LPIPS, place by place, plus the absolute difference of two batches (b, 3, h, w) in [0, 1] →
    (b, h, w)."""
    net = copy.copy(perceptual.lpips_alex(str(made.device)))  # shares the weights
    net.spatial = True
    return net(made, hr, normalize=True)[:, 0] + (made - hr).abs().mean(1)


def credit(error: Tensor, grid: int, group: int) -> Tensor:
    """Advantages (b, grid²) of an image's codes from errors (b, s, s): how far a code's region is
    better than its siblings', the `group` adjacent chains, in units of the batch's spread."""
    own = error.shape[-1] // grid
    size = own + 2 * AROUND
    mean = F.avg_pool2d(error[:, None], size, own, AROUND, count_include_pad=False)
    groups = -mean.view(-1, group, grid * grid)
    centered = groups - groups.mean(1, keepdim=True)
    return (centered / (centered.std() + 1e-6)).flatten(0, 1)


class PlacedTrainer(ShardedTrainer):
    """`ChainGRPOTrainer` whose advantages are by place; the log also has the likeness to the truth
    of the codes alone."""

    def __init__(
        self,
        start: RealSR,
        dataset: Dataset,
        out: Path,
        settings: GrpoSettings,
        device: str | None = None,
    ):
        rewards = [ReferenceReward(start.tokenizer)]
        super().__init__(start.policy, dataset, rewards, out, settings, device)
        start.tokenizer.to(self.accelerator.device)
        self.start = start

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        out = super()._generate_and_score_completions(inputs)
        ids, vocabulary = out["completion_ids"], self.policy.vocabulary
        chains = [vlcot.parse(vocabulary.decode(row)) for row in ids]
        hr = torch.stack([torch.as_tensor(x["hr"]) for x in inputs]).to(ids.device).float() / 255
        restored = self.start.finish(chains, out["pixel_values"]).to(ids.device)
        alone = self.start.decode(torch.stack([c.final_image for c in chains]))
        error = errors(restored, hr) + ALONE * errors(alone, hr)
        error = self.accelerator.gather(error)  # the spread is that of all processes' chains
        here = self.accelerator.process_index * len(ids)
        advantages = torch.zeros(ids.shape, device=ids.device)
        for tag, grid in zip(vlcot.IMAGE_TAGS, vlcot.GRIDS, strict=True):
            first = (ids == vocabulary.ids[f"<{tag}>"]).int().argmax(1) + 2  # after <image>
            places = first[:, None] + torch.arange(grid * grid, device=ids.device)
            found = credit(error, grid, self.settings.group)[here : here + len(ids)]
            advantages.scatter_(1, places, found)
        out["advantages"] = advantages
        return out
