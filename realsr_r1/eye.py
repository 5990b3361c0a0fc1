"""The eye: a small CNN that gives the policy the LR photo's pixels as features; and a second one.

Codes of the LR photo would lose what the policy must perceive (noise, blur, JPEG traces, fine
shapes): predicting image codes from pixels is better by 0.1 to 0.3 nats than from codes. But a few
thousand photographs do not teach what things look like: the second eye has seen a million.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realsr_r1.perceptual import MAPS, alexnet_maps
from realsr_r1.photographs import SIDE
from realsr_r1.tokenizer import ChannelNorm, ResBlock

PATCHES = 8  # per side: what the prompt holds


class Eye(nn.Module):
    """LR photo (b, 3, h, w) in [0, 1] → map (b, hidden, h/2, w/2): a vector per final code."""

    def __init__(self, hidden: int, width: int = 96, blocks: int = 4):
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width, 3, padding=1),
            *[ResBlock(width) for _ in range(blocks)],
            ChannelNorm(width),
            nn.SiLU(),
            nn.Conv2d(width, hidden, 1),
        )
        self.patch = nn.Linear(4 * hidden, hidden)

    def forward(self, lr: Tensor) -> Tensor:
        return self.body(lr * 2 - 1)

    def patches(self, features: Tensor) -> Tensor:
        """Map (b, hidden, 16, 16) → the prompt's patches (b, 64, hidden), row by row."""
        return self.patch(F.pixel_unshuffle(features, 2).flatten(2).transpose(1, 2))


class SecondEye(nn.Module):
    """LR photo (b, 3, h, w) in [0, 1] → what AlexNet sees in it, for the prompt's patches (b, 64,
    hidden), as a vision-language model has an encoder trained before. ImageNet's network, the one
    behind LPIPS, stays frozen and is no part of the weights; what is learnt, how to put its maps
    into the policy's terms, begins at 0: so a trained policy can take it in."""

    def __init__(self, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.ModuleList([ChannelNorm(width) for width in MAPS])
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(sum(MAPS), hidden)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, lr: Tensor) -> Tensor:
        large = F.interpolate(lr.float(), size=SIDE, mode="bicubic", align_corners=False)
        maps = zip(self.norm, alexnet_maps(large.clamp(0, 1)), strict=True)
        x = torch.cat(
            [norm(F.interpolate(x, size=PATCHES, mode="bilinear")) for norm, x in maps], 1
        )
        return self.out(self.drop(x.flatten(2).transpose(1, 2).to(self.out.weight.dtype)))
