"""The LR photo's own reading: codes that keep what a picture tokenizer wipes out, namely how the photo was degraded.

A tokenizer trained for pictures is a denoiser: noise, blur and JPEG traces vanish from its codes, so the policy could
not perceive them. The reader gives a 32×32 photo 272 codes, laid out as 17 rows of 16:

    16 rows   near-lossless codes of 2×2 LR pixels: where everything is
    1 row     summary codes, each from the whole photo: they must name degradation and content through small heads

Tried first: the same heads on the pixel codes. After 13,000 photos blur, noise and compression were still named at
chance (25–30% of four levels), while the background had risen to 78%: a code of 2×2 pixels sees too little of it.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realsr_r1.tokenizer import Codebook, ResBlock


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of the two codebooks, of the networks, and the heads: what the summary must name → number of classes."""

    codes: int = 1024
    summary_codes: int = 256
    summary: int = 16  # summary codes a photo: one row
    code_dim: int = 8
    width: int = 48
    heads: dict[str, int] = field(default_factory=dict)


class LabelBody(nn.Module):
    """A small CNN: image or feature map (b, c, h, w) → (b, 4·width), mean and maximum over the picture."""

    def __init__(self, channels: int, width: int = 48, stride: int = 2):
        super().__init__()

        def layer(i: int, o: int, s: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU())

        self.layers = nn.Sequential(
            layer(channels, width), layer(width, width, stride), layer(width, width), layer(width, 2 * width, 2), layer(2 * width, 2 * width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)


class LRReader(nn.Module):
    """LR photo (b, 3, h, w) in [0, 1] → codes (b, h/2 + 1, w/2); w/2 must be the length of the summary row."""

    def __init__(self, config: ReaderConfig = ReaderConfig()):
        super().__init__()
        self.config = config
        c, d = config.width, config.code_dim
        self.encoder = nn.Sequential(nn.Conv2d(12, c, 3, padding=1), ResBlock(c), nn.Conv2d(c, d, 1))
        self.decoder = nn.Sequential(nn.Conv2d(d, c, 3, padding=1), ResBlock(c), nn.Conv2d(c, 12, 3, padding=1))
        self.quantize = Codebook(config.codes, d, 0.25)
        self.body = LabelBody(3, c)
        self.to_summary = nn.Linear(4 * c, config.summary * d)
        self.quantize_summary = Codebook(config.summary_codes, d, 0.25)
        self.head = nn.Sequential(nn.Linear(config.summary * d, 128), nn.ReLU())
        self.heads = nn.ModuleDict({k: nn.Linear(128, n) for k, n in config.heads.items()})

    @property
    def vocabulary(self) -> int:
        """Number of different codes: pixel codes first, then summary codes."""
        return self.config.codes + self.config.summary_codes

    @property
    def vectors(self) -> Tensor:
        """The unit vector of every code, (vocabulary, d)."""
        return F.normalize(torch.cat([self.quantize.weight, self.quantize_summary.weight]), dim=1)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Photo → pixel latents (b, d, h/2, w/2) and summary latents (b, d, 1, summary)."""
        z = self.encoder(F.pixel_unshuffle(x * 2 - 1, 2))
        s = self.to_summary(self.body(x - 0.5)).unflatten(1, (self.config.code_dim, 1, self.config.summary))
        return z, s

    def encode(self, x: Tensor) -> Tensor:
        """Photo → codes (b, h/2 + 1, w/2), int64: the pixel codes, and below them the summary row."""
        if x.shape[-1] != 2 * self.config.summary or x.shape[-2] % 2:
            raise ValueError(
                f"the reader takes photos {2 * self.config.summary} pixels wide and an even height, got {x.shape[-1]}x{x.shape[-2]}: cut them into tiles"
            )
        z, s = self.latents(x)
        return torch.cat([self.quantize.nearest(z), self.quantize_summary.nearest(s) + self.config.codes], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Photo → its reconstruction from the pixel codes, the heads' logits from the summary codes, codebook loss."""
        z, s = self.latents(x)
        qz, _, loss_z = self.quantize(z)
        qs, _, loss_s = self.quantize_summary(s)
        y = (F.pixel_shuffle(self.decoder(qz), 2) + 1) / 2
        h = self.head(qs.flatten(1))
        return y, {k: head(h) for k, head in self.heads.items()}, loss_z + loss_s
