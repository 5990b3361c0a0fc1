"""How well can subject and background be named by somebody who has seen more? A yardstick for the
chain's first description: two layers on the maps of AlexNet, which has seen a million pictures of
ImageNet (frozen; the network behind LPIPS), trained for nothing but these two words.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realsr_r1 import perceptual
from realsr_r1.ablations.labels import Right, measured
from realsr_r1.photographs import SIDE, Pairs, Photograph
from realsr_r1.rewards import words

NAMES = ("subject", "background")
POOLED = {1: 2, 2: 2, 3: 2, 4: 3}  # AlexNet's layers, and to how many cells a side each is pooled
BATCH = 64


@torch.no_grad()
def features(lr: Tensor) -> Tensor:
    """LR photos (b, 3, 32, 32) in [0, 1], enlarged → AlexNet's pooled maps (b, 5632)."""
    net = perceptual.lpips_alex(str(lr.device))
    large = F.interpolate(lr, size=SIDE, mode="bicubic", align_corners=False).clamp(0, 1)
    maps = net.net(net.scaling_layer(large * 2 - 1))
    return torch.cat([F.adaptive_avg_pool2d(maps[i], n).flatten(1) for i, n in POOLED.items()], 1)


def true_names(photo: Photograph) -> dict[str, str]:
    """What is to be named of a photograph."""
    return {"subject": photo.subject, "background": photo.background[0]}


class Namer(nn.Module):
    """Features (b, 5632) → logits of each of NAMES; `known` are the names that can be said."""

    def __init__(self, known: dict[str, list[str]], x: Tensor, width: int = 512):
        super().__init__()
        self.known = known
        self.register_buffer("mean", x.float().mean(0))
        self.register_buffer("scale", x.float().std(0) + 1e-5)
        self.body = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(x.shape[1], width), nn.ReLU(), nn.Dropout(0.5)
        )
        self.heads = nn.ModuleList([nn.Linear(width, len(known[k])) for k in NAMES])

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.body((x.float() - self.mean) / self.scale)
        return [head(h) for head in self.heads]

    def say(self, lr: Tensor) -> list[dict[str, str]]:
        """The likeliest names of LR photos (b, 3, 32, 32)."""
        best = [logits.argmax(1).tolist() for logits in self(features(lr))]
        pairs = zip(*best, strict=True)
        return [{k: self.known[k][i] for k, i in zip(NAMES, p, strict=True)} for p in pairs]


def seen(data: Pairs, n: int) -> tuple[Tensor, Tensor]:
    """Features (n, 5632) in half precision, and photograph numbers (n,), of the first n pairs."""
    x, index = [], []
    for first in range(0, n, BATCH):
        items = [data[i] for i in range(first, min(first + BATCH, n))]
        x.append(features(torch.stack([item["lr"] for item in items]).float() / 255).half())
        index += [item["index"] for item in items]
    return torch.cat(x), torch.tensor(index)


def train(photos: list[Photograph], n: int, epochs: int = 20, seed: int = 0) -> Namer:
    """Cross-entropy with smoothed labels on `n` damaged crops, whose features are kept: AlexNet
    reads each but once."""
    x, index = seen(Pairs(photos, seed=seed, labels=False), n)
    names = [true_names(p) for p in photos]
    known = {k: sorted({t[k] for t in names}) for k in NAMES}
    target = torch.tensor([[known[k].index(t[k]) for k in NAMES] for t in names])[index]
    torch.manual_seed(seed)
    model = Namer(known, x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = max(1, epochs * n // 256)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(n, (256,))
        each = zip(model(x[rows]), target[rows].unbind(1), strict=True)
        loss = sum(F.cross_entropy(logits, t, label_smoothing=0.1) for logits, t in each)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def measure(model: Namer, photos: list[Photograph], seed: int = 0) -> list[Right]:
    """Which names are right, by the rule for the chain's: `rewards.words`."""

    def right(lr: Tensor, item: dict) -> dict[str, float]:
        said, true = model.say(lr)[0], true_names(photos[item["index"]])
        return {k: float(words(true[k]) in words(said[k])) for k in NAMES}

    return measured(photos, right, seed)
