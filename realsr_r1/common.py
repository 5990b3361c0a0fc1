"""What every module may need: the device, the table of all seeds, files that appear whole."""

import math
import numbers
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

# torch keeps kernels for up to 1,024 shapes of pictures: hundreds of MB after many photos.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
# Whoever draws photographs has seeds of its own, so that no two of them meet the same crops.
SEEDS_EACH = 10_000
USES = "measure tokenizer policy decoder grpo chain optimizer expert labels ending".split()
SEEDS = {use: i * SEEDS_EACH for i, use in enumerate(USES)}


def seed_of(use: str, seed: int = 0) -> int:
    """The seed number `seed` of a use in SEEDS; ValueError if it would be another use's."""
    if not 0 <= seed < SEEDS_EACH:
        raise ValueError(f"seed {seed} is out of range: take one from 0 to {SEEDS_EACH - 1}")
    return SEEDS[use] + seed


def generator(seed: int, number: int = 0) -> torch.Generator:
    """A generator for item `number` of a run with any integer as its seed."""
    return torch.Generator().manual_seed((int(seed) * 1_000_003 + number) % 2**63)


def check_number(name: str, value: float, least: float, most: float = math.inf) -> None:
    """ValueError unless `value` is a finite number from `least` to `most`, numpy's included; an
    integer where `least` is one."""
    whole = isinstance(least, int)
    right = isinstance(value, numbers.Integral if whole else numbers.Real)
    if right and not isinstance(value, bool) and least <= value <= most and value != math.inf:
        return  # NaN fails the comparisons
    span = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    raise ValueError(f"{name} must be {'an integer' if whole else 'a number'} {span}, got {value}")


def check_images(x: Tensor) -> Tensor:
    """Images (b, 3, h, w) as floats in [0, 1], uint8 divided by 255; else ValueError."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.numel():
        got = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
        kind = "a tensor" if isinstance(x, Tensor) else "a torch tensor (torch.as_tensor)"
        raise ValueError(f"expected {kind} of images (b, 3, h, w), got {got}")
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point() or not bool((x >= 0).all() and (x <= 1).all()):
        raise ValueError(
            f"expected uint8 or floats in [0, 1], got {x.dtype} from {x.min():g} to {x.max():g}: "
            "scale the images first"
        )
    return x.float()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; moved there if all went well, removed if not, so that an
    older file is never half overwritten. ValueError, in one sentence, where that cannot be."""
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as e:
        why = e.strerror or e
        raise ValueError(f"{path} cannot be written ({why}): choose another place") from e
    finally:
        with suppress(OSError):  # not there, or a place where nothing can be
            part.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one go, see `atomic`."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def out_of_memory(e: RuntimeError) -> bool:
    """Whether torch says so: on CPUs (Linux, Windows) it has no kind of its own for it."""
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return any(s in str(e) for s in said)


def device_of(name: str | None) -> torch.device:
    """`name`, or the best device there is; ValueError if it is absent."""
    best = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return best or torch.device("cpu")
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"no device {name!r}: choose cpu, cuda or mps")
    if kind != "cpu" and (best is None or best.type != kind):
        what = f"device {name!r} was asked for but torch finds none here"
        raise ValueError(f"{what}: use --device cpu, or install a torch built for it")
    return torch.device(name)
