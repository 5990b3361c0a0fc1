"""What every module may need: the device, and the table of all seeds."""

import math
import time
from functools import lru_cache

import torch
from torch import Tensor

# Whoever draws photographs has seeds of its own, so that no two of them meet the same crops.
SEEDS_EACH = 10_000
SEEDS = {
    use: i * SEEDS_EACH
    for i, use in enumerate("measure tokenizer policy decoder grpo chain optimizer expert".split())
}


def seed_of(use: str, seed: int = 0) -> int:
    """The seed number `seed` of a use in SEEDS; ValueError if it would be another use's."""
    if not 0 <= seed < SEEDS_EACH:
        raise ValueError(f"seed {seed} is out of range: take one from 0 to {SEEDS_EACH - 1}")
    return SEEDS[use] + seed


def device_of(name: str | None) -> torch.device:
    """`name`, or the best device there is; raises ValueError with one sentence if a device that is
    absent is asked for."""
    best = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return best or torch.device("cpu")
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"no device {name!r}: choose cpu, cuda or mps")
    if kind != "cpu" and (best is None or best.type != kind):
        raise ValueError(
            f"device {name!r} was asked for but torch finds none here: use --device cpu, or "
            f"install a torch built for it"
        )
    return torch.device(name)


@lru_cache(maxsize=4)
def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 pays here: on CUDA, and on CPUs with units for it (measured: a CPU without
    emulates it, up to hundreds of times slower than float32)."""
    if device.type != "cpu":
        return device.type == "cuda"

    def seconds(x: Tensor) -> float:
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            x @ x
            best = min(best, time.perf_counter() - started)
        return best

    x = torch.randn(192, 192)
    return seconds(x.bfloat16()) < seconds(x)
