"""The LR photo's own reading: codes that keep what a picture tokenizer wipes out, namely how the
photo was degraded.

A tokenizer trained for pictures is a denoiser: noise, blur and JPEG traces vanish from its codes,
so the policy could not perceive them. The reader gives a 32×32 photo 272 codes, laid out as 17 rows
of 16:

    16 rows   codes of 2×2 LR pixels: where everything is (colours and edges; fine noise is mostly
              lost here, too)
    1 row     summary codes, each from the whole photo: they must name degradation and content
              through small heads

The summary looks at features that show degradation plainly, instead of learning them: the
coefficients of JPEG's own 8×8 blocks (Wallace 1992) and the spectrum of the whole photo; and, for
the content, at the upper layers of AlexNet (ImageNet; the weights that LPIPS needs anyway). Tried
first: heads on the pixel codes (at chance on degradation after 13,000 photos), and a small CNN on
the pixels (blur 49%, noise 55%, compression 38% on unseen scenes after 9 minutes).
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realsr_r1.first.tokenizer import Codebook, ResBlock
from realsr_r1.perceptual import alex_layers


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of the two codebooks, of the networks, and the heads: what the summary must name →
    number of classes."""

    codes: int = 1024
    summary_codes: int = 256
    summary: int = 16  # summary codes a photo: one row
    code_dim: int = 8
    width: int = 48
    hidden: int = 256  # of each of the summary's two networks
    heads: dict[str, int] = field(default_factory=dict)


SIZE = 32  # pixels; the features below are of photos (tiles) of this size
SIGNAL_FEATURES = 2 * 4 * 3 * 64 + 3 * SIZE * (SIZE // 2 + 1)
CONTENT_FEATURES = 2 * (384 + 256 + 256)


def luma_chroma(x: Tensor) -> Tensor:
    """RGB (b, 3, h, w) in [0, 1] → JPEG's Y, Cb, Cr without the offset, in units of 1/255."""
    r, g, b = (255 * x).unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, 0.564 * (b - y), 0.713 * (r - y)], 1)


def block_dct(x: Tensor) -> Tensor:
    """(b, c, h, w) → the DCT-II coefficients of its 8×8 blocks, (b, c, blocks, 8, 8), orthonormal
    (JPEG's transform)."""
    n = torch.arange(8, device=x.device, dtype=x.dtype)
    basis = torch.cos(math.pi * (2 * n[None] + 1) * n[:, None] / 16) / 2
    basis[0] /= math.sqrt(2)
    blocks = (
        x[..., : x.shape[-2] // 8 * 8, : x.shape[-1] // 8 * 8]
        .unfold(2, 8, 8)
        .unfold(3, 8, 8)
        .flatten(2, 3)
    )
    return basis @ blocks @ basis.T


@torch.no_grad()
def signal_features(x: Tensor) -> Tensor:
    """Photos (b, 3, 32, 32) in [0, 1] → (b, SIGNAL_FEATURES): what shows blur, noise, resizing and
    compression.

    Per DCT coefficient, over the blocks of JPEG's grid and of one moved by half a block: mean,
    minimum and spread of the log magnitude, and how often it is about zero (quantised away); then
    the log magnitudes of the photo's spectrum.
    """
    z, parts = luma_chroma(x), []
    for shift in (0, 4):
        size = block_dct(z[..., shift:, shift:]).abs()
        log = (size + 0.3).log()
        parts += [log.mean(2), log.amin(2), log.std(2), (size < 0.6).float().mean(2)]
    window = torch.hann_window(SIZE, periodic=False, device=x.device)
    spectrum = torch.fft.rfft2((z - z.mean((2, 3), keepdim=True)) * window * window[:, None]).abs()
    return torch.cat([p.flatten(1) for p in (*parts, (spectrum + 1).log())], 1)


@torch.no_grad()
def content_features(x: Tensor) -> Tensor:
    """Photos (b, 3, h, w) in [0, 1] → (b, CONTENT_FEATURES): mean and maximum of AlexNet's last
    three layers, seen at 128 px."""
    layers = alex_layers(
        F.interpolate(x, size=4 * SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    )[2:]
    return torch.cat([f for h in layers for f in (h.mean((2, 3)), h.amax((2, 3)))], 1)


class PixelCodes(nn.Module):
    """2×2 LR pixels ↔ one code."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        c, d = config.width, config.code_dim
        self.config = config
        self.encoder = nn.Sequential(
            nn.Conv2d(12, c, 3, padding=1), ResBlock(c), nn.Conv2d(c, d, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(d, c, 3, padding=1), ResBlock(c), nn.Conv2d(c, 12, 3, padding=1)
        )
        self.quantize = Codebook(config.codes, d, 0.25)

    def latents(self, x: Tensor) -> Tensor:
        """Photo (b, 3, h, w) in [0, 1] → (b, d, h/2, w/2)."""
        return self.encoder(F.pixel_unshuffle(x * 2 - 1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Photo → its reconstruction from the codes (not clamped), and the codebook loss."""
        q, _, loss = self.quantize(self.latents(x))
        return (F.pixel_shuffle(self.decoder(q), 2) + 1) / 2, loss


class SummaryCodes(nn.Module):
    """Features of a whole photo → one row of codes, from which small heads must name degradation
    and content."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.config = config
        half = config.summary * config.code_dim // 2

        def branch(features: int) -> nn.Sequential:
            return nn.Sequential(
                nn.BatchNorm1d(features, affine=False),
                nn.Dropout(0.2),
                nn.Linear(features, config.hidden),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Linear(config.hidden, half),
            )

        self.signal, self.content = branch(SIGNAL_FEATURES), branch(CONTENT_FEATURES)
        self.quantize = Codebook(config.summary_codes, config.code_dim, 0.25)
        self.head = nn.Sequential(nn.Linear(2 * half, 192), nn.ReLU())
        self.heads = nn.ModuleDict({k: nn.Linear(192, n) for k, n in config.heads.items()})

    def latents(self, signal: Tensor, content: Tensor) -> Tensor:
        """The two feature rows (b, ·) → (b, d, 1, summary): the first half of the codes is the
        signal's."""
        z = torch.cat([self.signal(signal), self.content(content)], 1)
        return z.unflatten(1, (1, self.config.summary, self.config.code_dim)).permute(0, 3, 1, 2)

    def forward(self, signal: Tensor, content: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Features → the heads' logits, and the codebook loss."""
        q, _, loss = self.quantize(self.latents(signal, content))
        h = self.head(q.permute(0, 2, 3, 1).flatten(1))
        return {k: head(h) for k, head in self.heads.items()}, loss


class LRReader(nn.Module):
    """LR photo (b, 3, 32, 32) in [0, 1] → codes (b, 17, 16)."""

    def __init__(self, config: ReaderConfig = ReaderConfig()):
        super().__init__()
        self.config = config
        self.pixels, self.summary = PixelCodes(config), SummaryCodes(config)

    @property
    def vocabulary(self) -> int:
        """Number of different codes: pixel codes first, then summary codes."""
        return self.config.codes + self.config.summary_codes

    @property
    def vectors(self) -> Tensor:
        """The unit vector of every code, (vocabulary, d)."""
        return F.normalize(
            torch.cat([self.pixels.quantize.weight, self.summary.quantize.weight]), dim=1
        )

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Photo → codes (b, 17, 16), int64: the pixel codes, and below them the summary row."""
        if x.shape[-2:] != (SIZE, SIZE):
            raise ValueError(
                f"the reader takes photos of {SIZE}x{SIZE} pixels, got "
                f"{x.shape[-1]}x{x.shape[-2]}: cut them into tiles"
            )
        summary = self.summary.quantize.nearest(
            self.summary.latents(signal_features(x), content_features(x))
        )
        return torch.cat(
            [self.pixels.quantize.nearest(self.pixels.latents(x)), summary + self.config.codes], 1
        )
