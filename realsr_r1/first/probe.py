"""Yardsticks for the LR photo's reading: a small CNN on the LR pixels, and the same net as a probe
on the reader's codes.

What a network of a few minutes' training can name from the pixels is what one may ask of the codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from realsr_r1.common import device_of
from realsr_r1.first import scenes
from realsr_r1.first.pretrain import Batches, reader_targets
from realsr_r1.first.reader import LRReader


class Mixed:
    """Labelled batches for networks that name things: half scenes, half crops of photographs (if
    given), mirrored and in slightly other colours at random, so that they are not learnt by heart.
    """

    def __init__(
        self, data: scenes.Pairs, crops: scenes.Pairs | None, device: torch.device, seed: int
    ):
        self.parts = [
            (Batches(d, device, seed, photo_share=0), reader_targets(d)[1].to(device))
            for d in (data, crops)
            if d is not None
        ]

    def __call__(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        """LR photos (n, 3, h, w) in [0, 1] and their targets (n, heads), -100 where nothing is
        known."""
        found = [
            (batches.pairs(step, n // len(self.parts)), targets) for batches, targets in self.parts
        ]
        x = torch.cat([lr for (_, lr, _), _ in found])
        tint = 1 + 0.3 * (
            torch.rand((len(x), 3, 1, 1), generator=self.parts[0][0].generator(step + 10**9)) - 0.5
        )
        return (x * tint.to(x.device)).clamp(0, 1), torch.cat(
            [t[i.to(t.device)] for (_, _, i), t in found]
        )


class LabelBody(nn.Module):
    """A small CNN: image or feature map (b, c, h, w) → (b, 4·width), mean and maximum over the
    picture."""

    def __init__(self, channels: int, width: int = 48, stride: int = 2):
        super().__init__()

        def layer(i: int, o: int, s: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU())

        self.layers = nn.Sequential(
            layer(channels, width),
            layer(width, width, stride),
            layer(width, width),
            layer(width, 2 * width, 2),
            layer(2 * width, 2 * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)


class LabelNet(nn.Module):
    """A small CNN that names degradation and content: the yardstick on LR pixels (b, 3, 32, 32),
    and, given a reader, the probe of what its codes carry (both codebooks' embeddings instead of
    the pixels)."""

    def __init__(self, classes: dict[str, int], reader: LRReader | None = None, width: int = 48):
        super().__init__()
        self.reader = [reader] if reader is not None else []  # in a list: not a part that trains
        d = reader.config.code_dim if reader else 3
        self.body = LabelBody(d, width, stride=1 if reader else 2)
        extra = reader.config.summary * d if reader else 0
        self.heads = nn.ModuleDict({k: nn.Linear(4 * width + extra, n) for k, n in classes.items()})

    def forward(self, lr: Tensor) -> dict[str, Tensor]:
        """LR photos (b, 3, 32, 32) in [0, 1] → logits of each label."""
        if self.reader:
            with torch.no_grad():
                e = self.reader[0].vectors[self.reader[0].encode(lr)].permute(0, 3, 1, 2)
            h = torch.cat([self.body(e[:, :, :-1]), e[:, :, -1].flatten(1)], 1)
        else:
            h = self.body(lr - 0.5)
        return {k: head(h) for k, head in self.heads.items()}


def train_labelnet(
    data: scenes.Pairs,
    reader: LRReader | None = None,
    crops: scenes.Pairs | None = None,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    device: str | None = None,
) -> LabelNet:
    """Train a LabelNet on LR pixels, or, given a reader, on its codes (same net, same budget)."""
    dev = device_of(device)
    torch.manual_seed(seed)
    net = LabelNet(reader_targets(data)[0], reader).to(dev).train()
    batches = Mixed(data, crops, dev, seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in tqdm(
        range(steps), desc="probe on codes" if reader else "CNN on pixels", mininterval=10
    ):
        x, t = batches(step, batch)
        loss = sum(
            F.cross_entropy(logits, t[:, k], label_smoothing=0.05)
            for k, logits in enumerate(net(x).values())
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def label_accuracy(net: LabelNet, data: scenes.Pairs, batch: int = 100) -> dict[str, Tensor]:
    """Right (1) or wrong (0) for each pair and label, (n,) each."""
    _, targets = reader_targets(data)
    device = next(net.parameters()).device
    right: dict[str, list[Tensor]] = {}
    for at in range(0, len(data), batch):
        out = net(data.lr[at : at + batch].to(device).float() / 255)
        for k, (name, logits) in enumerate(out.items()):
            right.setdefault(name, []).append(
                (logits.argmax(1).cpu() == targets[at : at + batch, k]).float()
            )
    return {k: torch.cat(v) for k, v in right.items()}
