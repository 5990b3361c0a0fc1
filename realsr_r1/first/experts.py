"""Training and calibration of the nano expert on the first form's pictures; see `experts`."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from realsr_r1 import perceptual
from realsr_r1.common import device_of, fast_bfloat16
from realsr_r1.experts import (  # noqa: F401
    METRICS,
    NAMES,
    NIQE,
    PAPER,
    Expert,
    NanoExpert,
    PyiqaExpert,
    absent,
    create,
    load_expert,
    missing_files,
    numbers,
    plain,
)
from realsr_r1.first import degradation, scenes
from realsr_r1.first.pretrain import corrupt, fit
from realsr_r1.first.tokenizer import GuidedDecoder, VQModel, guided_decode
from realsr_r1.first.weights import WEIGHTS, save

DECODED = (
    "codes",
    "near codes",
    "region",
    "LR codes",
    "guided",
)  # what a model puts out, as opposed to spoilt photographs
KINDS = (*DECODED, "degraded", "blur", "noise", "jpeg", "smooth", "sharpen")
LEVELS = (0.1, 0.4, 0.7, 1.0)  # severities of a ladder


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    return degradation.blur(
        x,
        degradation.gaussian_kernel(2 * round(3 * sigma) + 3, sigma, sigma, 0.0)
        .to(x.device)
        .expand(len(x), -1, -1),
    )


def _degraded(hr: Tensor, severity: float, g: torch.Generator) -> Tensor:
    """LR pictures of the nano preset's stage with blur, noise and compression all set to one
    severity."""
    tops = {
        "blur_levels": (1.7, 0.05),
        "noise_levels": (40, 1),
        "jpeg_levels": (88, 5),
    }  # at severity 1, and left out below
    fixed = {
        k: ((severity * top,) * 2 if severity * top > least else None,)
        for k, (top, least) in tops.items()
    }
    nano = degradation.PRESETS["nano"]
    return degradation.degrade(
        hr.cpu(), replace(nano, stages=(replace(nano.stages[0], **fixed),)), g
    ).lr.to(hr.device)


def _smooth(x: Tensor, severity: float) -> Tensor:
    """Oil paint: the picture filtered by itself as the guide, flat areas flattened, strong edges
    kept (He et al. 2010)."""
    box = partial(F.avg_pool2d, kernel_size=7, stride=1, padding=3, count_include_pad=False)
    mean = box(x)
    var = (box(x * x) - mean * mean).clamp_min(0)
    a = var / (var + (0.02 + 0.25 * severity) ** 2)
    return box(a) * x + box(mean - a * mean)


def _near(codes: Tensor, severity: float, tokenizer: VQModel, g: torch.Generator) -> Tensor:
    """Codes (b, h, w), a share of them replaced by neighbours in the codebook; severity makes it
    more and farther ones."""
    book = F.normalize(tokenizer.quantize.weight, dim=1)
    close = (
        (book[codes] @ book.T)
        .topk(min(len(book), round(2 ** (1 + 5 * severity)) + 1), dim=-1)
        .indices
    )
    pick = torch.randint(1, close.shape[-1], codes.shape, generator=g).to(codes.device)
    moved = (torch.rand(codes.shape, generator=g) < 0.2 + 1.2 * severity).to(codes.device)
    return torch.where(moved, close.gather(-1, pick[..., None])[..., 0], codes)


def _region(codes: Tensor, severity: float, vocabulary: int, g: torch.Generator) -> Tensor:
    """Codes (b, h, w) with one rectangle of random codes that covers a share `severity` of the
    picture."""
    inside = torch.ones((), dtype=torch.bool)
    for n, shape in zip(codes.shape[1:], ((-1, 1), (1, -1)), strict=True):
        k = max(1, round(severity**0.5 * n))
        at = torch.arange(n) - torch.randint(0, n - k + 1, (), generator=g)
        inside = inside & ((at >= 0) & (at < k)).view(shape)
    return torch.where(
        inside.to(codes.device),
        torch.randint(0, vocabulary, codes.shape, generator=g).to(codes.device),
        codes,
    )


@torch.no_grad()
def spoil(
    kind: str,
    severity: float,
    hr: Tensor,
    lr: Tensor,
    tokenizer: VQModel,
    g: torch.Generator,
    guided: GuidedDecoder | None = None,
) -> Tensor:
    """Pictures (b, 3, h, w) in [0, 1] spoilt in one of KINDS with a severity of 0 (least) to 1;
    `lr` and `guided` are for "guided". For the kinds of DECODED, 0 is the decode of the true codes
    (for "LR codes": of the undegraded, merely small picture).
    """
    s, n = severity, tokenizer.config.codes
    photo = {
        "blur": lambda: _gaussian(hr, 0.6 + 3.4 * s),
        "noise": lambda: hr + torch.randn(hr.shape, generator=g).to(hr.device) * (3 + 42 * s) / 255,
        "jpeg": lambda: torch.stack([degradation.jpeg(x, round(70 - 65 * s)) for x in hr]),
        "smooth": lambda: _smooth(hr, s),
        "sharpen": lambda: hr + (0.7 + 4.3 * s) * (hr - _gaussian(hr, 1.2)),
        "degraded": lambda: F.interpolate(
            _degraded(hr, s, g), size=hr.shape[-2:], mode="bicubic", align_corners=False
        ),
    }
    wrong = {
        "near codes": lambda c: _near(c, s, tokenizer, g),
        "region": lambda c: _region(c, s, n, g),
    }
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; choose one of {', '.join(KINDS)}")
    if kind in photo:
        return photo[kind]().float().clamp(0, 1)
    codes = tokenizer.encode(photo["degraded"]().clamp(0, 1) if kind == "LR codes" else hr)
    if s > 0 and kind != "LR codes":
        codes = wrong.get(kind, lambda c: corrupt(c, torch.full((len(hr),), s), n, g))(codes)
    return (
        (
            guided_decode(guided, tokenizer, codes, lr)
            if kind == "guided"
            else tokenizer.decode(codes)
        )
        .float()
        .clamp(0, 1)
    )


@torch.no_grad()
def make_bank(
    data: scenes.Pairs,
    tokenizers: tuple[VQModel, ...],
    n: int,
    versions: int = 13,
    guided: GuidedDecoder | None = None,
    seed: int = 0,
    chunk: int = 8,
) -> tuple[Tensor, Tensor]:
    """Pictures (n, versions, 3, h, w), uint8, and their LPIPS to the original (n, versions):
    version 0 is the original, then come pairs of one kind at two severities, every other pair a
    decoded kind; some pictures are spoilt twice."""
    g, dev, n = (
        torch.Generator().manual_seed(seed),
        next(tokenizers[0].parameters()).device,
        min(n, len(data)),
    )
    kinds = [k for k in KINDS if k != "guided" or guided is not None]
    bank, away = (
        torch.empty((n, versions, *data.hr.shape[1:]), dtype=torch.uint8),
        torch.zeros((n, versions)),
    )
    for at in tqdm(range(0, n, chunk), desc="spoilt pictures", disable=n < 100, mininterval=10):
        hr, lr = (t[at : min(at + chunk, n)].to(dev).float() / 255 for t in (data.hr, data.lr))
        bank[at : at + len(hr), 0] = (hr * 255).round().byte().cpu()
        tokenizer = tokenizers[at // chunk % len(tokenizers)]
        kind, s = "", 0.0
        for v in range(1, versions):
            pool, u = (
                [k for k in kinds if (k in DECODED) == (v % 4 == 1)],
                float(torch.rand((), generator=g)),
            )
            kind, s = (
                (pool[int(torch.randint(0, len(pool), (), generator=g))], u)
                if v % 2
                else (kind, (s + 0.2 + 0.6 * u) % 1)
            )
            with torch.autocast(dev.type, torch.bfloat16, enabled=fast_bfloat16(dev)):
                y = spoil(kind, s, hr, lr, tokenizer, g, guided)
                if torch.rand((), generator=g) < 0.15:
                    y = spoil(
                        KINDS[-5:][int(torch.randint(0, 5, (), generator=g))],
                        0.5 * s,
                        y,
                        lr,
                        tokenizer,
                        g,
                    )
                away[at : at + len(hr), v] = perceptual.distance(y, hr).float().cpu()
            bank[at : at + len(hr), v] = (y * 255).round().byte().cpu()
    return bank, away


def ranking_loss(
    logits: Tensor,
    away: Tensor,
    *groups: Tensor,
    known: float = 0.02,
    slope: float = 6.0,
    margin: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Hinge loss over all pairs whose LPIPS differs by more than `known`: the better one's logit
    must lead by `margin` and `slope` × that difference. The mean over all pairs plus, for each
    grouping, over those inside a group. Also the share in order."""
    worse, lead = (
        away[None] - away[:, None],
        logits[:, None] - logits[None],
    )  # [i, j]: by how much j is worse than i
    hinge, pairs = F.relu(slope * worse + margin - lead), worse > known
    terms = [
        hinge[m].mean()
        for m in (pairs, *(pairs & (g[:, None] == g[None]) for g in groups))
        if m.any()
    ]
    return sum(terms, logits.sum() * 0), (lead[pairs] > 0).float().mean()


def train_expert(
    data: scenes.Pairs,
    tokenizer: VQModel | tuple[VQModel, ...],
    out: Path = WEIGHTS / "expert.safetensors",
    steps: int = 3000,
    lr: float = 1e-3,
    batch: int = 28,
    seed: int = 0,
    device: str | None = None,
    guided: GuidedDecoder | None = None,
    bank: int = 800,
) -> NanoExpert:
    """Train the nano expert on the first `bank` scenes, 13 versions each (0.6 MB a scene); a batch
    is seven versions of `batch` / 7 scenes. Several tokenizers (same codes, other decoders) take
    turns, so that the expert does not learn the traces of one decoder.
    """
    dev = device_of(device)
    tokenizers = tuple(
        t.to(dev).eval() for t in (tokenizer if isinstance(tokenizer, tuple) else (tokenizer,))
    )
    pictures, away = make_bank(
        data, tokenizers, bank, guided=guided and guided.to(dev).eval(), seed=seed
    )
    torch.manual_seed(seed)
    model, last = NanoExpert().to(dev), {}

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = torch.Generator().manual_seed(seed * 10_000_019 + step)
        i = torch.randint(0, len(pictures), (batch // 7,), generator=g)[:, None]
        pair = torch.rand((len(i), pictures.shape[1] // 2), generator=g).argsort(1)[:, :3]
        v = torch.cat(
            [torch.zeros_like(i), 2 * pair + 1, 2 * pair + 2], 1
        )  # the original and three pairs
        x, d = pictures[i, v].flatten(0, 1).to(dev).float() / 255, away[i, v].flatten().to(dev)
        x = x[:, torch.randperm(3, generator=g)].flip(
            [k for k in (-1, -2) if torch.rand((), generator=g) < 0.5]
        )
        with torch.autocast(dev.type, torch.bfloat16, enabled=fast_bfloat16(dev)):
            logits = model.logits(x)
        rank, right = ranking_loss(
            logits, d, *(t.flatten().to(dev) for t in (i.expand_as(v), 100 * i + (v + 1) // 2))
        )
        # Ranking leaves the scale free: a light pull puts the original near 0.95 and an LPIPS of
        # 0.9 near 0.05.
        anchor = (torch.sigmoid(logits) - (0.95 - 0.9 * (d / 0.9).clamp(0, 1))).abs().mean()
        return rank + anchor, {
            "rank": float(rank.detach()),
            "anchor": float(anchor.detach()),
            "ordered": float(right),
        }

    # The average of `fit` looks back 500 steps, too far in a run this short; the learning rate has
    # come to rest by the end.
    keep = {steps - 1: lambda: last.update({k: t.clone() for k, t in model.state_dict().items()})}
    fit(model, loss_of, steps, Path(out), lr, seed, after_step=lambda step: keep.get(step, dict)())
    model.load_state_dict(last or model.state_dict())
    save(model, Path(out))
    return model


def spearman(a, b) -> float:
    """Spearman's rank correlation of two lists of numbers; 0 where one of them is constant."""
    return (
        float(spearmanr(a, b).statistic) if np.ptp(np.asarray(a)) and np.ptp(np.asarray(b)) else 0.0
    )


def in_order(scores: Tensor, away: Tensor | None = None, margin: float = 0.02) -> tuple[int, int]:
    """Scores (levels, b), mildest level first → how many pairs of two levels of one scene are in
    order, and of how many. With LPIPS `away` (levels, b) only the pairs count of which LPIPS says
    the same by more than `margin`.
    """
    first, second = torch.triu_indices(len(scores), len(scores), 1)
    known = (
        torch.ones_like(scores[first]).bool()
        if away is None
        else away[second] - away[first] > margin
    )
    return int((scores[first] > scores[second])[known].sum()), int(known.sum())


def ordered_pairs(expert: Expert, ladder: Tensor) -> float:
    """Share of the pairs of different severity in a ladder (levels, b, 3, h, w), mildest first,
    that the expert ranks right."""
    right, known = in_order(torch.stack([expert(level).cpu() for level in ladder]))
    return right / known


@torch.no_grad()
def calibrate(
    expert: Expert,
    data: scenes.Pairs,
    tokenizer: VQModel,
    guided: GuidedDecoder | None = None,
    levels: tuple[float, ...] = LEVELS,
    batch: int = 16,
    seed: int = 0,
) -> dict:
    """How far an expert can be trusted on held-out scenes, over ladders of the original and each
    kind at rising severity. `ordered` and `by_kind`: share of the pairs of one scene and kind
    ranked by severity where LPIPS agrees by 0.02; `ordered_all`: of all pairs. `spearman`: rank
    correlation with LPIPS over decoded pictures, -1 is perfect; `spearman_scene`: its mean within a
    scene, as a GRPO group sees it. `rows`: (kind, severity, scene, score, LPIPS) of every picture;
    severity 0 is the original.
    """
    dev, rows, pairs, every = next(tokenizer.parameters()).device, [], {}, np.zeros(2)
    for at in tqdm(
        range(0, len(data), batch), desc="calibrate", disable=len(data) < 64, mininterval=10
    ):
        hr, lr = (t[at : at + batch].to(dev).float() / 255 for t in (data.hr, data.lr))
        g, best = torch.Generator().manual_seed(seed + at), expert(hr).cpu()
        for kind in (k for k in KINDS if k != "guided" or guided is not None):
            ladder = [spoil(kind, s, hr, lr, tokenizer, g, guided) for s in levels]
            scores = torch.stack([best, *(expert(level).cpu() for level in ladder)])
            away = torch.stack(
                [torch.zeros(len(hr)), *(perceptual.distance(level, hr).cpu() for level in ladder)]
            )
            pairs[kind] = pairs.get(kind, 0) + np.array(in_order(scores, away))
            every += in_order(scores)
            for s, score, d in zip((0.0, *levels), scores.tolist(), away.tolist(), strict=True):
                rows += [(kind, s, at + i, *v) for i, v in enumerate(zip(score, d, strict=True))]
    right, known = sum(pairs.values())
    decoded = np.array(
        [(scene, score, d) for kind, s, scene, score, d in rows if kind in DECODED and s > 0]
    )
    own = [spearman(*decoded[decoded[:, 0] == i, 1:].T) for i in range(len(data))]
    return {
        "ordered": float(right / known),
        "ordered_all": float(every[0] / every[1]),
        "by_kind": {k: float(a / n) for k, (a, n) in pairs.items()},
        "spearman": spearman(*decoded[:, 1:].T),
        "spearman_scene": float(np.mean(own)),
        "rows": rows,
    }
