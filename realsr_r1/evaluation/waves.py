"""How far behind the row above may a row be drawn? The same photographs with several lags; what
`Sampling.lag` was chosen by."""

from dataclasses import replace

import torch

from realsr_r1 import perceptual
from realsr_r1.common import generator
from realsr_r1.decoding import wave
from realsr_r1.evaluation.nano import SEVERITIES, clusters_of, held_out, stacked
from realsr_r1.photographs import Photograph
from realsr_r1.pipeline import RealSR
from realsr_r1.sampling import Sampling
from realsr_r1.stats import clustered
from realsr_r1.vlcot import GRIDS

LAGS = (0, 4, 2, 1)


@torch.no_grad()
def report(
    model: RealSR,
    photos: list[Photograph],
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch: int = 48,
    draws: int = 3,
) -> str:
    """Markdown: for each lag the steps of a chain's three images, and by severity LPIPS minus that
    of drawing in order (0), where its own value stands: means of `draws` chains for each photo,
    whose codes have the same noise with every lag."""
    found: dict[int, list] = {lag: [] for lag in LAGS}
    for severity in SEVERITIES:
        lr, hr = stacked(held_out(photos, severity, seed))
        for lag in LAGS:
            how, away = replace(sampling, lag=lag), []
            for first in range(0, len(lr), batch):
                some, true = lr[first : first + batch], hr[first : first + batch]
                for draw in range(draws):
                    own = [generator(seed + draw, first + i) for i in range(len(some))]
                    made = model.finish(model.sample(some, how, own).chains, some)
                    away.append(perceptual.distance(made, true))
            each = [torch.stack(away[i : i + draws]).mean(0) for i in range(0, len(away), draws)]
            found[lag].append(torch.cat(each).numpy())
    clusters = clusters_of(photos)
    out = [f"| lag | steps | {' | '.join(SEVERITIES)} | pooled |", "|---" * 6 + "|"]
    for lag, values in found.items():
        steps = sum(len(wave(n, min(lag, n))) if lag else n * n for n in GRIDS)
        if not lag:
            cells = [f"{v.mean():.3f}" for v in (*values, sum(values) / len(values))]
        else:
            gaps = [v - b for v, b in zip(values, found[0], strict=True)]
            cells = [str(clustered(g, clusters)) for g in (*gaps, sum(gaps) / len(gaps))]
        out.append(f"| {lag} | {steps} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"
