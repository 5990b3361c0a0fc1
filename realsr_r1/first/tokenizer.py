"""Images as tokens: a VQ autoencoder, and the LR-guided decoder.

The autoencoder is a small class around transformers' Janus blocks, which are LlamaGen's (Sun et al.
2024, arXiv 2406.06525). transformers' own `JanusVQVAE` cannot be trained as shipped, hence our
quantiser: l2-normalised codes with the straight-through gradient (Yu et al. 2022, ViT-VQGAN) and
revival of dead codes. Simplification: space-to-depth ("fold") before the first convolution, which
makes training far cheaper than blocks at full resolution.
"""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder, JanusVQVAEEncoder


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape of a VQ autoencoder. Its factor (pixels a code, per axis) is fold × 2^(levels - 1)."""

    codes: int = 1024
    code_dim: int = 8
    fold: int = 4
    base: int = 32
    multiplier: tuple[int, ...] = (2, 3)
    res_blocks: int = 1
    latent: int = 96
    commitment: float = 0.25

    @property
    def factor(self) -> int:
        return self.fold * 2 ** (len(self.multiplier) - 1)


NANO = TokenizerConfig()
# LlamaGen's published tokenizers (c2i): 16,384 codes; ds8 is the paper's.
LLAMAGEN_DS8 = TokenizerConfig(
    codes=16384, fold=1, base=128, multiplier=(1, 2, 2, 4), res_blocks=2, latent=256
)
LLAMAGEN_DS16 = TokenizerConfig(
    codes=16384, fold=1, base=128, multiplier=(1, 1, 2, 2, 4), res_blocks=2, latent=256
)


class Codebook(nn.Module):
    """l2-normalised vector quantiser with straight-through gradient; counts its use so that dead
    codes can be revived."""

    def __init__(self, codes: int, dim: int, commitment: float):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(codes, dim), dim=1))
        self.commitment = commitment
        self.register_buffer("usage", torch.ones(codes), persistent=False)

    def nearest(self, z: Tensor) -> Tensor:
        """(b, d, h, w) encoder output → (b, h, w) indices of the closest codes by cosine."""
        return torch.einsum(
            "bdhw,kd->bhwk", F.normalize(z, dim=1), F.normalize(self.weight, dim=1)
        ).argmax(-1)

    def embed(self, codes: Tensor) -> Tensor:
        """(b, h, w) indices → (b, d, h, w) unit vectors."""
        return F.normalize(self.weight, dim=1)[codes].permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, d, h, w) → quantised (b, d, h, w), codes (b, h, w), loss (); gradients pass straight
        through."""
        z = F.normalize(z, dim=1)
        codes = self.nearest(z)
        q = self.embed(codes)
        loss = F.mse_loss(q, z.detach()) + self.commitment * F.mse_loss(z, q.detach())
        if self.training:
            count = torch.bincount(codes.flatten(), minlength=len(self.weight)).float()
            self.usage.lerp_(
                count * (len(self.weight) / count.sum()), 0.01
            )  # 1 = used as often as the average code
        return z + (q - z).detach(), codes, loss * z.shape[1]

    @torch.no_grad()
    def revive(
        self, z: Tensor, threshold: float = 0.05, generator: torch.Generator | None = None
    ) -> int:
        """Move codes used less than `threshold` of the average onto random encoder outputs of (b,
        d, h, w); returns how many."""
        dead = (self.usage < threshold).nonzero().flatten()
        pool = F.normalize(z, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        pick = torch.randint(0, len(pool), (len(dead),), generator=generator)
        self.weight[dead] = pool[pick.to(pool.device)].to(self.weight.dtype)
        self.usage[dead] = 1.0
        return len(dead)


class Smooth(nn.Sequential):
    """A light residual network at full resolution, at first the identity: pixel-shuffle alone
    leaves a grid of lines."""

    def __init__(self, width: int = 24):
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class VQModel(nn.Module):
    """Image (b, 3, h, w) in [0, 1] ↔ codes (b, h/factor, w/factor)."""

    def __init__(self, config: TokenizerConfig = NANO):
        super().__init__()
        self.config = config
        channels = 3 * config.fold**2
        blocks = JanusVQVAEConfig(
            embed_dim=config.code_dim,
            num_embeddings=config.codes,
            latent_channels=config.latent,
            in_channels=channels,
            out_channels=channels,
            base_channels=config.base,
            channel_multiplier=list(config.multiplier),
            num_res_blocks=config.res_blocks,
        )
        self.encoder, self.decoder = JanusVQVAEEncoder(blocks), JanusVQVAEDecoder(blocks)
        self.quant_conv = nn.Conv2d(config.latent, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent, 1)
        self.quantize = Codebook(config.codes, config.code_dim, config.commitment)
        if config.fold > 1:
            self.smooth = Smooth()

    @property
    def factor(self) -> int:
        return self.config.factor

    def latents(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] → continuous latents (b, d, h/factor, w/factor)."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(
                f"image of {x.shape[-1]}x{x.shape[-2]} pixels does not divide by {self.factor}: "
                f"pad or crop it first"
            )
        return self.quant_conv(self.encoder(F.pixel_unshuffle(x * 2 - 1, self.config.fold)))

    def encode(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] → codes (b, h/factor, w/factor), int64."""
        return self.quantize.nearest(self.latents(x))

    def decode_latents(self, q: Tensor) -> Tensor:
        """Quantised latents (b, d, h, w) → image (b, 3, h·factor, w·factor), not clamped."""
        y = F.pixel_shuffle(self.decoder(self.post_quant_conv(q)), self.config.fold)
        return ((self.smooth(y) if self.config.fold > 1 else y) + 1) / 2

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (b, h, w) → image (b, 3, h·factor, w·factor) in [0, 1]."""
        return self.decode_latents(self.quantize.embed(codes)).clamp(0, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image → reconstruction (not clamped), quantised latents, codes, codebook loss."""
        q, codes, loss = self.quantize(self.latents(x))
        return self.decode_latents(q), q, codes, loss


class ResBlock(nn.Module):
    """Two 3×3 convolutions around the identity, without normalisation (as in EDSR: it keeps colours
    exact)."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class GuidedDecoder(nn.Module):
    """Corrects a plain decode with what the LR photo shows: a residual network at a quarter of the
    resolution.

    It sees the plain decode, the upsampled LR and the code embeddings, mixes the first two pixel by
    pixel and adds a correction. `use_codes=False` is the control: the same network on the LR alone,
    i.e. plain feed-forward regression.
    """

    def __init__(self, code_dim: int = 8, width: int = 96, blocks: int = 5, use_codes: bool = True):
        super().__init__()
        self.config = {
            "code_dim": code_dim,
            "width": width,
            "blocks": blocks,
            "use_codes": use_codes,
        }
        self.use_codes = use_codes
        self.conv_in = nn.Conv2d((48 + code_dim if use_codes else 0) + 48, width, 3, padding=1)
        self.body = nn.Sequential(*[ResBlock(width) for _ in range(blocks)])
        self.conv_out = nn.Conv2d(width, 48 + 16, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.smooth = Smooth()

    def forward(
        self, lr: Tensor, decode: Tensor | None = None, embedded: Tensor | None = None
    ) -> Tensor:
        """LR (b, 3, h, w), decode (b, 3, 4h, 4w), embedded codes (b, d, h/2, w/2) → (b, 3, 4h, 4w),
        not clamped."""
        up = F.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
        x = F.pixel_unshuffle(up, 4) - 0.5
        if self.use_codes:
            codes = F.interpolate(embedded, scale_factor=2, mode="nearest")
            x = torch.cat([x, F.pixel_unshuffle(decode, 4) - 0.5, codes], 1)
        residual, gate = self.conv_out(self.body(self.conv_in(x))).split([48, 16], 1)
        residual, gate = F.pixel_shuffle(residual, 4), torch.sigmoid(F.pixel_shuffle(gate, 4))
        return self.smooth(residual + (gate * decode + (1 - gate) * up if self.use_codes else up))


def guided_decode(guided: GuidedDecoder, tokenizer: VQModel, codes: Tensor, lr: Tensor) -> Tensor:
    """Codes (b, h, w) and the LR photo (b, 3, ·, ·) in [0, 1] → restored image in [0, 1]."""
    return guided(lr, tokenizer.decode(codes), tokenizer.quantize.embed(codes)).clamp(0, 1)


LLAMAGEN_HUB = (
    "FoundationVision/LlamaGen"  # its files vq_ds8_c2i.pt (the paper's) and vq_ds16_c2i.pt
)


def _llamagen_file(name: str | Path) -> Path:
    """The local file `name`, or the file of that name in LlamaGen's hub repository (kept in the
    hub's cache)."""
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in ("vq_ds8_c2i.pt", "vq_ds16_c2i.pt"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(hf_hub_download(LLAMAGEN_HUB, str(name)))
        except (
            HfHubHTTPError,
            OSError,
        ) as e:  # absent network, HF_HUB_OFFLINE, or not in the cache
            raise FileNotFoundError(
                f"{name} is neither a file here nor in the hub's cache, and could not be "
                f"downloaded: where there is network, run "
                f"`hf download {LLAMAGEN_HUB} {name} --local-dir .`, or unset HF_HUB_OFFLINE"
            ) from e
    raise FileNotFoundError(
        f"{name} does not exist: download vq_ds8_c2i.pt or vq_ds16_c2i.pt ({LLAMAGEN_HUB}) first"
    )


def _read_checkpoint(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """Check the file's SHA-256 (or print it, where none is expected) and read it without running
    any code in it."""
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if sha256 is None:
        print(f"{path.name}: SHA-256 {found} (give it as sha256= to have it checked)")
    elif found != sha256.lower():
        raise ValueError(
            f"{path.name} has the SHA-256 {found}, expected was {sha256.lower()}: the file is "
            f"another one or cut short, download it again"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as e:
        raise ValueError(
            f"{path.name} is not a torch checkpoint of tensors, or is cut short: download it again"
        ) from e


def _janus_name(key: str) -> str:
    """LlamaGen's name of a tensor → the Janus blocks' name; names that follow another scheme come
    back as they are."""
    part = key.split(".")
    if part[1:2] == ["conv_blocks"] and len(part) > 3:
        # LlamaGen's decoder counts its blocks from the lowest resolution, and so do the Janus
        # blocks.
        part[1] = "down" if part[0] == "encoder" else "up"
        part[3] = {"res": "block"}.get(part[3], part[3])
    elif part[1:2] == ["mid"] and len(part) > 2:
        part[2] = {"0": "block_1", "1": "attn_1", "2": "block_2"}.get(part[2], part[2])
    name = ".".join(part)
    return "quantize.weight" if name == "quantize.embedding.weight" else name


def _key_report(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """What does not fit between two state dicts, three names of each kind; empty if all fits."""
    shapes = [
        f"{k} {tuple(theirs[k].shape)} instead of {tuple(ours[k].shape)}"
        for k in ours
        if k in theirs and ours[k].shape != theirs[k].shape
    ]
    kinds = {
        "missing": [k for k in ours if k not in theirs],
        "unexpected": [k for k in theirs if k not in ours],
        "wrongly shaped": shapes,
    }
    return "; ".join(f"{len(v)} {kind} {v[:3]}" for kind, v in kinds.items() if v)


def load_llamagen(
    state: dict[str, Tensor] | str | Path,
    config: TokenizerConfig | None = None,
    sha256: str | None = None,
) -> VQModel:
    """LlamaGen's published tokenizer as a VQModel in evaluation mode.

    `state`: a state dict, a local .pt file, or the bare name vq_ds8_c2i.pt or vq_ds16_c2i.pt, which
    comes from the hub's cache or the hub. `config`: its shape; None reads the number of levels from
    the names (5: ds16, else ds8). `sha256`: the checksum that the file must have (the hub's page of
    the file shows it); without it the file's own is printed. Raises FileNotFoundError if the file
    cannot be had, ValueError if it is damaged, has another checksum, or does not fit, with the
    missing, unexpected and wrongly shaped tensors by name.
    """
    if not isinstance(state, dict):
        state = _read_checkpoint(_llamagen_file(state), sha256)
    state = state.get("model", state) if isinstance(state, dict) else {}
    theirs = {
        _janus_name(k): v
        for k, v in state.items()
        if isinstance(v, Tensor) and k != "quantize.codebook_used"
    }
    if config is None:
        levels = {k.split(".")[2] for k in theirs if k.startswith("encoder.down.")}
        config = LLAMAGEN_DS16 if len(levels) == len(LLAMAGEN_DS16.multiplier) else LLAMAGEN_DS8
    model = VQModel(config)
    report = _key_report(model.state_dict(), theirs)
    if report:
        raise ValueError(
            f"this is not LlamaGen's state dict for {len(config.multiplier)} levels: {report}"
        )
    theirs["quantize.weight"] = F.normalize(theirs["quantize.weight"].float(), dim=1)
    model.load_state_dict(theirs)
    return model.eval()
