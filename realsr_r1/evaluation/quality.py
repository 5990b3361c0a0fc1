"""Metrics of pyiqa as they are, and as visual experts: `(b, 3, h, w) in [0, 1] → (b,) in [0, 1]`,
higher is better.

niqe, brisque: classic statistics of natural pictures; piqe: flat and restless blocks. NIQE's
parameters ship with the package. paper: the mean of TOPIQ-NR, MUSIQ/100, MANIQA-pipal and CLIPIQA,
the reward of the released code. nano: ours, see `experts`.

pyiqa is under the PolyForm-Noncommercial licence; it is imported only when one of its metrics is
asked for.
"""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from torch import Tensor

from realsr_r1.evaluation.experts import WEIGHTS, Expert, load_expert

# Each metric: its value that scores 0, the one that scores 1 (straight in between, clipped beyond),
# and what pyiqa would fetch: files in torch's hub folder, and whole repositories (timm/…) in the
# Hugging Face cache. The only place for scales and files. NIQE is about 3 on large good
# photographs, 5 to 15 on good ones of 128 px, 30 and more on noise; the others state their range.
VIT = "vit_base_patch8_224.augreg2_in21k_ft_in1k"
METRICS = {
    "niqe": (40.0, 2.0, ()),
    "brisque": (120.0, 0.0, ("pyiqa/brisque_svm_weights.pth",)),
    "piqe": (100.0, 0.0, ()),
    "topiq_nr": (0.0, 1.0, ("pyiqa/cfanet_nr_koniq_res50-9a73138b.pth", "timm/resnet50.a1_in1k")),
    "musiq": (0.0, 100.0, ("pyiqa/musiq_koniq_ckpt-e95806b9.pth",)),
    "maniqa-pipal": (0.0, 1.0, ("pyiqa/MANIQA_PIPAL-ae6d356b.pth", f"timm/{VIT}")),
    "clipiqa": (0.0, 1.0, ("clip/RN50.pt",)),
}
NIQE = WEIGHTS / "niqe.mat"  # mean and covariance of natural pictures (BasicSR's, Apache-2.0)
PAPER = ("topiq_nr", "musiq", "maniqa-pipal", "clipiqa")
NAMES = ("nano", "niqe", "brisque", "piqe", "paper")


def absent(files: tuple[str, ...]) -> list[str]:
    """Those of `files` (named as in METRICS) that are not on this machine, each with the folder
    where it goes."""
    hub, cache, out = Path(torch.hub.get_dir()), constants.HF_HUB_CACHE, []
    for name in files:
        if not name.startswith("timm/"):
            path = hub / name
            out += [] if path.exists() else [f"{path.name} in {path.parent}"]
        elif not huggingface_hub.try_to_load_from_cache(name, "model.safetensors"):
            out.append(f"{name} (a Hugging Face repository) in {cache}")
    return out


def check_files(name: str, files: tuple[str, ...]) -> None:
    """FileNotFoundError, in one sentence, where some of `files` are `absent`."""
    if missing := absent(files):
        raise FileNotFoundError(
            f"{name}: files are missing and nothing is downloaded, so put {'; '.join(missing)}"
        )


def create(metric: str, device: str | torch.device = "cpu", **options) -> Callable[..., Tensor]:
    """One metric of pyiqa, by pyiqa's name, without any download: check for its files first."""
    import pyiqa

    if metric == "niqe":
        options["pretrained_model_path"] = str(NIQE)
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        return pyiqa.create_metric(metric, device=device, **options)
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            f"{metric}: pyiqa misses {e.name}, so run pip install 'setuptools<82' openai-clip"
        ) from e
    finally:
        constants.HF_HUB_OFFLINE = offline


def numbers(metric: Callable[..., Tensor], *pictures: Tensor) -> Tensor:
    """A metric's own values (b,) of batches (b, 3, h, w); NaN where it fails: such a picture must
    not take the batch with it."""
    try:
        v = metric(*pictures)
    except torch.linalg.LinAlgError:
        if len(pictures[0]) == 1:
            return pictures[0].new_full((1,), torch.nan)
        return torch.cat(
            [numbers(metric, *one) for one in zip(*(p.split(1) for p in pictures), strict=True)]
        )
    return (v[0] if isinstance(v, tuple) else v).reshape(-1).float()


class PyiqaExpert:
    """The mean of some pyiqa metrics, each on its scale of METRICS. A picture that a metric has no
    number for (a flat or a black one) scores 0 there. Raises FileNotFoundError, in one sentence,
    where files are absent: nothing is downloaded."""

    def __init__(self, metrics: tuple[str, ...], device: str | torch.device = "cpu"):
        check_files(", ".join(metrics), tuple(f for m in metrics for f in METRICS[m][2]))
        # NIQE computes in double precision, which Apple's GPUs do not have.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.metrics = {m: create(m, self.device) for m in metrics}

    @torch.no_grad()
    def raw(self, x: Tensor) -> dict[str, Tensor]:
        """The metrics' own values on their own scales, (b,) each."""
        if "niqe" in self.metrics and min(x.shape[-2:]) < 96:
            raise ValueError(
                f"NIQE needs pictures of 96 px or more, got {x.shape[-1]}x{x.shape[-2]}: take "
                f"another expert"
            )
        return {
            m: numbers(self.metrics[m], x.to(self.device).float().clamp(0, 1)) for m in self.metrics
        }

    def __call__(self, x: Tensor) -> Tensor:
        ends = {m: METRICS[m][:2] for m in self.metrics}
        scaled = [
            ((v - ends[m][0]) / (ends[m][1] - ends[m][0])).nan_to_num(0.0).clamp(0, 1)
            for m, v in self.raw(x).items()
        ]
        return torch.stack(scaled).mean(0).to(x.device)


def expert(name: str = "nano", device: str | torch.device = "cpu") -> Expert:
    """One of NAMES. One-sentence errors: ValueError for another name, FileNotFoundError where
    files are absent."""
    if name not in NAMES:
        raise ValueError(f"no expert {name!r}; choose one of {', '.join(NAMES)}")
    if name == "nano":
        return load_expert(device)
    return PyiqaExpert(PAPER if name == "paper" else (name,), device)
