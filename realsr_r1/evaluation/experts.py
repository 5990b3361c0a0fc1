"""Visual experts: how good a picture looks, without its original.

The nano expert is trained by ranking (the idea of RankIQA, Liu et al. 2017, arXiv 1707.08347): of
two pictures it must prefer the one that LPIPS calls closer to its original. Simplification: LPIPS
stands in for people. The paper's experts are in `evaluation.quality`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parents[1] / "assets" / "weights"
Expert = Callable[[Tensor], Tensor]


class _Residual(nn.Module):
    """Two 3×3 convolutions around the identity, without norm: levels of noise must stay."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class NanoExpert(nn.Module):
    """Pictures (b, 3, h, w) in [0, 1], from 16 px up → quality (b,) in (0, 1), higher is better. It
    pools by mean, by deviation and over the worst quarter of the regions: one ruined corner spoils
    a picture."""

    def __init__(self, width: int = 48, worst: int = 16):
        super().__init__()
        wide = 2 * width
        self.fine = nn.Sequential(
            nn.Conv2d(7 * 16, width, 3, padding=1), nn.SiLU(), _Residual(width), nn.SiLU()
        )
        self.coarse = nn.Sequential(
            nn.Conv2d(width, wide, 3, 2, 1),
            nn.SiLU(),
            _Residual(wide),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, 2, 1),
            nn.SiLU(),
        )
        self.local = nn.Conv2d(wide, worst, 1)
        self.head = nn.Sequential(
            nn.Linear(2 * width + 2 * wide + worst, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    @staticmethod
    def inputs(x: Tensor) -> Tensor:
        """(b, 3, h, w) → (b, 112, h/4, w/4): colors, high-pass residual and log local contrast,
        4×4 pixels folded."""
        x = F.pad(x, (0, -x.shape[-1] % 8, 0, -x.shape[-2] % 8), mode="replicate").float()
        high = x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        energy = F.pad(high.square().mean(1, keepdim=True), (2, 2, 2, 2), mode="replicate")
        contrast = 0.3 * (F.avg_pool2d(energy, 5, 1) + 1e-6).log() + 2
        return F.pixel_unshuffle(torch.cat([x - 0.5, 8 * high, contrast], 1), 4)

    def logits(self, x: Tensor) -> Tensor:
        """Quality before the sigmoid, (b,): what the ranking loss compares. ValueError for 8-bit
        pictures."""
        if not x.is_floating_point():
            raise ValueError(f"the expert takes floats in [0, 1], got {x.dtype}: divide by 255")
        fine = self.fine(self.inputs(x.to(self.local.weight.device)))
        coarse, pooled = self.coarse(fine), []
        for m in (fine.float(), coarse.float()):
            pooled += [m.mean((2, 3)), (m.var((2, 3), correction=0) + 1e-6).sqrt()]
        local = self.local(coarse).flatten(2).sort(-1).values
        pooled.append(local[..., : max(1, local.shape[-1] // 4)].float().mean(-1))
        return self.head(torch.cat(pooled, 1)).flatten().float()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(x)).to(x.device)


def load_expert(
    device: str | torch.device = "cpu", path: str | Path = WEIGHTS / "expert.safetensors"
) -> NanoExpert:
    """The nano expert. FileNotFoundError, ValueError where its weights are absent or damaged."""
    path = Path(path)
    if not path.exists():
        where = f"weights {path.name} are missing in {path.parent.name}/"
        raise FileNotFoundError(f"{where}: train them (realsr train expert) or reinstall")
    try:
        model = NanoExpert()
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise ValueError(
            f"weights {path.name} are damaged or not the nano expert's: copy or train them again"
        ) from e
    return model.to(device).eval().requires_grad_(False)
