"""The nano model on held-out photographs: the chain beside its controls, by severity.

Controls: the decoder's first ending (`Decoder.clean`); codes in full (`TokenizerConfig.trust` 1);
the LR photo alone through the same decoder (what the chain must beat); random codes, trusted as the
chain's are (confetti scores well on LPIPS); the true codes in full (the ceiling); plain codes
without the LR photo (the paper's way); bicubic.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from realsr_r1 import perceptual, tokenizer, vlcot
from realsr_r1.common import atomic, generator, write_text
from realsr_r1.degradation import LABELS, from_words
from realsr_r1.evaluation.tables import row
from realsr_r1.photographs import Pairs, Photograph
from realsr_r1.pipeline import RealSR, reads_clean
from realsr_r1.rewards import understanding_reward
from realsr_r1.sampling import Sampling
from realsr_r1.stats import Interval, clustered

SEVERITIES = ("light", "medium", "heavy")
STEPS = vlcot.IMAGE_TAGS[::-1]


def lattice(x: Tensor, period: int = 8) -> float:
    """How strongly a pattern of `period` pixels is woven into pictures (b, 3, n, n): log ratio of
    the mean power spectrum at the period's frequencies to the median around each. Natural pictures
    have about 0; pixel-shuffle decoders had 1.7 and more."""
    gray, n = x.mean(1), x.shape[-1]
    window = torch.hann_window(n)
    gray = (gray - gray.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = (torch.fft.fft2(gray).abs() ** 2).mean(0)
    near = [(i, j) for i in range(-5, 6) for j in range(-5, 6) if max(abs(i), abs(j)) >= 2]
    ratios = []
    for a, b in torch.cartesian_prod(*[torch.arange(0, n // 2 + 1, n // period)] * 2).tolist():
        if a or b:
            around = torch.stack([power[(a + i) % n, (b + j) % n] for i, j in near]).median()
            ratios.append(float((power[a, b] / around).log()))
    return sum(ratios) / len(ratios)


def bicubic(lr: Tensor) -> Tensor:
    """(b, 3, h, w) → (b, 3, 4h, 4w) in [0, 1]."""
    return tokenizer.bicubic(lr).clamp(0, 1)


def enlarged(x: Tensor, size: int) -> Tensor:
    """(b, 3, h, h) → (b, 3, size, size), bicubic."""
    x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
    return x.clamp(0, 1)


def pictures(model: RealSR, lr: Tensor, hr: Tensor, chains: list[vlcot.Chain]) -> dict[str, Tensor]:
    """The picture (b, 3, 4h, 4w) of each method."""
    drawn, middle, rough = (torch.stack([getattr(c, t) for c in chains]) for t in STEPS)
    g = torch.Generator().manual_seed(0)
    confetti = torch.randint(0, model.tokenizer.config.codes, drawn.shape, generator=g)
    with torch.no_grad():
        true = model.tokenizer.encode(hr.to(model.device))

    def decode(
        codes: Tensor | None, trust: float | Tensor | None = None, clean: bool = True
    ) -> Tensor:
        return model.decode(codes, lr, trust, clean).cpu()

    clean = torch.tensor([float(reads_clean(c)) for c in chains])
    return {
        "bicubic": bicubic(lr),
        "LR alone": decode(None),
        "LR alone, first ending": decode(None, clean=False),
        "chain": model.finish(chains, lr),
        "chain, first ending": model.finish(chains, lr, clean=False),
        "chain, codes in full": decode(drawn, 1.0),
        "chain, plain decode": model.decode(drawn).cpu(),
        "its middle image": enlarged(model.decode(middle).cpu(), hr.shape[-1]),
        "its rough image": enlarged(model.decode(rough).cpu(), hr.shape[-1]),
        "random codes": decode(confetti, model.tokenizer.trust(clean)),
        "true codes": decode(true, 1.0),
        "true codes, first ending": decode(true, 1.0, clean=False),
        "true codes, plain decode": model.decode(true).cpu(),
    }


def held_out(
    photos: list[Photograph], severity: str, seed: int = 0, labels: bool = False
) -> list[dict]:
    """The items of `Pairs` for photographs under damage of one of SEVERITIES."""
    data = Pairs(photos, f"nano-{severity}", seed=seed, training=False, labels=labels)
    return [data[i] for i in range(len(data))]


def stacked(items: list[dict]) -> tuple[Tensor, Tensor]:
    """LR and HR of items (b, 3, …) in [0, 1]."""
    return tuple(torch.stack([x[k] for x in items]).float() / 255 for k in ("lr", "hr"))


def words_right(chain: vlcot.Chain, photo: Photograph, degradation: str) -> dict[str, float]:
    """1 or 0 for subject and background (of the rough text, singular or plural alike), the color of
    the middle text (any of the annotation's), and each degradation label of one chain."""
    true, said = from_words(degradation), chain.labels
    rough = [f"<rough_understand> {chain.rough_understand or ''} </rough_understand>"]
    middle = f" {chain.middle_understand or ''} "
    out = {
        "subject": understanding_reward(rough, [[photo.subject]])[0],
        "background": understanding_reward(rough, [[photo.background[0]]])[0],
        "color": float(any(f" {c} " in middle for c in photo.colors)),
    }
    return out | {k: float(said.get(k) == true[k]) for k in LABELS}


def measure(
    model: RealSR,
    photos: list[Photograph],
    severities: tuple[str, ...] = SEVERITIES,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch: int = 48,
    others: dict[str, Callable[[Tensor], Tensor]] | None = None,
) -> list[dict]:
    """One row per photograph, severity and method: lpips, psnr, the consistency (PSNR in dB of the
    picture scaled down against the LR photo), and for the chain its words.

    `others`: more methods by name, LR (b, 3, h, w) → (b, 3, 4h, 4w)."""
    rows = []
    for severity in severities:
        data = Pairs(photos, f"nano-{severity}", seed=seed, training=False)
        for first in tqdm(range(0, len(data), batch), desc=severity):
            items = [data[i] for i in range(first, min(first + batch, len(data)))]
            lr, hr = stacked(items)
            g = generator(seed, first)
            samples = model.sample(lr, sampling, g)
            made = pictures(model, lr, hr, samples.chains)
            made |= {name: f(lr) for name, f in (others or {}).items() if name not in made}
            for name, y in made.items():
                d, p = perceptual.distance(y, hr).tolist(), perceptual.psnr(y, hr).tolist()
                again = F.interpolate(y, size=lr.shape[-1], mode="area")
                c = perceptual.psnr(again, lr).tolist()
                for i, item in enumerate(items):
                    photo = photos[item["index"]]
                    row = {"source": photo.source, "file": photo.file, "author": photo.author}
                    row |= {"severity": severity, "method": name, "lpips": d[i], "psnr": p[i]}
                    row["consistency"] = c[i]
                    if name == "chain":
                        row |= words_right(samples.chains[i], photo, item["degradation"])
                    rows.append(row)
    return rows


def cluster_of(row: dict) -> str:
    """The photographer of a flower; of the others, whose author is the data set, the photograph."""
    return row["author"] if row["source"] == "flower_photos" else row["file"]


def clusters_of(photos: list[Photograph]) -> list[str]:
    """The cluster of each photograph."""
    return [cluster_of(vars(p)) for p in photos]


def interval(rows: list[dict], key: str, minus: list[dict] | None = None) -> Interval:
    """Mean of a column, or of its paired difference to other rows of the same order."""
    values = np.array([r[key] for r in rows])
    if minus is not None:
        values = values - np.array([r[key] for r in minus])
    return clustered(values, [cluster_of(r) for r in rows])


def table(rows: list[dict]) -> str:
    """Markdown: every method by severity and pooled, the chain's differences, consistency and
    words."""
    groups = [*dict.fromkeys(r["severity"] for r in rows), None]
    methods = list(dict.fromkeys(r["method"] for r in rows))

    def of(method: str, severity: str | None) -> list[dict]:
        return [r for r in rows if r["method"] == method and severity in (None, r["severity"])]

    def head(title: str) -> list[str]:
        return row(title, *(g or "pooled" for g in groups), head=True)

    out = head("LPIPS ↓ / PSNR ↑")
    for m in methods:
        both = [(interval(of(m, g), "lpips"), interval(of(m, g), "psnr")) for g in groups]
        out += row(m, *(f"{d.mean:.3f} / {p.mean:.2f}" for d, p in both))
    for key, unit in (("lpips", "LPIPS"), ("psnr", "dB")):
        out += ["", *head(f"chain minus …, {unit}")]
        for m in (m for m in methods if m != "chain"):
            out += row(m, *(str(interval(of("chain", g), key, of(m, g))) for g in groups))
    out += ["", *head("consistency with the LR photo, dB ↑")]
    for m in methods:
        out += row(m, *(f"{interval(of(m, g), 'consistency').mean:.1f}" for g in groups))
    out += ["", *head("words right")]
    names = (*LABELS, "subject", "background", "color")
    for name in (k for k in of("chain", None)[0] if k in names):
        out += row(name, *(str(interval(of("chain", g), name)) for g in groups))
    return "\n".join(out) + "\n"


def write(rows: list[dict], out: Path, note: str) -> None:
    """`out`.csv with every row and `out`.md with the table under a line that says how it came."""
    with atomic(f"{out}.csv") as part:
        pd.DataFrame(rows).to_csv(part, index=False, float_format="%.4g")
    write_text(f"{out}.md", f"{note}\n\n{table(rows)}")
