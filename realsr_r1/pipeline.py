"""A whole photo, ×4: read once, draw many.

The photo scaled down to one tile gives the reading: what it shows, in three texts. Each tile then
names its own degradation and draws its images under these texts. Eye and decoder are convolutional:
the one sees the whole photo, so a tile's border knows what lies beside it; the other decodes the
codes of all tiles as one grid, beside the LR photo. So tiles lie side by side.
"""

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from realsr_r1 import images, vlcot
from realsr_r1.common import check_number, device_of, generator, out_of_memory, write_text
from realsr_r1.policy import ChainPolicy
from realsr_r1.sampling import Samples, Sampling, sample
from realsr_r1.tokenizer import FACTOR, SCALE, VQModel
from realsr_r1.vlcot import GRIDS, TEXT_TAGS, Chain

WEIGHTS = Path(__file__).parent / "assets" / "nano"
TILE = GRIDS[-1] * FACTOR // SCALE  # LR pixels
CODE = FACTOR // SCALE  # LR pixels per code
MAX_PIXELS = 1024 * 1024  # of the LR photo: the result has 16 times as many
WINDOW, MARGIN = 64, 6  # codes: the decoder's window on large photos, and what it sees around it


@dataclass
class Tile:
    """Where a tile lies, in LR pixels, and the chain that was written for it."""

    x: int
    y: int
    chain: Chain


@dataclass
class Restoration:
    """A restored photo and how it came about; shows itself in a notebook."""

    image: Image.Image
    reading: Chain  # of the whole photo, its three images included
    tiles: list[Tile]
    settings: dict = field(default_factory=dict)
    complete: bool = True  # False after Ctrl-C: the rest is decoded from the LR photo alone
    alpha: Image.Image | None = None  # of the photo, enlarged
    exif: dict = field(default_factory=dict)  # camera, date and place of the photo

    @property
    def trace(self) -> dict:
        """All that was thought, JSON-able."""

        def plain(chain: Chain) -> dict:
            parts = {t: getattr(chain, t) for t in vlcot.TAGS}
            return {t: p.tolist() if isinstance(p, Tensor) else p for t, p in parts.items()}

        tiles = [{"x": t.x, "y": t.y, **plain(t.chain)} for t in self.tiles]
        settings = {"settings": self.settings, "complete": self.complete}
        return settings | {"reading": plain(self.reading), "tiles": tiles}

    def save(
        self, path: str | Path, trace: str | Path | None = None, keep_gps: bool = False
    ) -> None:
        """Write the picture, with the photo's alpha, camera and date (and place only if asked for),
        and the trace as JSON. ValueError for a place or a suffix that cannot be written."""
        if trace and Path(path).resolve() == Path(trace).resolve():
            raise ValueError(f"picture and trace are both to go to {path}: give two names")
        images.write(images.Photo(self.image, self.alpha, self.exif), path, keep_gps)
        if trace:
            write_text(trace, json.dumps(self.trace, default=float))

    def _repr_png_(self) -> bytes:
        return self.image._repr_png_()


class RealSR:
    """Tokenizer and policy together: the model that restores.

    `model("photo.jpg", seed=0)` restores a photo; `sample` and `decode` are its two halves."""

    parts = vlcot.TAGS  # of a chain, that are written

    def __init__(self, tokenizer: VQModel, policy: ChainPolicy, name: str = "nano"):
        if tokenizer.config.codes != policy.config.codes:
            raise ValueError(
                f"tokenizer ({tokenizer.config.codes} codes) and policy ({policy.config.codes}) do "
                "not belong together: use weights of one training"
            )
        self.tokenizer, self.policy, self.name = tokenizer.eval(), policy.eval(), name
        tokenizer.decoder.to(memory_format=torch.channels_last)  # a third faster on CPUs

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "nano", device: str | None = None, policy: str | None = None
    ) -> "RealSR":
        """Weights by shipped name, folder or hub id; without `policy`, policy-grpo where there is
        one, else policy-sft. ValueError or FileNotFoundError, in a sentence, if there are none."""
        dev, folder = device_of(device), find_weights(name)
        trained = (folder / "policy-grpo" / "model.safetensors").exists()
        parts = folder / "tokenizer", folder / (policy or f"policy-{'grpo' if trained else 'sft'}")
        for part in parts:
            if not (part / "model.safetensors").exists():
                where = f"weights {part.name} are missing in {folder.name}/"
                raise FileNotFoundError(f"{where}: train them (realsr train --help) or reinstall")
        tokenizer = load_tokenizer(parts[0])
        with _readable(parts[1]):
            model = ChainPolicy.from_pretrained(parts[1], dtype=torch.float32)
        return cls(tokenizer.to(dev), model.to(dev), str(name))

    def save_pretrained(self, folder: str | Path, policy: str = "policy-sft") -> None:
        """Write both networks, in half precision, for `from_pretrained(folder)`."""
        for part, name in ((self.tokenizer, "tokenizer"), (self.policy, policy)):
            copy.deepcopy(part).half().save_pretrained(Path(folder) / name)
        for file in ("README.md", "clean.safetensors"):  # the hub's empty card; an older ending
            (Path(folder) / "tokenizer" / file).unlink(missing_ok=True)

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def sample(
        self,
        lr: Tensor,
        sampling: Sampling = Sampling(),
        generator: torch.Generator | list[torch.Generator] | None = None,
        texts: dict[str, str] | None = None,
    ) -> Samples:
        """`sampling.sample` with texts: parts whose words are given."""
        grammar = self.policy.grammar(self.parts, texts)
        return sample(self.policy, lr, sampling, generator, grammar)

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor | None = None,
        lr: Tensor | None = None,
        trust: Tensor | float | None = None,
        clean: bool = True,
    ) -> Tensor:
        """`VQModel.decode` with inputs from any device."""
        parts = [None if x is None else x.to(self.device) for x in (codes, lr)]
        return self.tokenizer.decode(*parts, trust, clean)

    @torch.no_grad()
    def finish(self, chains: list[Chain], lr: Tensor, clean: bool = True) -> Tensor:
        """Pictures (b, 3, 128, 128) of chains for tiles (b, 3, 32, 32), by either ending."""
        codes = torch.stack([c.final_image for c in chains])
        trust = self.tokenizer.trust(torch.tensor([float(reads_clean(c)) for c in chains]))
        return self.decode(codes, lr, trust, clean).cpu()

    def read(self, lr: Tensor, sampling: Sampling, generator: torch.Generator) -> Chain:
        """The reading of a whole LR photo (3, h, w), from its middle square at one tile's size."""
        side = min(lr.shape[-2:])
        y, x = ((n - side) // 2 for n in lr.shape[-2:])
        square = lr[None, :, y : y + side, x : x + side]
        small = F.interpolate(square, size=TILE, mode="area" if side > TILE else "nearest")
        return self.sample(small, sampling, generator).chains[0]

    def __call__(
        self,
        photo: images.Source,
        seed: int = 0,
        sampling: Sampling = Sampling(),
        batch: int = 96,
        progress: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> Restoration:
        """Restore a photo ×4.

        Args:
            photo: whatever `images.read` takes: a path, bytes, a PIL image, an array.
            seed, sampling: how tokens are chosen, one chain a tile; same seed, same picture.
            batch: tiles at a time, halved where memory runs out; progress: show a bar.
            max_pixels: refuse larger photos.
        Raises ValueError, in one sentence, for unreadable or too large photos. Ctrl-C keeps what is
        done: the rest comes from the LR photo alone."""
        check_number("batch", batch, 1)
        check_number("seed", seed, -(2**63))
        photo, sampling = opened(photo, max_pixels), replace(sampling, num_generations=1)
        w, h = photo.image.size
        lr = pad(images.to_tensor(photo.image))
        reading = self.read(lr, sampling, generator(seed))
        tiles, places = [], origins(lr.shape[-2:])
        grid = torch.full([n // CODE for n in lr.shape[-2:]], -1)
        draw = self._drawer(lr, places, reading, (sampling, seed))
        try:
            for place, chain in in_batches(places, draw, batch, progress):
                tiles.append(Tile(*place, chain))
                put(grid, chain.final_image, place)
        except KeyboardInterrupt:
            print(f"stopped after {len(tiles)} of {len(places)} tiles: the rest is without a chain")
        clean = torch.tensor(sum(reads_clean(t.chain) for t in tiles) / max(1, len(tiles)))
        trust = float(self.tokenizer.trust(clean))
        out = decode_grid(self, grid, lr, trust)[:, : h * SCALE, : w * SCALE]
        settings = {"model": self.name, "seed": int(seed), "device": str(self.device)}
        settings |= {"trust": trust, "lr_size": [w, h], "tile": TILE, "scale": SCALE}
        alpha = photo.alpha and photo.alpha.resize((w * SCALE, h * SCALE), Image.Resampling.BICUBIC)
        parts = settings | asdict(sampling), len(tiles) == len(places), alpha, photo.exif
        return Restoration(images.to_image(out), reading, tiles, *parts)

    def _drawer(
        self, lr: Tensor, places: list, reading: Chain, how: tuple[Sampling, int]
    ) -> Callable[[int, int], list[Chain]]:
        """What `in_batches` calls: chains of tiles under the reading's texts; of one, itself."""
        if len(places) == 1:
            return lambda first, size: [reading]
        texts, (sampling, seed) = {t: getattr(reading, t) for t in TEXT_TAGS[1:]}, how
        with torch.no_grad():
            seen, n = self.policy.eye(lr[None].to(self.device, self.policy.dtype))[0], GRIDS[-1]

        def draw(first: int, size: int) -> list[Chain]:
            corners = [(x // CODE, y // CODE) for x, y in places[first : first + size]]
            some = torch.stack([seen[:, y : y + n, x : x + n] for x, y in corners])
            own = [generator(seed, first + i) for i in range(len(some))]
            return self.sample(some, sampling, own, texts).chains

        return draw


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """ValueError, in one sentence, where weights cannot be read."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin says what it does
            yield
    except Exception as e:  # safetensors, json, torch and hub each raise their own kinds
        raise ValueError(
            f"weights {folder.name} in {folder.parent.name}/ are cut short, damaged or of another "
            f"version ({type(e).__name__}): copy or train them again"
        ) from e


def load_tokenizer(folder: Path) -> VQModel:
    """A folder's tokenizer in full precision; ValueError where it cannot be read."""
    with _readable(folder):
        return VQModel.from_pretrained(folder).float()


def opened(photo: images.Source | images.Photo, max_pixels: int) -> images.Photo:
    photo = photo if isinstance(photo, images.Photo) else images.read(photo)
    w, h = photo.image.size
    if w * h > max_pixels:
        what = f"{w}x{h} pixels rarely need ×4"
        raise ValueError(f"{what}: scale it down, or allow larger photos (--max-megapixels)")
    return photo


def in_batches(
    places: list[tuple[int, int]], draw: Callable[[int, int], list], batch: int, progress: bool
) -> Iterator[tuple[tuple[int, int], Any]]:
    """Each place with what `draw(first, size)` gives for it, `batch` places at a time, halved where
    memory runs out."""
    first = 0
    with tqdm(total=len(places), desc="tiles", disable=not progress) as bar:
        while first < len(places):
            size = min(batch, len(places) - first)
            try:
                done = draw(first, size)
            except RuntimeError as e:
                if size == 1 or not out_of_memory(e):
                    raise
                batch = size // 2
                continue
            yield from zip(places[first : first + len(done)], done, strict=True)
            first += len(done)
            bar.update(len(done))


def find_weights(name: str | Path) -> Path:
    """The folder of weights: the shipped ones for "nano", a folder, or a hub id's download."""
    if str(name) == "nano":
        return WEIGHTS
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(name)))
    except (HFValidationError, HfHubHTTPError, OSError) as e:
        raise FileNotFoundError(
            f"{name} is no folder and no hub repository that can be reached: check the name"
        ) from e


def pad(lr: Tensor) -> Tensor:
    """(3, h, w) padded on the right and below to an even size of at least one tile."""
    h, w = (max(TILE, math.ceil(n / CODE) * CODE) for n in lr.shape[-2:])
    return F.pad(lr[None], (0, w - lr.shape[-1], 0, h - lr.shape[-2]), mode="replicate")[0]


def origins(
    size: tuple[int, int], tile: int = TILE, stride: int = TILE, step: int = CODE
) -> list[tuple[int, int]]:
    """(x, y) of the tiles that cover an LR photo of (h, w) ≥ one tile, multiples of `step`."""

    def along(length: int) -> list[int]:
        n = 1 + math.ceil((length - tile) / stride)
        return [round(i * (length - tile) / max(1, n - 1) / step) * step for i in range(n)]

    return [(x, y) for y in along(size[0]) for x in along(size[1])]


def put(grid: Tensor, codes: Tensor, place: tuple[int, int]) -> None:
    """Write a tile's codes (16, 16) into the grid (h, w), where nothing has been written yet."""
    x, y = place[0] // CODE, place[1] // CODE
    here = grid[y : y + len(codes), x : x + len(codes)]
    here[:] = torch.where(here < 0, codes, here)


def reads_clean(chain: Chain) -> bool:
    """Whether a chain names blur, noise and compression, and none of them above light."""
    named = (chain.labels.get(k) for k in ("blur", "noise", "compression"))
    return all(level in ("no", "light") for level in named)


def decode_grid(model: RealSR, grid: Tensor, lr: Tensor, trust: float | None = None) -> Tensor:
    """The whole picture (3, 4h, 4w) from the code grid (h/2, w/2), -1 where the decoder has the LR
    photo (3, h, w) alone, in windows where it is large. `trust`: see `VQModel.decode`."""
    known, codes = grid >= 0, grid.clamp(min=0)
    out = torch.zeros(3, *(n * SCALE for n in lr.shape[-2:]))
    for y in range(0, grid.shape[0], WINDOW):
        for x in range(0, grid.shape[1], WINDOW):
            top, left = max(0, y - MARGIN), max(0, x - MARGIN)
            bottom, right = y + WINDOW + MARGIN, x + WINDOW + MARGIN
            part = codes[None, top:bottom, left:right]
            seen = lr[None, :, top * CODE : bottom * CODE, left * CODE : right * CODE]
            whole = model.decode(part, seen, trust)[0].cpu()
            missing = ~known[top:bottom, left:right]
            if missing.any():
                alone = model.decode(None, seen)[0].cpu()
                mask = missing.repeat_interleave(FACTOR, 0).repeat_interleave(FACTOR, 1)
                whole = torch.where(mask, alone, whole)
            cut = whole[:, (y - top) * FACTOR :, (x - left) * FACTOR :]
            cut = cut[:, : WINDOW * FACTOR, : WINDOW * FACTOR]
            at = slice(y * FACTOR, y * FACTOR + cut.shape[1])
            out[:, at, x * FACTOR : x * FACTOR + cut.shape[2]] = cut
    return out
