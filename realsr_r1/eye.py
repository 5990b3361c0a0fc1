"""The eye: a small CNN that gives the policy the LR photo's pixels as features.

Codes of the LR photo would lose what the policy must perceive (noise, blur, JPEG traces, fine
shapes): predicting image codes from pixels is better by 0.1 to 0.3 nats than from codes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from realsr_r1.tokenizer import ChannelNorm, ResBlock


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
