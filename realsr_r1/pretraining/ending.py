"""The decoder's second ending: it learns a clean hand from a teacher's pictures."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from realsr_r1.pipeline import RealSR, reads_clean
from realsr_r1.pretraining import losses
from realsr_r1.pretraining.recipes import Run, autocast, on_drawn
from realsr_r1.sampling import Sampling
from realsr_r1.tokenizer import VQModel

L1, LPIPS = 5.0, 0.6  # weights, to the teacher's picture
TRUTH = 0.25  # that of LPIPS to the photograph itself
SMALL = 48  # pixels, of 128, at which the teacher is shown a chain's picture
ALONE = 0.25  # share of the samples without codes
REUSE = 8

Teacher = Callable[[Tensor], Tensor]  # pictures (b, 3, h, w) in [0, 1] → (b, 3, 4h, 4w)


def taught(picture: Tensor, teacher: Teacher) -> Tensor:
    """A picture (3, s, s) in [0, 1] as the teacher makes it from what is left at SMALL pixels: the
    same content, drawn by a cleaner hand."""

    def scaled(x: Tensor, size: int) -> Tensor:
        return F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)

    return scaled(teacher(scaled(picture[None], SMALL)), picture.shape[-1])[0]


def _lessons(before: RealSR, batches: Iterator[dict], teacher: Teacher) -> Iterator[dict]:
    """Pictures, LR photos, codes of chains drawn as at restoration, how far they are trusted, and
    what the teacher makes: of the chain's picture, or of the LR photo itself, where the chain reads
    it as clean or codes are left out."""
    model = before.tokenizer
    for i, batch in enumerate(batches):
        lr, heat = batch["lr"].cpu(), 0.5 + 0.4 * float(torch.rand(()))
        generator = torch.Generator().manual_seed(i)
        drawn = before.sample(batch["lr"], Sampling(image_temperature=heat), generator)
        clean = torch.tensor([reads_clean(c) for c in drawn.chains])
        alone = torch.rand(len(lr)) < ALONE
        made = before.finish(drawn.chains, lr)
        target = torch.stack(
            [
                teacher(lr[j : j + 1])[0] if clean[j] or alone[j] else taught(y, teacher)
                for j, y in enumerate(made)
            ]
        )
        parts = {"hr": batch["hr"], "lr": batch["lr"], "target": target.to(batch["lr"].device)}
        bytes_ = {k: (x.clamp(0, 1) * 255).round().byte() for k, x in parts.items()}
        trust = torch.where(alone, 0.0, model.trust(clean.float())).to(batch["lr"].device)
        yield bytes_ | {"drawn": drawn.codes, "trust": trust}


def train_ending(start: RealSR, data: Dataset, run: Run, teacher: Teacher) -> VQModel:
    """A second ending of the decoder, for pictures beside an LR photo: clean where the first paints
    strokes. It is deeper and learns by distillation (Hinton et al. 2015, arXiv 1503.02531): a
    teacher for super-resolution shows how a clean picture of the same content looks. It goes on
    from the one that is there. All else stays; returns the tokenizer."""
    model = start.tokenizer
    before = RealSR(copy.deepcopy(model), start.policy)
    model.eval().requires_grad_(False)
    ending = model.decoder.clean or model.decoder.new_ending()
    model.decoder.clean = ending.requires_grad_(True)
    lessons = partial(_lessons, before, teacher=teacher)
    fit, source = on_drawn(model, start.policy, data, run, REUSE, lessons)
    generator = torch.Generator().manual_seed(run.fit.seed)

    def loss_of(step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(source)
        x, lr, target = (batch[k].float() / 255 for k in ("hr", "lr", "target"))
        q = model.beside(batch["drawn"], batch["trust"])
        with autocast(x.device):
            y = model.decoder(q, lr).float()
            l1 = (y - target).abs().mean()
            away = losses.robust_distance(y, target, generator).mean()
            true = losses.robust_distance(y, x, generator).mean()
        total = L1 * l1 + LPIPS * away + TRUTH * true
        return total, {"l1": l1.detach(), "lpips": away.detach(), "truth": true.detach()}

    return fit.run(loss_of, run.preview)
