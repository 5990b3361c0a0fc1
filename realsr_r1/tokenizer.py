"""Images as tokens: a VQ autoencoder whose one decoder may also look at the LR photo.

Quantizer: l2-normalized codes, straight-through gradient, revival of dead codes (Yu et al. 2022,
ViT-VQGAN; LlamaGen, arXiv 2406.06525, uses the same). The decoder upsamples by nearest neighbor and
3×3 convolutions: a pixel shuffle at the output leaves its lattice. Codes or LR photo are left out
at random in training, so one set of weights gives the plain decode (codes alone, the paper's way),
restoration (both) and control (LR alone); the last two have an ending of their own (`clean`).
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from realsr_r1.common import check_number


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape of the tokenizer. A code stands for 8×8 HR pixels, that is 2×2 LR pixels."""

    codes: int = 2048
    code_dim: int = 8
    encoder: tuple[int, int] = (64, 128)  # channels at 1/4 and 1/8 of the resolution
    decoder: tuple[int, int, int, int] = (128, 80, 40, 20)  # at 1/8, 1/4, 1/2 and 1
    lr_width: int = 48
    blocks: int = 2  # residual blocks at 1/8 and 1/4
    commitment: float = 0.25
    trust: float = 0.5  # of a code's vector beside an LR photo; the rest is that for "no codes"
    trust_clean: float = 0.35  # the same beside one that is read as clean: it says more itself
    wide_blocks: int = 6  # of the second ending

    def __post_init__(self) -> None:
        check_number("trust", self.trust, 0.0, 1.0)
        check_number("trust_clean", self.trust_clean, 0.0, 1.0)


Opt = Tensor | None
FACTOR = 8  # HR pixels per code, per axis
SCALE = 4  # of super-resolution: HR pixels per LR pixel


def bicubic(lr: Tensor) -> Tensor:
    """(b, 3, h, w) → (b, 3, 4h, 4w), not clamped."""
    return F.interpolate(lr, scale_factor=SCALE, mode="bicubic", align_corners=False)


class Codebook(nn.Module):
    """l2-normalized vector quantizer with straight-through gradient, which counts its use."""

    def __init__(self, codes: int, dim: int, commitment: float):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(codes, dim), dim=1))
        self.commitment = commitment
        self.register_buffer("usage", torch.ones(codes), persistent=False)

    def nearest(self, z: Tensor) -> Tensor:
        """(b, d, h, w) encoder output → (b, h, w) indices of the closest codes by cosine."""
        rows = F.normalize(z.float(), dim=1).permute(0, 2, 3, 1)
        return (rows @ F.normalize(self.weight, dim=1).T).argmax(-1)

    def embed(self, codes: Tensor) -> Tensor:
        """(b, h, w) indices → (b, d, h, w) unit vectors."""
        return F.normalize(self.weight, dim=1)[codes].permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, d, h, w) → quantized (b, d, h, w), codes (b, h, w), loss ()."""
        z = F.normalize(z.float(), dim=1)
        codes = self.nearest(z)
        q = self.embed(codes)
        loss = F.mse_loss(q, z.detach()) + self.commitment * F.mse_loss(z, q.detach())
        if self.training:
            count = torch.bincount(codes.flatten(), minlength=len(self.weight)).float()
            self.usage.lerp_(count * (len(self.weight) / count.sum()), 0.01)  # 1: average use
        return z + (q - z).detach(), codes, loss * z.shape[1]

    @torch.no_grad()
    def revive(self, z: Tensor, threshold: float = 0.05) -> int:
        """Move codes used less than `threshold` of the average onto random encoder outputs of
        (b, d, h, w); returns how many."""
        dead = (self.usage < threshold).nonzero().flatten()
        pool = F.normalize(z.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        self.weight[dead] = pool[torch.randint(len(pool), (len(dead),), device=pool.device)]
        self.usage[dead] = 1.0
        return len(dead)


class ChannelNorm(nn.Module):
    """Each pixel's channels (b, c, h, w) divided by their root mean square: unlike by a group norm,
    a large photo is decoded as its parts are."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.float().square().mean(1, keepdim=True) + 1e-6).rsqrt()
        return x * scale.to(x.dtype) * self.weight


class ResBlock(nn.Module):
    """x + two 3×3 convolutions, which begin as 0; without `norm` colors stay exact."""

    def __init__(self, width: int, norm: bool = True):
        super().__init__()
        parts = []
        for _ in range(2):
            parts += [ChannelNorm(width)] if norm else []
            parts += [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.body = nn.Sequential(*parts)
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class WideBlock(nn.Module):
    """x + a 7×7 convolution of each channel and two 1×1 (ConvNeXt, Liu et al. 2022), which begins
    as 0: it sees far for a quarter of a ResBlock's weights."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            ChannelNorm(width),
            nn.Conv2d(width, 2 * width, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, width, 1),
        )
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


_up = nn.Upsample(scale_factor=2.0, mode="nearest")


def _enlarge(x: Tensor, later: Iterable[nn.Module]) -> Tensor:
    """Features (b, c, h/4, w/4) → a correction (b, 3, h, w), by layers for 1/2, 1 and output."""
    at2, at1, out = later
    return out(at1(_up(at2(_up(x)))))


def _blocks(width: int, n: int, norm: bool = True) -> nn.Sequential:
    return nn.Sequential(*[ResBlock(width, norm) for _ in range(n)])


class Ending(nn.Module):
    """The decoder's last layers once more and deeper, for pictures beside an LR photo: wide blocks
    at 1/4 on the features (b, c, h/4, w/4) and the photo (b, 3, h/4, w/4), then copies of `later`,
    which turn them into a picture (b, 3, h, w)."""

    def __init__(self, width: int, blocks: int, later: list[nn.Module]):
        super().__init__()
        self.look = nn.Conv2d(3, width, 3, padding=1)
        nn.init.zeros_(self.look.weight)
        nn.init.zeros_(self.look.bias)
        self.blocks = nn.Sequential(*[WideBlock(width) for _ in range(blocks)])
        self.later = nn.ModuleList(copy.deepcopy(later))

    def forward(self, x: Tensor, lr: Tensor) -> Tensor:
        return _enlarge(self.blocks(x + self.look(lr * 2 - 1)), self.later)


class Encoder(nn.Sequential):
    """HR image (b, 3, h, w) in [0, 1] → latents (b, d, h/8, w/8)."""

    def __init__(self, config: TokenizerConfig):
        a, b = config.encoder
        super().__init__(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, a, 3, padding=1),
            *_blocks(a, config.blocks - 1),
            nn.Conv2d(a, b, 3, stride=2, padding=1),
            *_blocks(b, config.blocks - 1),
            ChannelNorm(b),
            nn.SiLU(),
            nn.Conv2d(b, config.code_dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 - 1)


class Decoder(nn.Module):
    """Code vectors (b, d, h, w), the LR photo (b, 3, 2h, 2w), or both → image (b, 3, 8h, 8w).

    A learnt vector stands in for what is absent. Where there is an LR photo, the network's output
    is a correction of its bicubic enlargement."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        a, b, c, e = config.decoder
        n, lr = config.blocks, config.lr_width
        self.no_codes = nn.Parameter(torch.zeros(config.code_dim, 1, 1))
        self.no_lr = nn.Parameter(torch.zeros(lr, 1, 1))
        self.at8 = nn.Sequential(nn.Conv2d(config.code_dim, a, 3, padding=1), *_blocks(a, n))
        self.lr = nn.Sequential(nn.Conv2d(3, lr, 3, padding=1), *_blocks(lr, n, norm=False))
        self.to4 = nn.Conv2d(a, b, 3, padding=1)
        self.at4 = nn.Sequential(nn.Conv2d(b + lr, b, 1), *_blocks(b, n))
        self.at2 = nn.Sequential(nn.Conv2d(b, c, 3, padding=1), *_blocks(c, 1))
        self.at1 = nn.Sequential(nn.Conv2d(c, e, 3, padding=1), *_blocks(e, 1, norm=False))
        self.out = nn.Sequential(nn.SiLU(), nn.Conv2d(e, 3, 3, padding=1))
        self.clean: Ending | None = None  # a second ending, beside an LR photo

    def new_ending(self) -> Ending:
        """A second ending to be trained."""
        c = self.config
        return Ending(c.decoder[1], c.wide_blocks, [self.at2, self.at1, self.out])

    def forward(
        self, q: Opt, lr: Opt = None, use_codes: Opt = None, use_lr: Opt = None, clean: bool = True
    ) -> Tensor:
        """Not clamped. `use_codes`, `use_lr` (b,) bool: which samples see which input; `clean`:
        with the second ending, if there is one and an LR photo."""
        b = len(q if q is not None else lr)
        if q is None:
            h, w = lr.shape[-2] // 2, lr.shape[-1] // 2
            q = self.no_codes.expand(b, -1, h, w)
        elif use_codes is not None:
            q = torch.where(use_codes[:, None, None, None], q, self.no_codes)
        x = self.to4(_up(self.at8(q)))
        if lr is None:
            seen, base = self.no_lr.expand(b, -1, *x.shape[-2:]), 0.5
        else:
            seen = self.lr(lr * 2 - 1)
            base = bicubic(lr)
            if use_lr is not None:
                use = use_lr[:, None, None, None]
                seen = torch.where(use, seen, self.no_lr)
                base = torch.where(use, base, 0.5)
        x = self.at4[:-1](torch.cat([x, seen.to(x.dtype)], 1))
        if clean and self.clean is not None and lr is not None:
            return base + 0.5 * self.clean(x, lr)
        return base + 0.5 * _enlarge(self.at4[-1](x), (self.at2, self.at1, self.out))


class VQModel(nn.Module, PyTorchModelHubMixin):
    """The tokenizer: image (b, 3, h, w) in [0, 1] ↔ codes (b, h/8, w/8), with or without LR."""

    def __init__(self, config: TokenizerConfig | dict | None = None):
        super().__init__()
        if isinstance(config, dict):
            items = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
            config = TokenizerConfig(**items)
        self.config = config or TokenizerConfig()
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        self.codebook = Codebook(self.config.codes, self.config.code_dim, self.config.commitment)

    @classmethod
    def _load_as_safetensor(cls, model: "VQModel", file: str, device: str, _: bool) -> "VQModel":
        """The hub's loader, for a second ending that may lie in a file of its own."""
        files = [Path(file), Path(file).with_name("clean.safetensors")]
        state = {k: v for f in files if f.exists() for k, v in load_file(f, device).items()}
        if any(k.startswith("decoder.clean.") for k in state):
            model.decoder.clean = model.decoder.new_ending()
        model.load_state_dict(state)
        return model.eval()

    def encode(self, x: Tensor) -> Tensor:
        """Image (b, 3, h, w) in [0, 1] → codes (b, h/8, w/8), int64."""
        h, w = x.shape[-2:]
        if h % FACTOR or w % FACTOR:
            raise ValueError(f"image of {w}x{h} pixels does not divide by {FACTOR}: pad or crop it")
        return self.codebook.nearest(self.encoder(x))

    def encode_steps(self, hr: Tensor, grids: tuple[int, ...] = (4, 8, 16)) -> list[Tensor]:
        """HR squares (b, 3, s, s) → the codes (b, n, n) of a chain's images, for n in `grids`."""
        return [self.encode(F.interpolate(hr, size=n * FACTOR, mode="area")) for n in grids]

    def trust(self, clean: Tensor) -> Tensor:
        """How far drawn codes count beside LR photos of which the share `clean` (b,) in [0, 1] is
        read as clean."""
        return self.config.trust + (self.config.trust_clean - self.config.trust) * clean

    def beside(self, codes: Tensor, trust: float | Tensor) -> Tensor:
        """Vectors (b, d, h, w) of codes (b, h, w) beside an LR photo; `trust`: see `decode`."""
        q = self.codebook.embed(codes)
        return self.decoder.no_codes.lerp(q, torch.as_tensor(trust).to(q).reshape(-1, 1, 1, 1))

    def decode(
        self, codes: Opt = None, lr: Opt = None, trust: float | Opt = None, clean: bool = True
    ) -> Tensor:
        """Codes (b, h, w), the LR photo (b, 3, 2h, 2w), or both → (b, 3, 8h, 8w) in [0, 1].

        Where there are both, codes count for `trust` (one number, or (b,)) alone (None: the
        configuration's): a drawn code is a guess. `clean`: with the second ending, for the eye;
        else the first, for LPIPS."""
        if codes is None and lr is None:
            raise ValueError("decode needs codes, an LR photo, or both")
        if codes is None:
            q = None
        elif lr is None:
            q = self.codebook.embed(codes)
        else:
            q = self.beside(codes, self.config.trust if trust is None else trust)
        return self.decoder(q, lr, clean=clean).float().clamp(0, 1)
