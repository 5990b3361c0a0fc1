"""One training loop for every network: cosine rate, averaged weights, a log, checkpoints."""

import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from realsr_r1.common import atomic, check_number
from realsr_r1.files.writable import append_row, claim


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast. Training ends after `steps` or `minutes`, whichever comes first; the
    learning rate follows the share that is done."""

    minutes: float = 60.0
    steps: int = 10**9
    lr: float = 1.5e-3
    warmup: int = 100  # steps
    final_lr: float = 0.02  # share of `lr` at the end
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 0
    log_every: int = 50  # steps
    checkpoint_minutes: float = 4.0

    def __post_init__(self) -> None:
        for name in ("steps", "warmup", "log_every"):
            check_number(name, getattr(self, name), 1)
        for name in ("minutes", "lr", "clip"):  # above 0: at 0 nothing would be learnt
            check_number(name, getattr(self, name), 1e-12)
        check_number("checkpoint_minutes", self.checkpoint_minutes, 0.0)
        for name in ("final_lr", "ema"):
            check_number(name, getattr(self, name), 0.0, 1.0)


def forget(out: Path) -> None:
    """Drop the checkpoints of a training in `out`: it is over, or to begin anew."""
    for kept in out.glob("checkpoint*"):
        kept.unlink()


def goes_on(out: Path, settings: dict) -> None:
    """Keep a training's settings in `out`; ValueError where one of other settings was stopped: it
    would go on with these."""
    kept = out / "checkpoint.json"
    if not list(out.glob("checkpoint*.pt")):
        kept.unlink(missing_ok=True)  # there is nothing to go on with
    claim(kept, settings)


LossOf = Callable[[int, float], tuple[Tensor, dict[str, Tensor]]]


class Fit:
    """State of one training run; `run` trains and resumes.

    `out` is a folder: log.csv, and checkpoint.pt until the run ends. `loss_of(step, done)` gives
    the loss and figures for the log, `done` being the share of the run in [0, 1]. `preview(model)`
    is called at every checkpoint and at the end with the averaged model; what it returns is
    printed."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, out: Path, config: FitConfig
    ):
        self.model, self.optimizer, self.out, self.config = model, optimizer, Path(out), config
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.rates = [g["lr"] for g in optimizer.param_groups]
        self.step, self.seconds, self.extra = 0, 0.0, {}
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> float:
        c = self.config
        return min(1.0, max(self.step / c.steps, self.seconds / (60 * c.minutes)))

    def save(self) -> None:
        state = {"step": self.step, "seconds": self.seconds, "model": self.model.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "average": self.average.state_dict()}
        state["extra"] = {k: v.state_dict() for k, v in self.extra.items()}
        state["settings"] = self._settings()
        last, before = self.out / "checkpoint.pt", self.out / "checkpoint.before.pt"
        torch.save(state, self.out / "checkpoint.part")
        if last.exists():
            last.replace(before)
        (self.out / "checkpoint.part").replace(last)

    def _settings(self) -> dict[str, float]:
        """What may not change under way; a run may well be made longer."""
        fixed = ("lr", "warmup", "final_lr", "ema", "clip", "seed")
        return {k: v for k, v in asdict(self.config).items() if k in fixed}

    def resume(self) -> None:
        """Go on from the last checkpoint that is whole, if there is one. Raises ValueError where it
        is of a training with other settings."""
        kept = [self.out / f"checkpoint{which}.pt" for which in ("", ".before")]
        path = next((p for p in kept if zipfile.is_zipfile(p)), None)
        if path is None:
            (self.out / "log.csv").unlink(missing_ok=True)
            return
        device = next(self.model.parameters()).device
        state = torch.load(path, map_location=device, weights_only=True)
        is_ = self._settings()
        was = state.get("settings", is_)
        other = [f"{k} {was[k]:g}, now {is_[k]:g}" for k in is_ if was[k] != is_[k]]
        if other:
            raise ValueError(
                f"{self.out} holds a training with other settings ({'; '.join(other)}): choose "
                "another place, or remove it"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        for k, v in self.extra.items():
            v.load_state_dict(state["extra"][k])
        self._shorten()
        print(f"resumed {self.out.name} at step {self.step}", flush=True)

    def _shorten(self) -> None:
        """Drop the log's rows after the checkpoint: they will come again."""
        path = self.out / "log.csv"
        if path.exists():
            rows = pd.read_csv(path)
            with atomic(path) as part:
                rows[rows["step"] <= self.step].to_csv(part, index=False)

    def log(self, row: dict) -> None:
        append_row(self.out / "log.csv", row)
        print(row, flush=True)

    def _update(self, loss: Tensor, rate: float) -> Tensor:
        """Take a step; returns the norm of the gradient."""
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return norm

    def run(self, loss_of: LossOf, preview: Callable[[nn.Module], dict] | None = None) -> nn.Module:
        """Train to the end; returns the averaged model. Raises RuntimeError if the loss is lost."""
        c, seen = self.config, {}
        self.resume()
        start, saved = time.time() - self.seconds, time.time()
        self.model.train()
        while self.done < 1:
            rate = min(1, (self.step + 1) / c.warmup)
            rate *= c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * self.done))
            loss, figures = loss_of(self.step, self.done)
            norm = self._update(loss, rate)
            self.step, self.seconds = self.step + 1, time.time() - start
            for k, v in {"loss": loss, **figures}.items():
                seen.setdefault(k, []).append(v.detach())
            logs = len(seen["loss"]) == c.log_every or self.done == 1
            saves = time.time() - saved >= 60 * c.checkpoint_minutes
            if (logs or saves) and not bool((loss + norm).isfinite()):
                where = f"the loss of {self.out.name} is lost at step {self.step}"
                raise RuntimeError(f"{where}: lower the rate")
            if logs:
                means = {k: round(float(torch.stack(v).mean()), 4) for k, v in seen.items()}
                self.log({"step": self.step, "seconds": round(self.seconds, 1), **means})
                seen = {}
            if saves:
                self.save()
                self._preview(preview)
                saved = time.time()
        self._preview(preview)
        return self.average.module.eval()

    def _preview(self, preview: Callable[[nn.Module], dict] | None) -> None:
        if preview:
            self.average.module.eval()
            print("preview", self.step, preview(self.average.module), flush=True)
