"""Photo collages and labelled photos: an image, three captions of growing detail, and tags.

A collage puts a real cut-out photograph on a real background photograph, so the object, its colour,
size and position and the background are known exactly; captions and rewards have exact ground
truth, without a captioner. Captions are controlled English of fixed length, one template a level:

    rough   a bird on grass
    middle  a white seabird on green grass
    final   a large white seabird at the lower left on green grass with trees

Whole labelled photographs (windmills, monuments, fish, coral, solar panels) use the same templates.
Splits are by cut-out and by background photograph: what is validated or tested was never seen in
training.
"""

import json
import pickle
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from realsr_r1.corpus.folders import Dice, square
from realsr_r1.first import degradation

ASSETS = Path(__file__).parents[1] / "assets"
COLORS = (
    "black",
    "gray",
    "white",
    "red",
    "orange",
    "brown",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
)
# Hue ranges in degrees.
HUES = (
    (0, 18, "red"),
    (18, 42, "orange"),
    (42, 68, "yellow"),
    (68, 165, "green"),
    (165, 258, "blue"),
    (258, 300, "purple"),
    (300, 345, "pink"),
    (345, 361, "red"),
)
SIZES = ("small", "medium", "large")
VERTICAL, HORIZONTAL = ("upper", "central", "lower"), ("left", "middle", "right")
PREPOSITIONS = {
    "grass": "on",
    "sand": "on",
    "road": "on",
    "wall": "against",
    "sky": "against",
    "water": "in",
    "leaves": "among",
}
# Where each category is met. "Ground" backgrounds get an object that stands on them and casts a
# shadow.
PLACES = {
    "bird": ("grass", "sand", "road", "sky", "leaves"),
    "mammal": ("grass", "sand", "road", "wall"),
    "fish": ("water",),
    "insect": ("leaves", "grass", "wall", "sand"),
    "flower": ("leaves", "grass", "wall"),
    "fruit": ("leaves", "grass", "sand", "wall"),
    "plant": ("grass", "sand", "wall"),
    "coin": ("sand", "road", "wall", "leaves"),
    "instrument": ("wall", "grass", "road", "sand"),
    "tool": ("wall", "grass", "road", "sand"),
    "vehicle": ("road", "sand", "grass"),
}
KIND_PLACES = {
    "whale": ("water",),
    "seal": ("sand", "water"),
    "plane": ("sky",),
    "balloon": ("sky",),
    "ship": ("water",),
    "penguin": ("sand", "road", "water"),
}
FLYING = {
    "songbird",
    "parrot",
    "seabird",
    "raptor",
    "pigeon",
    "wader",
    "plane",
    "balloon",
    "waterfowl",
}
GROUND = {"grass", "sand", "road"}
SPLITS = ("train", "val", "test")


@dataclass
class Scene:
    """One sample: `image` (3, s, s) in [0, 1] and everything that is known about it."""

    image: Tensor
    category: str
    kind: str
    color: str
    size: str
    vertical: str
    horizontal: str
    background: str
    background_color: str
    detail: str

    @property
    def captions(self) -> tuple[str, str, str]:
        """The rough, middle and final caption."""
        prep = PREPOSITIONS[self.background]
        return (
            f"a {self.category} {prep} {self.background}",
            f"a {self.color} {self.kind} {prep} {self.background_color} {self.background}",
            f"a {self.size} {self.color} {self.kind} at the {self.vertical} {self.horizontal} "
            f"{prep} {self.background_color} {self.background} with {self.detail}",
        )

    @property
    def tags(self) -> tuple[str, ...]:
        """What an object detector would list: the things in the picture, most important first."""
        return tuple(dict.fromkeys((self.category, self.background)))


@lru_cache(maxsize=1)
def metadata() -> dict:
    """assets/scenes.json: category, kind and split of each cut-out, region and class of each
    background, photo labels."""
    path = ASSETS / "scenes.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} is missing from the package's assets: reinstall realsr_r1 from a "
            f"complete checkout"
        )
    return json.loads(path.read_text())


def vocabulary() -> list[str]:
    """Every word the captions can use, sorted: the policy's text vocabulary is built from it."""
    m = metadata()
    words = {
        "a",
        "at",
        "the",
        "with",
        *COLORS,
        *SIZES,
        *VERTICAL,
        *HORIZONTAL,
        *PREPOSITIONS,
        *PREPOSITIONS.values(),
    }
    for e in (*m["cutouts"].values(), *(p for p in m["photos"].values() if "category" in p)):
        words |= {e["category"], e["kind"]} | ({e["detail"]} if "detail" in e else set())
    words |= {r["detail"] for regions in m["backgrounds"].values() for r in regions}
    return sorted(words)


def color_name(pixels: np.ndarray) -> str:
    """Name the dominant colour of (n, 3) pixels in [0, 255]: a vote of the pixels, each named by
    hue and brightness."""
    if len(pixels) == 0:
        return "gray"
    # At most about 3,000 evenly spaced pixels vote: more do not change the winner.
    r, g, b = (
        np.ascontiguousarray(pixels[:: max(1, len(pixels) // 3000)].T).astype(np.float32) / 255
    )
    hi, lo = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    chroma = hi - lo
    sat = chroma / np.maximum(hi, 1e-6)
    safe = np.maximum(chroma, 1e-6)
    hue = (
        np.where(
            hi == r, ((g - b) / safe) % 6, np.where(hi == g, (b - r) / safe + 2, (r - g) / safe + 4)
        )
        * 60
    )
    index = {c: i for i, c in enumerate(COLORS)}
    name = np.full(len(r), index["gray"])
    name[hi < 0.22] = index["black"]
    name[(hi > 0.78) & (sat < 0.16)] = index["white"]
    vivid = (sat >= 0.2) & (hi >= 0.22)
    for start, end, color in HUES:
        name[vivid & (hue >= start) & (hue < end)] = index[color]
    # Dark or dull reds and oranges are browns; light washed-out reds are pinks.
    name[vivid & (hue >= 8) & (hue < 45) & ((hi < 0.62) | (sat < 0.5))] = index["brown"]
    name[vivid & ((hue < 8) | (hue >= 345)) & (hi > 0.75) & (sat < 0.5)] = index["pink"]
    return COLORS[np.bincount(name, minlength=len(COLORS)).argmax()]


@lru_cache(maxsize=512)
def _load(kind: str, name: str) -> Image.Image:
    image = Image.open(ASSETS / kind / f"{name}.webp")
    return image.convert("RGBA" if kind == "cutouts" else "RGB")


@lru_cache(maxsize=8)
def _pools(split: str) -> tuple[dict, dict, list]:
    """For one split: category → cut-out names, background class → (photo, region),
    labelled photos."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    m, cutouts, backgrounds = metadata(), {}, {}
    for name, e in m["cutouts"].items():
        if e["split"] == split:
            cutouts.setdefault(e["category"], []).append(name)
    for name, regions in m["backgrounds"].items():
        for r in regions:
            if r["split"] == split:
                backgrounds.setdefault(r["cls"], []).append((name, r))
    photos = sorted(n for n, e in m["photos"].items() if "category" in e and e["split"] == split)
    return cutouts, backgrounds, photos


def collage(seed: int, split: str = "train", size: int = 128) -> Scene:
    """The collage of this seed: same seed, split and size, same picture (numpy's generator; no
    global state)."""
    d = Dice(seed)
    cutouts, backgrounds, _ = _pools(split)
    categories = sorted(cutouts)
    p = np.sqrt([len(cutouts[c]) for c in categories])
    category = d.pick(categories, p / p.sum())
    name = d.pick(sorted(cutouts[category]))
    kind = metadata()["cutouts"][name]["kind"]
    places = [
        b
        for b in KIND_PLACES.get(kind, PLACES[category])
        if b in backgrounds and (b != "sky" or kind in FLYING)
    ]
    place = d.pick(places)
    photo, region = d.pick(backgrounds[place])
    canvas = square(
        _load("photos", photo),
        region["box"],
        size,
        d,
        (0.75, 1.0) if place in GROUND else (0.5, 1.0),
    )
    canvas = np.asarray(canvas, dtype=np.float32)
    canvas = np.clip(canvas * d.uniform(0.85, 1.12), 0, 255)

    cut = _load("cutouts", name)
    cut = cut.crop(cut.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    if d.uniform(0, 1) < 0.5:
        cut = ImageOps.mirror(cut)
    word = d.pick(SIZES, (0.2, 0.4, 0.4))
    lo, hi = {"small": (0.34, 0.44), "medium": (0.48, 0.62), "large": (0.68, 0.88)}[word]
    longest = d.uniform(lo, hi) * size
    f = longest / max(cut.size)
    cut = cut.resize(
        (max(8, round(cut.width * f)), max(8, round(cut.height * f))), Image.Resampling.LANCZOS
    )
    w, h = cut.size
    x = d.uniform(0.02 * size, max(0.02 * size + 1, size * 0.98 - w))
    if place in GROUND:
        bottom = d.uniform(0.62, 0.96) * size if word != "large" else d.uniform(0.86, 0.97) * size
        y = max(0.02 * size, bottom - h)
    else:
        y = d.uniform(0.02 * size, max(0.02 * size + 1, size * 0.98 - h))
    x, y = int(x), int(y)

    layer = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    layer.paste(cut, (x, y))
    rgba = np.asarray(layer, dtype=np.float32)
    alpha = rgba[..., 3:] / 255
    if place in GROUND or place in ("wall", "leaves"):
        canvas = canvas * (1 - _shadow(layer, place in GROUND, y + h, size))
    inside = alpha[..., 0] > 0.5
    # Mild colour matching: move the object's brightness and tint a little towards the scene's.
    target, own = (
        canvas.mean((0, 1)),
        rgba[..., :3][inside].mean(0) if inside.any() else canvas.mean((0, 1)),
    )
    matched = np.clip(
        rgba[..., :3] * (1 + 0.15 * (target.mean() / max(own.mean(), 1) - 1)).clip(0.8, 1.15),
        0,
        255,
    )
    matched = 0.94 * matched + 0.06 * target
    image = canvas * (1 - alpha) + matched * alpha
    if place == "water":  # under water everything takes on some of the water's colour
        image = image * (1 - 0.15 * alpha) + 0.15 * alpha * target
    pixels = np.clip(np.round(image), 0, 255).astype(np.uint8)
    cy, cx = (y + h / 2) / size, (x + w / 2) / size
    return Scene(
        torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
        category,
        kind,
        color_name(pixels[inside]),
        word,
        VERTICAL[min(2, int(cy * 3))],
        HORIZONTAL[min(2, int(cx * 3))],
        place,
        color_name(pixels[alpha[..., 0] < 0.1]),
        region["detail"],
    )


def _shadow(layer: Image.Image, ground: bool, bottom: int, size: int) -> np.ndarray:
    """(size, size, 1) darkening: a flattened, blurred silhouette at the feet, or a soft halo on a
    wall."""
    alpha = layer.getchannel("A")
    if ground:
        squash = 0.18
        flat = alpha.transform(
            (size, size),
            Image.Transform.AFFINE,
            (1, 0.5, -0.5 * bottom * 1.0, 0, 1 / squash, bottom * (1 - 1 / squash)),
        )
        return (
            np.asarray(flat.filter(ImageFilter.GaussianBlur(2.0)), dtype=np.float32)[..., None]
            / 255
            * 0.45
        )
    moved = alpha.transform((size, size), Image.Transform.AFFINE, (1, 0, -3, 0, 1, -3))
    return (
        np.asarray(moved.filter(ImageFilter.GaussianBlur(3.0)), dtype=np.float32)[..., None]
        / 255
        * 0.3
    )


def photo_scene(seed: int, split: str = "train", size: int = 128) -> Scene:
    """A whole labelled photograph, randomly cropped; colours from the pixels of its centre and its
    border."""
    d = Dice(seed)
    photos = _pools(split)[2]
    name = d.pick(photos)
    e = metadata()["photos"][name]
    pixels = np.asarray(square(_load("photos", name), (0, 0, 1, 1), size, d, (0.85, 1.0)))
    centre = np.zeros((size, size), bool)
    centre[size // 4 : -size // 4, size // 4 : -size // 4] = True
    return Scene(
        torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255,
        e["category"],
        e["kind"],
        color_name(pixels[centre]),
        "large",
        "central",
        "middle",
        e["background"],
        color_name(pixels[~centre]),
        e["detail"],
    )


def scene(seed: int, split: str = "train", size: int = 128, photo_share: float = 0.1) -> Scene:
    """A collage or, for `photo_share` of the seeds, a whole labelled photograph."""
    return (photo_scene if Dice(seed ^ 0x5EED).uniform(0, 1) < photo_share else collage)(
        seed, split, size
    )


def crop(seed: int, split: str = "train", size: int = 128) -> Tensor:
    """A random square of any shipped photograph of the split, (3, size, size) in [0, 1]; no caption
    needed."""
    d = Dice(seed)
    names = sorted(n for n, e in metadata()["photos"].items() if e["split"] == split)
    image = square(_load("photos", d.pick(names)), (0, 0, 1, 1), size, d, (0.45, 1.0))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def stack(
    seeds: range | list[int], split: str = "train", size: int = 128, photo_share: float = 0.1
) -> tuple[Tensor, list[Scene]]:
    """Scenes of several seeds as one batch (b, 3, size, size) and the list of them."""
    scenes = [scene(s, split, size, photo_share) for s in seeds]
    return torch.stack([s.image for s in scenes]), scenes


@dataclass
class Pairs:
    """HR and LR images of some scenes with all that is known: `hr` (n, 3, s, s) and `lr` (n, 3,
    s/4, s/4), uint8."""

    hr: Tensor
    lr: Tensor
    labels: list[dict[str, str]]
    scenes: list[Scene]  # their `image` is dropped: it is in `hr`

    def __len__(self) -> int:
        return len(self.hr)


def pairs(
    seeds: range | list[int],
    split: str = "train",
    preset: str = "nano",
    size: int = 128,
    photo_share: float = 0.1,
    crops: bool = False,
) -> Pairs:
    """Scenes of these seeds, each degraded by a draw of its own seed: the same seed always gives
    the same pair.

    With `crops` the pictures are random squares of all the split's photographs, which have labels
    but no scene (`scenes` is empty): degradation can be learnt from any picture, and more pictures
    teach it better.
    """
    hr, lr, labels, scenes = [], [], [], []
    for seed in tqdm(seeds, desc=f"{split} pairs", disable=len(seeds) < 1000, mininterval=5):
        s = None if crops else scene(seed, split, size, photo_share)
        x = crop(seed, split, size) if crops else s.image
        d = degradation.degrade(x[None], preset, torch.Generator().manual_seed(seed))
        hr.append((x * 255).round().byte())
        lr.append((d.lr[0] * 255).round().byte())
        labels.append(d.labels[0])
        if s:
            s.image = None
            scenes.append(s)
    return Pairs(torch.stack(hr), torch.stack(lr), labels, scenes)


# First seed of each split, so that no two splits can share a composition.
FIRST_SEED = {"train": 0, "val": 1_000_000, "test": 2_000_000}


def cached_pairs(
    n: int,
    split: str = "train",
    preset: str = "nano",
    cache: str | Path | None = None,
    crops: bool = False,
) -> Pairs:
    """The first `n` pairs of a split, kept in the folder `cache` (if given) and read from there the
    next time.

    A cache that holds at least `n` pairs of this split and preset is used; a damaged one is made
    again.
    """
    path = Path(cache) / f"{split}_{preset}{'_crops' * crops}.pt" if cache else None
    if path and path.exists():
        try:
            saved = torch.load(path, weights_only=True)
            if len(saved["hr"]) >= n:
                known = [json.loads(line) for line in saved["known"][:n]]
                return Pairs(
                    saved["hr"][:n],
                    saved["lr"][:n],
                    [k[0] for k in known],
                    [Scene(None, **k[1]) for k in known if k[1]],
                )
        except (RuntimeError, OSError, KeyError, ValueError, pickle.UnpicklingError):
            path.unlink()
    made = pairs(range(FIRST_SEED[split], FIRST_SEED[split] + n), split, preset, crops=crops)
    if path:
        whole = [{k: v for k, v in asdict(s).items() if k != "image"} for s in made.scenes] or [
            None
        ] * len(made)
        known = [json.dumps(pair) for pair in zip(made.labels, whole, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"hr": made.hr, "lr": made.lr, "known": known}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return made
