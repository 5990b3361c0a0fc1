"""LlamaGen's tokenizer (Sun et al. 2024, arXiv 2406.06525), which the paper's codes belong to.

A small class around transformers' Janus blocks, which are LlamaGen's. It reads the published
checkpoints by their key names; nothing here is trained.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder, JanusVQVAEEncoder


@dataclass(frozen=True)
class LlamaGenConfig:
    """Shape of the tokenizer. Its factor (pixels per code, per axis) is 2^(levels - 1)."""

    codes: int = 16_384
    code_dim: int = 8
    base: int = 128
    multiplier: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 2
    latent: int = 256

    @property
    def factor(self) -> int:
        return 2 ** (len(self.multiplier) - 1)


DS8 = LlamaGenConfig()  # the paper's
DS16 = LlamaGenConfig(multiplier=(1, 1, 2, 2, 4))


class LlamaGen(nn.Module):
    """Image (b, 3, h, w) in [0, 1] ↔ codes (b, h/factor, w/factor)."""

    def __init__(self, config: LlamaGenConfig = DS8):
        super().__init__()
        self.config = config
        blocks = JanusVQVAEConfig(
            embed_dim=config.code_dim,
            num_embeddings=config.codes,
            latent_channels=config.latent,
            in_channels=3,
            out_channels=3,
            base_channels=config.base,
            channel_multiplier=list(config.multiplier),
            num_res_blocks=config.res_blocks,
        )
        self.encoder, self.decoder = JanusVQVAEEncoder(blocks), JanusVQVAEDecoder(blocks)
        self.quant_conv = nn.Conv2d(config.latent, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent, 1)
        self.quantize = nn.Embedding(config.codes, config.code_dim)  # normalized where it is used
        self.factor = config.factor

    def encode(self, x: Tensor) -> Tensor:
        """Image (b, 3, h, w) in [0, 1] → codes (b, h/factor, w/factor), int64."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(
                f"image of {x.shape[-1]}x{x.shape[-2]} pixels does not divide by {self.factor}: "
                f"pad or crop it first"
            )
        z = F.normalize(self.quant_conv(self.encoder(x * 2 - 1)), dim=1)
        return torch.einsum("bdhw,kd->bhwk", z, F.normalize(self.quantize.weight, dim=1)).argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (b, h, w) → image (b, 3, h·factor, w·factor) in [0, 1]."""
        q = F.normalize(self.quantize.weight, dim=1)[codes].permute(0, 3, 1, 2)
        return ((self.decoder(self.post_quant_conv(q)) + 1) / 2).clamp(0, 1)


HUB = "FoundationVision/LlamaGen"  # its files vq_ds8_c2i.pt (the paper's) and vq_ds16_c2i.pt


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
            return Path(hf_hub_download(HUB, str(name)))
        except (HfHubHTTPError, OSError) as e:  # no network, HF_HUB_OFFLINE, or not in the cache
            raise FileNotFoundError(
                f"{name} is neither a file here nor in the hub's cache, and could not be "
                f"downloaded: where there is network, run "
                f"`hf download {HUB} {name} --local-dir .`, or give --download"
            ) from e
    raise FileNotFoundError(
        f"{name} does not exist: download vq_ds8_c2i.pt or vq_ds16_c2i.pt ({HUB}) first"
    )


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the file without running any code in it."""
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
    state: dict[str, Tensor] | str | Path, config: LlamaGenConfig | None = None
) -> LlamaGen:
    """LlamaGen's published tokenizer as a LlamaGen in evaluation mode.

    `state`: a state dict, a local .pt file, or the bare name vq_ds8_c2i.pt or vq_ds16_c2i.pt, which
    comes from the hub's cache or the hub. `config`: its shape; None reads the number of levels from
    the names (5: ds16, else ds8). Raises FileNotFoundError if the file cannot be had, ValueError if
    it is damaged or does not fit, with the missing, unexpected and wrongly shaped tensors by name.
    """
    if not isinstance(state, dict):
        state = _read_checkpoint(_llamagen_file(state))
    state = state.get("model", state) if isinstance(state, dict) else {}
    theirs = {
        _janus_name(k): v
        for k, v in state.items()
        if isinstance(v, Tensor) and k != "quantize.codebook_used"
    }
    if config is None:
        levels = {k.split(".")[2] for k in theirs if k.startswith("encoder.down.")}
        config = DS16 if len(levels) == len(DS16.multiplier) else DS8
    model = LlamaGen(config)
    report = _key_report(model.state_dict(), theirs)
    if report:
        raise ValueError(
            f"this is not LlamaGen's state dict for {len(config.multiplier)} levels: {report}"
        )
    theirs["quantize.weight"] = F.normalize(theirs["quantize.weight"].float(), dim=1)
    model.load_state_dict(theirs)
    return model.eval()
