"""A whole photo, ×4: overlapping tiles → chains in batches → decoded, blended, with the chain of
thought as a trace."""

import itertools
import json
import math
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from realsr_r1 import images as photos
from realsr_r1.common import device_of, fast_bfloat16
from realsr_r1.first import policy, tokenizer, vlcot
from realsr_r1.first.policy import Sampling
from realsr_r1.first.reader import LRReader
from realsr_r1.first.weights import NETWORKS, WEIGHTS, load, networks_of

TILE, STRIDE, SCALE = 32, 28, 4  # LR pixels, LR pixels, factor
MAX_PIXELS = 1024 * 1024  # of the LR photo: the result has 16 times as many
SECONDS_A_TILE = 0.2  # on two CPU cores, rough; only used to estimate


@dataclass
class Models:
    """What a restoration needs, all on one device and in evaluation mode."""

    tokenizer: tokenizer.VQModel
    reader: LRReader
    guided: tokenizer.GuidedDecoder
    policy: PreTrainedModel

    @property
    def device(self) -> torch.device:
        return self.policy.device


def load_models(
    device: str | None = None, weights: str | Path = WEIGHTS, policy_name: str = "policy-sft"
) -> Models:
    """The shipped weights, or those of another folder laid out alike; one that holds policies alone
    (of `train grpo`) goes with the shipped networks. Raises as `weights.load` and `policy.load` do.
    """
    folder, dev = Path(weights), device_of(device)
    lm = policy.load(folder / policy_name, dev)
    vq, reader, guided = (load(networks_of(folder) / f"{n}.safetensors", dev) for n in NETWORKS)
    if vq.config.codes != lm.nano.codes or reader.vocabulary != lm.nano.lr_codes:
        raise ValueError(
            f"tokenizer ({vq.config.codes} codes) and policy ({lm.nano.codes} codes) do not "
            f"belong together: use weights of one training"
        )
    return Models(vq, reader, guided, lm)


def wavelet_color_fix(restored: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """Detail of `restored` on the low frequencies of `reference`, both (b, 3, h, w): the colour fix
    of PURE (from StableSR), by à-trous smoothing with [1 2 1]/4 at dilations 1, 2, 4 …"""
    k = torch.tensor([1.0, 2.0, 1.0], device=restored.device)
    k = (k[:, None] * k[None] / 16).expand(3, 1, 3, 3)

    def low(x: Tensor) -> Tensor:
        for i in range(levels):
            d = 2**i
            mode = "reflect" if d < min(x.shape[-2:]) else "replicate"
            x = F.conv2d(F.pad(x, (d, d, d, d), mode=mode), k, dilation=d, groups=3)
        return x

    return (restored - low(restored) + low(reference)).clamp(0, 1)


def decode_final(models: Models, codes: Tensor, lr: Tensor, decoder: str = "guided") -> Tensor:
    """Final codes (b, h, w) and LR tiles (b, 3, ·, ·) → (b, 3, 4·, 4·) in [0, 1]. `decoder`:
    "guided", "wavelet" (plain decode and colour fix, the paper's way) or "plain"."""
    if decoder == "guided":
        return tokenizer.guided_decode(models.guided, models.tokenizer, codes, lr)
    y = models.tokenizer.decode(codes)
    if decoder == "plain":
        return y
    if decoder == "wavelet":
        return wavelet_color_fix(
            y,
            F.interpolate(lr, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1),
        )
    raise ValueError(f"no decoder {decoder!r}: choose guided, wavelet or plain")


@torch.no_grad()
def think(
    models: Models,
    lr: Tensor,
    how: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    direct: bool = False,
) -> list[vlcot.Chain]:
    """LR tiles (b, 3, 32, 32) in [0, 1] → one sampled chain each. Under the grammar every chain
    parses."""
    v = models.policy.vocabulary
    prompts = v.prompts(
        models.reader.encode(lr.to(models.device)).cpu(), vlcot.DIRECT if direct else vlcot.CHAIN
    )
    ids = policy.sample(
        models.policy, prompts, how, generator, bfloat16=fast_bfloat16(models.device)
    ).ids.cpu()
    return [vlcot.parse(v.decode(row)) for row in ids]


def tile_origins(length: int) -> list[int]:
    """Left edges of the tiles that cover `length` LR pixels (at least one tile long)."""
    n = 1 + math.ceil(max(0, length - TILE) / STRIDE)
    return [round(i * (length - TILE) / max(1, n - 1)) for i in range(n)]


def _window() -> Tensor:
    """(128, 128) blending weights, falling off over the overlap so that neighbours cross-fade
    without a seam."""
    overlap = (TILE - STRIDE) * SCALE
    ramp = torch.ones(TILE * SCALE)
    edge = (torch.arange(overlap) + 0.5) / overlap
    ramp[:overlap], ramp[-overlap:] = edge, edge.flip(0)
    return ramp[:, None] * ramp[None]


def even_batches(n: int, most: int) -> list[tuple[int, int]]:
    """`n` tiles as (first, end) of an even number of batches of nearly one size, `most` at the
    largest: two workers then end together. They do not depend on the number of workers, for the
    noise of a batch is drawn for all of it."""
    count = min(n, 2 * math.ceil(n / (2 * most)))
    edges = [round(i * n / count) for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def workers_on(device: torch.device) -> int:
    """How many batches of tiles to restore at once. On a CPU a chain's small steps hardly gain from
    a second thread, so each of torch's threads takes a batch of its own; a GPU takes one at a time.
    """
    return max(1, torch.get_num_threads()) if device.type == "cpu" else 1


def restore(
    photo: Image.Image | str | Path,
    models: Models | None = None,
    how: Sampling | None = None,
    seed: int = 0,
    device: str | None = None,
    decoder: str = "guided",
    batch: int = 48,
    progress: bool = True,
    max_pixels: int = MAX_PIXELS,
    direct: bool = False,
) -> tuple[Image.Image, dict]:
    """Restore a photo ×4. Returns the picture and the trace: settings, and for every tile its place
    and the chain's parts.

    Any PIL image or path goes; tiles are 32×32 LR pixels and overlap by 4 or more. Memory is that
    of the result plus a batch of at most `batch` tiles for each worker. `direct`: the policy draws
    the final image at once, without the chain (for one trained so). If memory runs out the batch is
    halved; on Ctrl-C the tiles done so far are kept and the rest is bicubic. Raises ValueError with
    one sentence for unreadable or too large photos.
    """
    image = photos.open_photo(photo) if isinstance(photo, (str, Path)) else photos.to_rgb(photo)
    w, h = image.size
    padded_w, padded_h = max(w, TILE), max(h, TILE)
    origins = [(x, y) for y in tile_origins(padded_h) for x in tile_origins(padded_w)]
    if w * h > max_pixels:
        minutes = len(origins) * SECONDS_A_TILE / 60
        raise ValueError(
            f"a photo of {w}x{h} pixels needs {len(origins)} tiles (about {minutes:.0f} minutes "
            f"on two cores) and is rarely in need of ×4: scale it down, or raise --max-pixels"
        )
    models = models or load_models(device)
    how = how or Sampling()
    lr = F.pad(photos.to_tensor(image)[None], (0, padded_w - w, 0, padded_h - h), mode="replicate")
    total = (
        F.interpolate(lr, scale_factor=SCALE, mode="bicubic", align_corners=False).clamp(0, 1)[0]
        * 1e-6
    )
    weight = torch.full(total.shape[1:], 1e-6)
    window, tiles = _window(), []

    @torch.no_grad()
    def work(first: int, end: int) -> list[tuple[vlcot.Chain, Tensor]]:
        crops = torch.cat([lr[..., y : y + TILE, x : x + TILE] for x, y in origins[first:end]])
        # Each batch has its own seed, so that it does not depend on what came before it.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        try:
            chains = think(models, crops, how, generator, direct)
            codes = torch.stack([c.final_image for c in chains]).to(models.device)
            return list(
                zip(
                    chains,
                    decode_final(models, codes, crops.to(models.device), decoder).cpu(),
                    strict=True,
                )
            )
        except (torch.OutOfMemoryError, MemoryError):
            if end - first == 1:
                raise
        middle = (first + end) // 2
        return work(first, middle) + work(middle, end)

    jobs, workers = even_batches(len(origins), batch), workers_on(models.device)
    workers = min(workers, len(jobs))
    fast_bfloat16(models.device)  # measured once, before the workers share the cores
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers,
        initializer=torch.set_num_threads if workers > 1 else None,
        initargs=(1,) if workers > 1 else (),
    )
    with tqdm(total=len(origins), desc="tiles", disable=not progress) as bar:
        try:
            for (first, end), done in zip(
                jobs, pool.map(work, *zip(*jobs, strict=True)), strict=True
            ):
                for (x, y), (chain, tile) in zip(origins[first:end], done, strict=True):
                    at = (
                        slice(y * SCALE, (y + TILE) * SCALE),
                        slice(x * SCALE, (x + TILE) * SCALE),
                    )
                    total[:, at[0], at[1]] += tile * window
                    weight[at] += window
                    parts = {t: getattr(chain, t) for t in vlcot.TAGS}
                    tiles.append(
                        {
                            "x": x,
                            "y": y,
                            **{
                                k: p.tolist() if isinstance(p, Tensor) else p
                                for k, p in parts.items()
                            },
                        }
                    )
                bar.update(end - first)
        except KeyboardInterrupt:
            bar.write(
                f"stopped after {len(tiles)} of {len(origins)} tiles: the rest of the picture "
                f"is bicubic"
            )
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(
                threads
            )  # the workers' 1 would be what the next new thread of the process begins with
    out = photos.to_image((total / weight)[:, : h * SCALE, : w * SCALE])
    settings = {
        "seed": seed,
        "decoder": decoder,
        "batch": batch,
        "device": str(models.device),
        "lr_size": [w, h],
        "tile": TILE,
        "stride": STRIDE,
        "scale": SCALE,
        **asdict(how),
    }
    return out, {"settings": settings, "complete": len(tiles) == len(origins), "tiles": tiles}


def restore_file(
    photo: str | Path, out: str | Path, trace: str | Path | None = None, **options
) -> dict:
    """`restore` from file to file; both places are checked before the work starts. Returns the
    trace."""
    for path in filter(None, (out, trace)):
        folder = Path(path).parent
        if not folder.is_dir():
            raise ValueError(f"output folder {folder} does not exist: create it first")
        probe = folder / f".{Path(path).name}.write-test"
        try:
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise ValueError(
                f"output folder {folder} cannot be written: choose another place for "
                f"{Path(path).name}"
            ) from e
    if Path(out).suffix.lower() not in Image.registered_extensions():
        raise ValueError(
            f"{Path(out).name} has no picture suffix that Pillow writes: end it in .png, .jpg "
            f"or .webp"
        )
    image, record = restore(photo, **options)
    image.save(out)
    if trace:
        Path(trace).write_text(json.dumps(record))
    return record


class _Callable(types.ModuleType):
    """Lets `from realsr_r1 import restore` be called: Python binds that name to this module,
    whichever comes first."""

    def __call__(self, *args, **options):
        return restore(*args, **options)


sys.modules[__name__].__class__ = _Callable
