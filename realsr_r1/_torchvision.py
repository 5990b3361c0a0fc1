"""Let PyPI's torchvision import beside a CPU-only torch.

PyPI builds torchvision against CUDA torch. Next to a CPU-only torch its extension `_C.so` cannot be
loaded, the operator `torchvision::nms` is never registered, and `import torchvision` (hence pyiqa,
and parts of transformers) dies with "operator torchvision::nms does not exist". We need none of its
compiled operators, so when the extension does not load we declare the two schemas that
torchvision's Python code refers to. With a matching torch nothing is done. All this waits until
torchvision is imported: `realsr --help` need not load torch.
"""

import ctypes
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # keeps the declaration alive: it is withdrawn when the object is collected


def ensure() -> bool:
    """Declare torchvision's operators where its extension cannot load; True if that was needed."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return _library is not None
    import torch

    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            ctypes.CDLL(str(extension))
        except OSError:
            _library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                _library.define(name + _SCHEMA)
            return True
    return False


class _Before(MetaPathFinder):
    """Calls `ensure` when torchvision is about to be imported, and finds nothing itself."""

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            ensure()


sys.meta_path.insert(0, _Before())
