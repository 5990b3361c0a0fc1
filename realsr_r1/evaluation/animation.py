"""A chain of thought as a moving picture: texts and images appear in the order in which the policy
writes them. A GIF, because that plays everywhere, on GitHub too."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from realsr_r1 import images, photographs
from realsr_r1.common import atomic
from realsr_r1.evaluation import sheets
from realsr_r1.pipeline import RealSR
from realsr_r1.sampling import Sampling
from realsr_r1.vlcot import GRIDS, IMAGE_TAGS, TAGS, Chain

# Shipped test photographs of kinds that the policy knows.
SHOWN = ("akaka-falls", "chelsea", "libjxl-testdata-flower", "sklearn-china")
SIDE, GAP, TEXT = 128, 8, 40  # pixels; TEXT is the height of the words below
STRIPS = 4  # steps in which an image appears
HEADS = ("LR photo", "rough image", "middle image", "final image", "restored")


@dataclass(frozen=True)
class Shown:
    """The chain of one LR photo, and the pictures of HEADS, SIDE pixels each."""

    chain: Chain
    pictures: list[Image.Image]


def shown(model: RealSR, lr: Tensor, seed: int = 0) -> list[Shown]:
    """Chains for LR photos (b, 3, 32, 32) in [0, 1], with their pictures."""
    samples = model.sample(lr, Sampling(), torch.Generator().manual_seed(seed))
    restored, out = model.finish(samples.chains, lr), []
    for x, y, chain in zip(lr, restored, samples.chains, strict=True):
        steps = [model.decode(getattr(chain, t)[None])[0].cpu() for t in IMAGE_TAGS]
        pictures = [sheets.fit_side(images.to_image(p), SIDE) for p in (x, *steps, y)]
        out.append(Shown(chain, pictures))
    return out


def _panel(item: Shown, written: list[str], strips: float) -> Image.Image:
    """One photograph at one moment: the parts `written`, of the last image the share `strips`."""
    width = len(HEADS) * (SIDE + GAP) + GAP
    out = Image.new("RGB", (width, 16 + SIDE + TEXT), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(size=11)
    done = written == list(TAGS) and strips == 1
    for i, (head, picture) in enumerate(zip(HEADS, item.pictures, strict=True)):
        tag = IMAGE_TAGS[i - 1] if 0 < i < 4 else None
        if (tag is not None and tag not in written) or (i == 4 and not done):
            continue
        left, last = GAP + i * (SIDE + GAP), tag is not None and tag == written[-1]
        pen.text((left, 1), head, fill="black", font=font)
        rows = round(SIDE * strips) if last else SIDE
        out.paste(picture.crop((0, 0, SIDE, rows)), (left, 16))
    texts = [t for t in written if t not in IMAGE_TAGS]
    said = getattr(item.chain, texts[-1])
    lines = textwrap.wrap(f"{texts[-1].replace('_', ' ')}: {said}", 108)
    pen.multiline_text((GAP, 16 + SIDE + 6), "\n".join(lines[:3]), fill="black", font=font)
    return out


def frames(items: list[Shown]) -> list[Image.Image]:
    """All moments, the photographs below each other."""
    moments: list[tuple[list[str], float]] = []
    for i, tag in enumerate(TAGS):
        written = list(TAGS[: i + 1])
        steps = STRIPS * GRIDS[IMAGE_TAGS.index(tag)] // GRIDS[-1] if tag in IMAGE_TAGS else 1
        moments += [(written, (k + 1) / steps) for k in range(steps)]
    panels = [[np.asarray(_panel(item, *moment)) for item in items] for moment in moments]
    return [Image.fromarray(np.concatenate(column)) for column in panels]


def write(items: list[Shown], path: str | Path, milliseconds: int = 700) -> None:
    """The moments as an endless GIF; the last one stays four seconds."""
    pictures = [f.quantize(192, dither=Image.Dither.NONE) for f in frames(items)]
    times = [milliseconds] * (len(pictures) - 1) + [4000]
    options = {"save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0}
    with atomic(path) as part:
        pictures[0].save(part, "GIF", optimize=True, **options)


def draw(model: RealSR, path: str | Path, seed: int = 0) -> None:
    """Four shipped test photographs of medium damage."""
    photos = photographs.load("test")
    chosen = [next(p for p in photos if name in p.file) for name in SHOWN]
    data = photographs.Pairs(photos, "nano-medium", training=False)
    lr = torch.stack([data[photos.index(p)]["lr"] for p in chosen]).float() / 255
    write(shown(model, lr, seed), path)
