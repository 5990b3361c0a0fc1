"""What every module may need: the device."""

import math
import time
from functools import lru_cache

import torch
from torch import Tensor


def device_of(name: str | None) -> torch.device:
    """`name`, or the best device there is; raises ValueError with one sentence if a device that is
    absent is asked for."""
    if name is None:
        return torch.device(
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"no device {name!r}: choose cpu, cuda or mps")
    if (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    ):
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
