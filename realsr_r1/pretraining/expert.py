"""The nano expert: trained by ranking pictures of one photograph, those that the policy draws among
them, since these are what it must judge in GRPO."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.stats import rankdata
from torch import Tensor
from torch.utils.data import Dataset

from realsr_r1 import degradation, perceptual
from realsr_r1.evaluation.experts import Expert, NanoExpert
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining.loop import Fit, FitConfig, forget
from realsr_r1.sampling import Sampling
from realsr_r1.tokenizer import bicubic

DRAWN = 8  # chains per photograph in the bank
KNOWN = 0.01  # difference of LPIPS from which on one picture counts as better
LEVELS = (0.25, 0.5, 1.0)  # severities of each other way to spoil a picture


@dataclass
class Bank:
    """Pictures (n, v, 3, 128, 128) uint8, several of each photograph, the original first, and their
    LPIPS to it (n, v); the last DRAWN are the final images of chains."""

    pictures: Tensor
    away: Tensor


def spoilt(hr: Tensor, g: torch.Generator) -> list[Tensor]:
    """The pictures (b, 3, h, w) with rising blur, noise, compression and sharpening."""
    out = []
    for s in LEVELS:
        kernel = degradation.gaussian_kernel(15, 0.5 + 2 * s, 0.5 + 2 * s, 0.0)
        soft = degradation.blur(hr, kernel.expand(len(hr), -1, -1))
        noisy = hr + torch.randn(hr.shape, generator=g) * 30 * s / 255
        saved = torch.stack([degradation.jpeg(x.clamp(0, 1), round(60 - 50 * s)) for x in hr])
        out += [soft, noisy, saved, hr + 2 * s * (hr - soft)]
    return [x.clamp(0, 1) for x in out]


@torch.no_grad()
def make_bank(model: RealSR, data: Dataset, n: int, seed: int = 0, batch: int = 8) -> Bank:
    """Pictures of the first `n` pairs: the original, spoilt ones, decodes of partly wrong codes and
    of the LR photo, and chains at temperature 1, all as GRPO's generation reward decodes them."""
    g, pictures, away = torch.Generator().manual_seed(seed), [], []
    for at in range(0, n, batch):
        items = [data[i] for i in range(at, min(at + batch, n))]
        hr, lr = (torch.stack([x[k] for x in items]).float() / 255 for k in ("hr", "lr"))
        true = model.tokenizer.encode(hr.to(model.device)).cpu()
        versions = [hr, *spoilt(hr, g), bicubic(lr)]
        for share in (0.0, *LEVELS):
            other = torch.randint(model.tokenizer.config.codes, true.shape, generator=g)
            wrong = torch.rand(true.shape, generator=g) < 0.6 * share
            versions.append(model.decode(torch.where(wrong, other, true)).cpu())
        drawn = model.sample(lr, Sampling.rollout(DRAWN), g).codes
        versions += model.decode(drawn).cpu().unflatten(0, (-1, DRAWN)).unbind(1)
        x = torch.stack(versions, 1).clamp(0, 1)
        away.append(torch.stack([perceptual.distance(v, hr) for v in x.unbind(1)], 1))
        pictures.append((x * 255).round().byte())
    return Bank(torch.cat(pictures), torch.cat(away))


def ranking_loss(logits: Tensor, away: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge loss over the pairs of one photograph, logits and LPIPS (b, v), whose LPIPS differs by
    more than KNOWN: the better one's logit must lead by 0.2 and six times that difference. Also
    the share of pairs in order."""
    worse, lead = away[:, None] - away[..., None], logits[..., None] - logits[:, None]
    pairs = worse > KNOWN
    return F.relu(6 * worse + 0.2 - lead)[pairs].mean(), (lead[pairs] > 0).float().mean()


def train_expert(bank: Bank, out: Path, fit: FitConfig, width: int = 7) -> NanoExpert:
    """Train the expert; its weights go to `out`/expert.safetensors, the log beside them. A batch
    holds four photographs, of each `width` drawn pictures and as many others."""
    torch.manual_seed(fit.seed)
    model, g = NanoExpert(), torch.Generator().manual_seed(fit.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.lr, weight_decay=0.05)
    n, v = bank.away.shape

    def loss_of(step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        i = torch.randint(n, (4, 1), generator=g)
        other = torch.rand(4, v - DRAWN, generator=g).argsort(1)[:, :width]
        mine = v - DRAWN + torch.rand(4, DRAWN, generator=g).argsort(1)[:, :width]
        chosen = torch.cat([other, mine], 1)
        x, away = bank.pictures[i, chosen].float() / 255, bank.away[i, chosen]
        x = x.flip([k for k in (-1, -2) if torch.rand((), generator=g) < 0.5])
        logits = model.logits(x.flatten(0, 1)).view_as(away)
        all_, right = ranking_loss(logits, away)
        drawn, ordered = ranking_loss(logits[:, width:], away[:, width:])
        # Ranking leaves the scale free: a light pull puts the original near .95.
        anchor = (torch.sigmoid(logits) - (0.95 - away.clamp(0, 0.9))).abs().mean()
        return all_ + 2 * drawn + anchor, {"ordered": right, "ordered, drawn": ordered}

    trained = Fit(model, optimizer, out, fit).run(loss_of)
    state = {k: x.half().contiguous() for k, x in trained.state_dict().items()}
    save_file(state, out / "expert.safetensors")
    forget(out)
    return trained


@torch.no_grad()
def agreement(expert: Expert, bank: Bank) -> Tensor:
    """Spearman's correlation of score and LPIPS among the drawn pictures of each photograph, (n,):
    -1 is perfect, 0 no knowledge."""
    drawn = bank.pictures[:, -DRAWN:]
    scores = torch.stack([expert(x.float() / 255).cpu() for x in drawn])
    ranks = [torch.from_numpy(rankdata(x, axis=1)) for x in (scores, bank.away[:, -DRAWN:])]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)


@torch.no_grad()
def in_order(expert: Expert, bank: Bank) -> Tensor:
    """Share (n,) of the pairs of each photograph's pictures, more than 0.01 apart in LPIPS, of
    which the expert prefers the better one: 0.5 is chance."""
    scores = [expert(x.float() / 255).cpu() for x in bank.pictures]
    pairs = zip(scores, bank.away, strict=True)
    return torch.stack([ranking_loss(s[None], away[None])[1] for s, away in pairs])
