"""Opening photos: any file that Pillow reads, folders of a user's own photos, and random square crops.

Every picture becomes upright 8-bit RGB; what cannot be read gives one sentence instead of a traceback.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class Dice:
    """Scalars for scenes from one numpy generator."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def pick(self, items, p=None):
        return items[int(self.rng.choice(len(items), p=p))]

    def uniform(self, lo, hi):
        return float(self.rng.uniform(lo, hi))


def square(image: Image.Image, box: tuple[float, float, float, float], size: int, d: Dice, zoom: tuple[float, float]) -> Image.Image:
    """A random square crop of the region `box` (fractions), scaled to size, mirrored half of the time."""
    w, h = image.size
    left, top, right, bottom = box[0] * w, box[1] * h, box[2] * w, box[3] * h
    side = min(right - left, bottom - top) * d.uniform(*zoom)
    x, y = d.uniform(left, right - side), d.uniform(top, bottom - side)
    out = image.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    return ImageOps.mirror(out) if d.uniform(0, 1) < 0.5 else out


def open_photo(path: str | Path) -> Image.Image:
    """Any photo that Pillow opens, upright and as RGB: EXIF rotation applied, transparency on white, first frame of an
    animation, 16-bit grey scaled to 8 bits. Raises ValueError with one sentence if the file is missing or broken."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the path of one photo")
    try:
        image = Image.open(path)
        image.load()
    except Image.DecompressionBombError as e:
        raise ValueError(f"{path} has too many pixels to open safely: scale it down first") from e
    except (OSError, SyntaxError, ValueError) as e:
        broken = (
            "is damaged or cut short"
            if "truncated" in str(e).lower() or "broken" in str(e).lower()
            else "is not an image that Pillow can read"
        )
        raise ValueError(f"{path} {broken}: try to open and save it again as PNG or JPEG") from e
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB copy of any PIL image; see `open_photo`."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image, dtype=np.float32)
        top = 65535.0 if array.max() > 255 else 255.0
        image = Image.fromarray(np.clip(array * (255 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB → (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_image(x: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] → PIL RGB."""
    return Image.fromarray((x.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


class PhotoFolder:
    """A user's own photos: a folder (searched in depth), optionally with `captions.jsonl` beside them.

    Each line of captions.jsonl is {"file": ..., "captions": [rough, middle, final], "tags": [...]}; photos without a
    line have `None` for both. `self[i]` gives (crop (3, size, size) in [0, 1], captions, tags): the crop is the
    largest square at a place chosen by `seed + i`. Raises ValueError if the folder holds no photo.
    """

    SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

    def __init__(self, folder: str | Path, size: int = 128, seed: int = 0):
        self.folder, self.size, self.seed = Path(folder), size, seed
        self.files = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in self.SUFFIXES) if self.folder.is_dir() else []
        if not self.files:
            raise ValueError(f"{folder} holds no photos ({', '.join(sorted(self.SUFFIXES))}): check the path")
        notes = self.folder / "captions.jsonl"
        lines = [json.loads(line) for line in notes.read_text().splitlines() if line.strip()] if notes.exists() else []
        self.notes = {line["file"]: line for line in lines}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, list[str] | None, list[str] | None]:
        image = open_photo(self.files[i])
        scale = max(1.0, self.size / min(image.size))
        if scale > 1:
            image = image.resize((math.ceil(image.width * scale), math.ceil(image.height * scale)), Image.Resampling.BICUBIC)
        cut = square(image, (0, 0, 1, 1), self.size, Dice(self.seed + i), (1.0, 1.0))
        note = self.notes.get(str(self.files[i].relative_to(self.folder)), {})
        return to_tensor(cut), note.get("captions"), note.get("tags")
