"""How far to trust drawn codes, which photos to hold to their LR photo, and with which ending: the
same chains, decoded in several ways. `TokenizerConfig.trust` and `pipeline.HOLD` were chosen by it.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from realsr_r1 import perceptual
from realsr_r1.common import generator
from realsr_r1.evaluation.nano import SEVERITIES, clusters_of, held_out, stacked
from realsr_r1.photographs import Photograph
from realsr_r1.pipeline import HOLD, RealSR, hold, reads_clean
from realsr_r1.sampling import Sampling
from realsr_r1.stats import clustered
from realsr_r1.tokenizer import SCALE
from realsr_r1.vlcot import Chain

SHIPPED = "trust 0.7, those read as clean are held"
WAYS = {  # trust, which photos are held, and whether the second ending is used
    **{f"trust {t}": (t, "none", True) for t in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)},
    SHIPPED: (0.7, "clean", True),
    "trust 0.7, all are held": (0.7, "all", True),
    "trust 0.7, those read as clean are held, first ending": (0.7, "clean", False),
}


@torch.no_grad()
def decoded(
    model: RealSR, chains: list[Chain], lr: Tensor, trust: float, held: str, clean: bool = True
) -> Tensor:
    """Pictures (b, 3, 128, 128) of chains for LR photos (b, 3, 32, 32), on the CPU; `held`: none,
    clean or all; `clean`: see `VQModel.decode`."""
    codes = torch.stack([c.final_image for c in chains]).to(model.device)
    made = model.tokenizer.decode(codes, lr.to(model.device), trust, clean).cpu()
    which = torch.tensor([held == "all" or (held == "clean" and reads_clean(c)) for c in chains])
    return hold(made, lr, HOLD * which[:, None, None, None])


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
