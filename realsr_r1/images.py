"""Pictures in and out: the one reader and the one writer of the package.

Whatever is read becomes upright 8-bit sRGB; what cannot be read gives one sentence. What is written
is written beside its place and then moved there.
"""

import io
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from realsr_r1.common import atomic

Source = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation → Image.Transpose
TAGS = (271, 272, 306)  # EXIF: make, model, date
DETAILS, TAKEN, GPS = 34665, (36867, 36880, 36881), 34853  # and when it was taken, and where
OPTIONS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
SEE_THROUGH = ("PNG", "WEBP", "TIFF", "AVIF")  # formats that take an alpha channel
# Full scale of gray numbers by bits and by TIFF's sample format (1: unsigned, 2: signed).
FULL = {(16, 1): 2**16 - 1, (16, 2): 2**15 - 1, (32, 1): 2**32 - 1, (32, 2): 2**31 - 1}


@dataclass(frozen=True)
class Photo:
    """What is kept of a picture: upright RGB (on white where it is see-through), its alpha as mode
    L or None, and of its EXIF camera, date and place."""

    image: Image.Image
    alpha: Image.Image | None = None
    exif: dict[int, Any] = field(default_factory=dict)


def open_photo(source: Source) -> Image.Image:
    """`read(source).image`: any picture as upright 8-bit sRGB."""
    return read(source).image


def read(source: Source) -> Photo:
    """A picture from a path, bytes, an open file, a PIL image, an array (h, w, 3) or a tensor
    (3, h, w), integers or floats in [0, 1]; of an animation the first frame. Else ValueError."""
    name = "the picture"
    if isinstance(source, str | os.PathLike):
        source = Path(source)
        name = str(source)
        if not os.path.exists(source):
            raise ValueError(f"{name} does not exist: check the path")
        if source.is_dir():
            raise ValueError(f"{name} is a folder: give the path of one photo")
    try:
        if isinstance(source, np.ndarray | Tensor):
            return _photo(_from_array(source))
        if not isinstance(source, Image.Image):
            if not isinstance(source, Path):
                source = io.BytesIO(source if isinstance(source, bytes) else source.read())
            source = Image.open(source)
        source.load()
        return _photo(source)
    except (Image.DecompressionBombError, MemoryError) as e:
        raise ValueError(f"{name} has too many pixels to open safely: scale it down first") from e
    except _Refused as e:
        raise ValueError(f"{name} {e}") from e
    except Exception as e:  # decoders raise anything
        why = str(e).lower().replace(name.lower(), "")  # the path may hold these words
        cut = "truncated" in why or "broken" in why
        broken = "is damaged or cut short" if cut else "is not an image that Pillow can read"
        raise ValueError(f"{name} {broken}: try to open and save it again as PNG or JPEG") from e


class _Refused(Exception):
    """Why a picture that can be decoded is not taken."""


def _from_array(x: np.ndarray | Tensor) -> Image.Image:
    """Channels last for arrays, first for tensors."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.movedim(0, -1) if x.ndim == 3 else x).numpy()
    x = x[..., None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4) or not x.size or x.dtype.kind not in "uif":
        shape = f"{x.dtype} {x.shape}"
        raise _Refused(f"must be numbers (h, w, 3), or as a tensor (3, h, w), got {shape}")
    top = 1.0 if x.dtype.kind == "f" else {1: 255.0, 2: 65535.0}.get(x.dtype.itemsize, 255.0)
    return Image.fromarray(_scaled(x.repeat(3, 2) if x.shape[2] == 1 else x, top))


def _scaled(x: np.ndarray, top: float) -> np.ndarray:
    """Numbers from 0 to `top` as 8 bits."""
    x = x.astype(np.float64) / top
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise _Refused(f"holds numbers outside 0 to {top:g}: scale them first")
    return (x * 255).round().astype(np.uint8)


def _gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A picture of 16 or 32 bits or floats as 8 bits, scaled by the kind of number, and its
    alpha."""
    x, tags = np.asarray(image), getattr(image, "tag_v2", {})
    alpha = None
    if isinstance(image.info.get("transparency"), int):
        alpha = Image.fromarray(np.where(x == image.info["transparency"], 0, 255).astype(np.uint8))
    bits, kind = (tags.get(k, (d,)) for k, d in ((258, 16), (339, 1)))
    top = 1.0 if image.mode == "F" else float(FULL.get((bits[0], kind[0]), 65_535))
    if top == FULL[32, 1]:
        x = x.view(np.uint32)
    x = _scaled(x, top)
    return Image.fromarray(255 - x if tags.get(262) == 0 else x), alpha


def _photo(image: Image.Image) -> Photo:
    """Scale, transparency, color profile, orientation, in this order."""
    if not all(image.size):
        raise _Refused("has no pixels")
    profile, exif, alpha = image.info.get("icc_profile"), {}, None
    try:  # EXIF is read for its orientation; what cannot be read is passed over
        found = image.getexif()
        exif = {k: found[k] for k in TAGS if isinstance(found.get(k), str)}
        exif |= {k: v for k in (DETAILS, GPS) if (v := dict(found.get_ifd(k)))}
        turn = TURNS.get(found.get(274))
    except Exception:
        turn = None
    if image.mode.startswith("I") or image.mode == "F":
        image, alpha = _gray(image)
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
    image = _to_srgb(image, profile)
    if alpha is not None and alpha.getextrema()[0] < 255:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    else:
        alpha = None
    if turn is not None:
        image, alpha = image.transpose(turn), alpha and alpha.transpose(turn)
    return Photo(image, alpha, exif)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB by the picture's own color profile where it has one that fits."""
    image = image.convert("RGB") if image.mode in ("P", "1") else image
    try:
        if profile:
            theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, theirs, SRGB, outputMode="RGB")
        if image.mode == "LAB":
            lab = ImageCms.createProfile("LAB")
            return ImageCms.profileToProfile(image, lab, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        pass
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB → (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_image(x: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] → PIL RGB."""
    x = (x.detach().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


def format_of(path: str | Path) -> str:
    """Pillow's name of a suffix's format; ValueError if RGB cannot be written in it."""
    name = Path(path).name
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "")
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), kind)
    except Exception as e:
        raise ValueError(
            f"Pillow cannot write {name}: end the name in .png, .jpg, .webp or .tif"
        ) from e
    return kind


def write(photo: Photo, path: str | Path, keep_gps: bool = False) -> None:
    """Write a picture with its alpha (where the format has one), camera and date, its place only if
    asked for, tagged as sRGB."""
    kind, image, exif = format_of(path), photo.image, Image.Exif()
    if photo.alpha is not None and kind in SEE_THROUGH:
        image = image.copy()
        image.putalpha(photo.alpha)
    kept = {k: v for k, v in photo.exif.items() if k != GPS or keep_gps}
    kept[DETAILS] = {k: v for k, v in photo.exif.get(DETAILS, {}).items() if k in TAKEN}
    exif.update({k: v for k, v in kept.items() if v})
    options = OPTIONS.get(kind, {}) | {"icc_profile": SRGB.tobytes()}
    with suppress(Exception):  # Pillow raises many kinds: with a damaged entry all are left out
        options |= {"exif": exif.tobytes()} if len(exif) else {}  # TIFF takes them as bytes alone
    with atomic(path) as part:
        image.save(part, kind, **options)
