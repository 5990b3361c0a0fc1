"""Weight files of tokenizer, reader and guided decoder: one .safetensors each, with its class and
configuration inside."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from realsr_r1.first.reader import LRReader, PixelCodes, ReaderConfig, SummaryCodes
from realsr_r1.first.tokenizer import GuidedDecoder, TokenizerConfig, VQModel

WEIGHTS = Path(__file__).parents[1] / "assets" / "weights"
NETWORKS = ("tokenizer", "reader", "guided")  # what a policy's words mean: they belong together
CLASSES = {
    "VQModel": (VQModel, TokenizerConfig),
    "LRReader": (LRReader, ReaderConfig),
    "PixelCodes": (PixelCodes, ReaderConfig),
    "SummaryCodes": (SummaryCodes, ReaderConfig),
    "GuidedDecoder": (GuidedDecoder, None),
}


def save(model: nn.Module, path: str | Path) -> None:
    """Write weights (half precision) and configuration; the write is atomic."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config) if is_dataclass(model.config) else model.config
    state = {
        k: (v.half() if v.is_floating_point() else v).detach().contiguous().cpu()
        for k, v in model.state_dict().items()
    }
    part = path.with_suffix(".part")
    save_file(state, part, metadata={"class": type(model).__name__, "config": json.dumps(config)})
    part.replace(path)


def networks_of(folder: str | Path) -> Path:
    """The folder of the networks that go with the policies in `folder`: `folder` itself, or the
    shipped weights if it holds none."""
    return (
        Path(folder)
        if any((Path(folder) / f"{n}.safetensors").exists() for n in NETWORKS)
        else WEIGHTS
    )


def load(
    path: str | Path, device: str | torch.device = "cpu"
) -> VQModel | LRReader | GuidedDecoder:
    """Read a file written by `save`. One-sentence errors: FileNotFoundError if it is absent,
    ValueError if it is cut short, of another program, or does not fit its own configuration."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"weights {path.name} are missing in {path.parent.name}/: train them (python -m "
            f"realsr_r1.first train --help) or reinstall"
        )
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
        state = load_file(path, device=str(device))
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"weights {path.name} are cut short or damaged: copy or train them again"
        ) from e
    if meta.get("class") not in CLASSES:
        raise ValueError(
            f"weights {path.name} were not written by realsr_r1: point to the right file"
        )
    make, config_class = CLASSES[meta["class"]]
    config = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(meta["config"]).items()
    }
    model = make(config_class(**config)) if config_class else make(**config)
    try:
        model.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
    except RuntimeError as e:
        raise ValueError(
            f"weights {path.name} do not fit their configuration: they belong to another "
            f"version, train them again"
        ) from e
    return model.to(device).eval()
