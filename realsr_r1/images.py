"""Opening photos: any file that Pillow reads, folders of a user's own photos, and random square
crops.

Every picture becomes upright 8-bit RGB; what cannot be read gives one sentence instead of a
traceback.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def open_photo(path: str | Path) -> Image.Image:
    """Any photo that Pillow opens, upright and as RGB: EXIF rotation applied, transparency on
    white, first frame of an animation, 16-bit grey scaled to 8 bits. Raises ValueError with one
    sentence if the file is missing or broken."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the path of one photo")
    return decode_photo(path, str(path))


def decode_photo(source: str | Path | BinaryIO, name: str) -> Image.Image:
    """A file, or an open one, as `open_photo` gives it; ValueError with one sentence about `name`
    if it is broken."""
    try:
        image = Image.open(source)
        image.load()
    except Image.DecompressionBombError as e:
        raise ValueError(f"{name} has too many pixels to open safely: scale it down first") from e
    except (OSError, SyntaxError, ValueError) as e:
        why = str(e).lower().replace(str(source).lower(), "")  # the path may hold these words
        cut = "truncated" in why or "broken" in why
        broken = "is damaged or cut short" if cut else "is not an image that Pillow can read"
        raise ValueError(f"{name} {broken}: try to open and save it again as PNG or JPEG") from e
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
    x = (x.detach().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
