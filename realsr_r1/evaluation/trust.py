"""How far to trust drawn codes, how far where the chain reads the photo as clean, and with which
ending: the same chains, decoded in several ways. `TokenizerConfig.trust` was chosen by it.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from realsr_r1 import perceptual
from realsr_r1.common import generator
from realsr_r1.evaluation.nano import SEVERITIES, clusters_of, held_out, stacked
from realsr_r1.photographs import Photograph
from realsr_r1.pipeline import RealSR, reads_clean
from realsr_r1.sampling import Sampling
from realsr_r1.stats import clustered
from realsr_r1.tokenizer import SCALE, TokenizerConfig
from realsr_r1.vlcot import Chain

TRUST, CLEAN = TokenizerConfig.trust, TokenizerConfig.trust_clean
SHIPPED = f"trust {TRUST}, {CLEAN} where read as clean"
WAYS = {  # trust, trust where the photo is read as clean, and whether the second ending is used
    **{f"trust {t}": (t, t, True) for t in (1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)},
    f"trust 0.6, {CLEAN} where read as clean": (0.6, CLEAN, True),
    **{f"trust {TRUST}, {t} where read as clean": (TRUST, t, True) for t in (CLEAN, 0.2, 0.0)},
    f"{SHIPPED}, first ending": (TRUST, CLEAN, False),
}


def decoded(
    model: RealSR, chains: list[Chain], lr: Tensor, trust: float, where_clean: float, clean: bool
) -> Tensor:
    """Pictures (b, 3, 128, 128) of chains for LR photos (b, 3, 32, 32), on the CPU; `where_clean`:
    trust where a chain reads its photo as clean; `clean`: see `VQModel.decode`."""
    codes = torch.stack([c.final_image for c in chains])
    trusts = torch.tensor([where_clean if reads_clean(c) else trust for c in chains])
    return model.decode(codes, lr, trusts, clean).cpu()


def report(
    model: RealSR,
    photos: list[Photograph],
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch: int = 48,
) -> str:
    """Markdown: LPIPS, and consistency with the LR photo in dB, of every way by severity; LPIPS
    minus that of what ships."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in WAYS}
    for severity in SEVERITIES:
        lr, hr = stacked(held_out(photos, severity, seed))
        chains = []
        for i, some in enumerate(lr.split(batch)):
            g = generator(seed, i * batch)
            chains += model.sample(some, sampling, g).chains
        for name, how in WAYS.items():
            made = decoded(model, chains, lr, *how)
            away = torch.cat(
                [perceptual.distance(*x) for x in zip(made.split(48), hr.split(48), strict=True)]
            )
            agrees = perceptual.psnr(avg_pool2d(made, SCALE), lr)
            found[name].append((away, agrees))
    head = (
        f"LPIPS ↓ / consistency, dB ↑ | {' | '.join(SEVERITIES)} | LPIPS, pooled, minus {SHIPPED}"
    )
    out = [f"| {head} |", "|---|---|---|---|---|"]
    lpips = {name: torch.cat([away for away, _ in parts]) for name, parts in found.items()}
    clusters = clusters_of(photos) * len(SEVERITIES)
    for name, parts in found.items():
        cells = [f"{away.mean():.4f} / {agrees.mean():.1f}" for away, agrees in parts]
        cells.append(str(clustered((lpips[name] - lpips[SHIPPED]).numpy(), clusters)))
        out.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"
