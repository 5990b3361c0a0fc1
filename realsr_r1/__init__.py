"""RealSR-R1, the course: VLCoT and GRPO for real-world super-resolution, small enough to read.

    from realsr_r1 import RealSR
    result = RealSR.from_pretrained("nano")("photo.jpg", seed=0)

The core is read in this order: degradation, photographs, perceptual, tokenizer, eye, vlcot,
grammar, policy, decoding, sampling, sft, rewards, objective, grpo, pipeline. The subpackages are
the apparatus around it.
"""

import importlib
import logging
import os

# Before torch loads: waiting threads spin for a moment, then sleep. Two that spin on slow each
# other down a hundredfold; to sleep at once costs a fifth of a small photo's time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from realsr_r1 import _torchvision  # noqa: F401  must run before anything imports torchvision
from realsr_r1.version import __version__

# Comes with pyiqa, is not used on a CPU, and says so at every import.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_FACE = {name: "pipeline" for name in ("RealSR", "Restoration")}
_FACE |= {"Chain": "vlcot", "Sampling": "sampling"}
__all__ = ["Chain", "RealSR", "Restoration", "Sampling", "__version__"]


def __getattr__(name: str):
    """Load torch and the networks when they are first asked for."""
    if name not in _FACE:
        raise AttributeError(f"module 'realsr_r1' has no attribute {name!r}")
    return getattr(importlib.import_module(f"realsr_r1.{_FACE[name]}"), name)
