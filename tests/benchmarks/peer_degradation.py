"""Real-ESRGAN's own degradation code as a function of HR pictures, to be timed beside ours. Its
code is called, not copied.

    pip install --no-deps --no-build-isolation basicsr==1.4.2 realesrgan==0.3.0
    pip install scipy opencv-python-headless addict future lmdb pyyaml requests yapf tqdm

Three things make it run on a CPU with today's torchvision: an alias for a module that torchvision
has dropped, `.cuda()` as a no-op while it runs, and kernels and JPEG pictures that are contiguous
in memory. Sharpening of the HR picture, which its training does before degrading, is left out: ours
has none.
"""

import contextlib
import math
import random
import sys
import types
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

INSTALL = "not installed: see the head of tests/benchmarks/peer_degradation.py"
KINDS = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
SHARES = [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
OPTIONS = dict(  # options/train_realesrgan_x4plus.yml of Real-ESRGAN
    scale=4,
    gt_usm=True,
    resize_prob=[0.2, 0.7, 0.1],
    resize_range=[0.15, 1.5],
    gaussian_noise_prob=0.5,
    noise_range=[1, 30],
    poisson_scale_range=[0.05, 3],
    gray_noise_prob=0.4,
    jpeg_range=[30, 95],
    second_blur_prob=0.8,
    resize_prob2=[0.3, 0.4, 0.3],
    resize_range2=[0.3, 1.2],
    gaussian_noise_prob2=0.5,
    noise_range2=[1, 25],
    poisson_scale_range2=[0.05, 2.5],
    gray_noise_prob2=0.4,
    jpeg_range2=[30, 95],
)


@contextlib.contextmanager
def cpu_only() -> Iterator[None]:
    """`Tensor.cuda` does nothing inside: the code calls it whatever the device is."""
    before = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **options: self
    try:
        yield
    finally:
        torch.Tensor.cuda = before


def load(seed: int = 0) -> Callable[[Tensor], Tensor] | None:
    """`run(hr)`: HR (b, 3, h, w) in [0, 1] → LR (b, 3, h/4, w/4), one draw of all settings for the
    whole batch but for the kernels, which it draws for each picture. None if the packages are not
    installed. Uses `random`, as its code does."""
    try:
        import torchvision.transforms.functional as tvf

        sys.modules.setdefault(
            "torchvision.transforms.functional_tensor",
            types.SimpleNamespace(rgb_to_grayscale=tvf.rgb_to_grayscale),
        )
        from basicsr.data.degradations import circular_lowpass_kernel, random_mixed_kernels
        from basicsr.utils import DiffJPEG
        from realesrgan.models.realesrgan_model import RealESRGANModel
    except ImportError:
        return None
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  its kernels draw from numpy's global state

    def blur(sigma: list[float]) -> Tensor:
        size = random.choice(range(7, 22, 2))
        kernel = random_mixed_kernels(
            KINDS, SHARES, size, sigma, sigma, [-np.pi, np.pi], [0.5, 4], [1, 2], noise_range=None
        )
        pad = (21 - size) // 2
        return torch.from_numpy(
            np.ascontiguousarray(np.pad(kernel, ((pad, pad), (pad, pad))))
        ).float()

    def sinc() -> Tensor:
        return torch.from_numpy(
            np.ascontiguousarray(
                circular_lowpass_kernel(random.uniform(math.pi / 3, math.pi), 21, pad_to=21)
            )
        ).float()

    jpeg = DiffJPEG(differentiable=False)

    def run(hr: Tensor) -> Tensor:
        model = types.SimpleNamespace(
            opt=OPTIONS | {"gt_size": hr.shape[-1]},
            device=torch.device("cpu"),
            is_train=True,
            jpeger=lambda x, quality: jpeg(x, quality=quality).contiguous(),
            usm_sharpener=lambda x: x,
            queue_size=180,
            _dequeue_and_enqueue=lambda: None,
        )
        kernels = [
            torch.stack([make() for _ in hr])
            for make in (lambda: blur([0.2, 3]), lambda: blur([0.2, 1.5]), sinc)
        ]
        with cpu_only(), torch.no_grad():
            RealESRGANModel.feed_data(
                model,
                dict(zip(("gt", "kernel1", "kernel2", "sinc_kernel"), (hr, *kernels), strict=True)),
            )
        return model.lq

    return run
