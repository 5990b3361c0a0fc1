"""`make bench`: one table of speeds, all measured in this run on this machine. Not a test: nothing is asserted.

The degradation is compared with Real-ESRGAN's own code if it is installed beside ours:
    pip install --no-deps --no-build-isolation basicsr==1.4.2 realesrgan==0.3.0 && pip install scipy opencv-python-headless addict future lmdb pyyaml requests yapf
"""

import csv
import math
import resource
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from realsr_r1 import degradation, experts, grpo, photos, policy, restore, scenes
from realsr_r1.policy import Sampling
from realsr_r1.weights import WEIGHTS

ROWS: list[tuple[str, str]] = []


def seconds(fn, repeats: int = 3) -> float:
    """Median of `repeats` runs after one to warm up."""
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def row(what: str, result: str) -> None:
    ROWS.append((what, result))
    print(f"| {what} | {result} |", flush=True)


def peer_degradation():
    """Real-ESRGAN's `RealESRGANModel.feed_data` on the CPU with its own options; None if it is not installed."""
    try:
        import torchvision.transforms.functional as tvf

        sys.modules.setdefault("torchvision.transforms.functional_tensor", types.SimpleNamespace(rgb_to_grayscale=tvf.rgb_to_grayscale))
        from realesrgan.models.realesrgan_model import RealESRGANModel
    except ImportError:
        return None
    import random

    import numpy as np
    from basicsr.data.degradations import circular_lowpass_kernel, random_mixed_kernels
    from basicsr.utils import DiffJPEG, USMSharp

    options = dict(
        scale=4, resize_prob=[0.2, 0.7, 0.1], resize_range=[0.15, 1.5], gaussian_noise_prob=0.5, noise_range=[1, 30], poisson_scale_range=[0.05, 3],
        gray_noise_prob=0.4, jpeg_range=[30, 95], second_blur_prob=0.8, resize_prob2=[0.3, 0.4, 0.3], resize_range2=[0.3, 1.2], gaussian_noise_prob2=0.5,
        noise_range2=[1, 25], poisson_scale_range2=[0.05, 2.5], gray_noise_prob2=0.4, jpeg_range2=[30, 95], gt_size=64, gt_usm=True, l1_gt_usm=True,
    )  # fmt: skip
    torch.Tensor.cuda = lambda self, *a, **k: self
    self = types.SimpleNamespace(
        opt=options, device=torch.device("cpu"), is_train=True, jpeger=DiffJPEG(differentiable=False), usm_sharpener=USMSharp(), queue_size=180,
        _dequeue_and_enqueue=lambda: None,
    )  # fmt: skip
    names = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
    probs = [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]

    def kernel(sigma):
        size = random.choice(range(7, 22, 2))
        k = random_mixed_kernels(names, probs, size, sigma, sigma, [-np.pi, np.pi], [0.5, 4], [1, 2], noise_range=None)
        pad = (21 - size) // 2
        return torch.from_numpy(np.ascontiguousarray(np.pad(k, ((pad, pad), (pad, pad))))).float()

    def run(hr):
        for x in hr:
            sinc = torch.from_numpy(np.ascontiguousarray(circular_lowpass_kernel(random.uniform(1.05, math.pi), 21, pad_to=21))).float()
            RealESRGANModel.feed_data(
                self, {"gt": x[None], "kernel1": kernel([0.2, 3])[None], "kernel2": kernel([0.2, 1.5])[None], "sinc_kernel": sinc[None]}
            )

    return run


def rollouts(m: restore.Models, prompts: torch.Tensor) -> None:
    """Whole chains: one at a time, sixteen together, and groups that share their prompt or read it anew."""
    how = Sampling.rollout()

    def chains(rows: torch.Tensor, copies: int = 1) -> float:
        start = time.perf_counter()
        policy.sample(m.policy, rows, how, torch.Generator().manual_seed(0), copies=copies)
        return time.perf_counter() - start

    chains(prompts[:1])
    one, sixteen = chains(prompts[:1]), chains(prompts[:16]) / 16
    row("a sampled chain, one at a time", f"{one:.1f} s")
    row("a sampled chain, sixteen together", f"{sixteen:.2f} s: {one / sixteen:.1f}× faster")
    shared, anew = chains(prompts[:2], 8), chains(prompts[:2].repeat_interleave(8, 0))
    row("two groups of 8", f"{shared:.1f} s sharing the prompt, {anew:.1f} s reading it for each chain: {anew / shared:.2f}×")


def grpo_step(m: restore.Models) -> None:
    """One GRPO step broken down, and peak memory (of the whole process so far) as the group grows."""
    expert = experts.load_expert()
    for group in (4, 8, 16):
        settings = grpo.GrpoSettings(steps=2, prompts=2, group=group, micro_batch=min(8, 2 * group), save_steps=100)
        functions, _ = grpo.named_rewards(grpo.PAPER_REWARDS, m.tokenizer, expert)
        dataset = grpo.prompts(range(600_000, 600_004), m.reader, m.policy.vocabulary)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "p"
            trainer = grpo.make_trainer(WEIGHTS / "policy-sft", dataset, functions, out, settings, device="cpu")
            trainer.train()
            with out.with_suffix(".csv").open() as f:
                last = [r for r in csv.DictReader(f) if r.get("reward")][-1]
        total, sampling, scoring = (float(last[f"seconds/{k}"]) for k in ("step", "sampling", "rewards"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        shares = f"sampling {sampling / total:.0%}, rewards {scoring / total:.0%}, forward, backward and the rest {1 - (sampling + scoring) / total:.0%}"
        row(f"GRPO step, 2 groups of {group}", f"{total:.0f} s ({shares}), peak memory so far {peak:.1f} GiB")


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n| what | result |\n|---|---|")
    n = 8
    for size in (128, 400):
        hr = F.interpolate(torch.rand(n, 3, size // 8, size // 8), size=size, mode="bicubic").clamp(0, 1)
        ours = seconds(lambda hr=hr: degradation.degrade(hr, "paper", torch.Generator().manual_seed(0))) / n
        row(f"degradation, paper preset, {size} px", f"{ours * 1e3:.1f} ms an image")
        peer = peer_degradation()
        if peer is None:
            row("  Real-ESRGAN's own code", "not installed: see the head of tests/benchmarks/bench.py")
        else:
            theirs = seconds(lambda hr=hr, peer=peer: peer(hr), 1) / n
            row(f"  Real-ESRGAN's own code, {size} px", f"{theirs * 1e3:.0f} ms an image: {theirs / ours:.0f}× slower")
    start = [10_000]

    def fresh():
        start[0] += 50
        scenes.stack(range(start[0], start[0] + 50))

    row("scenes", f"{50 / seconds(fresh):.0f} a second")
    m = restore.load_models("cpu")
    data = scenes.pairs(range(1_000_000, 1_000_064), "val")
    hr, lr = data.hr.float() / 255, data.lr.float() / 255
    with torch.no_grad():
        row("tokenizer, encode 128 px", f"{64 / seconds(lambda: m.tokenizer.encode(hr)):.0f} images a second")
        codes = m.tokenizer.encode(hr)
        row("tokenizer, decode 128 px", f"{64 / seconds(lambda: m.tokenizer.decode(codes)):.0f} images a second")
    prompts = m.policy.vocabulary.prompts(m.reader.encode(lr))
    for batch in (1, 16, 64):
        speed = {}
        for grammar in (True, False):
            counted = []

            def run(batch=batch, grammar=grammar, counted=counted):
                ids = policy.sample(
                    m.policy,
                    prompts[:batch],
                    Sampling(entropy_top_k=False),
                    torch.Generator().manual_seed(0),
                    use_grammar=grammar,
                    max_new=200,
                ).ids
                counted.append(ids.numel())

            speed[grammar] = seconds(run, 3) / counted[-1]
        row(
            f"generated tokens, batch {batch}",
            f"{1 / speed[True]:.0f} a second with the grammar, {1 / speed[False]:.0f} without: overhead {speed[True] / speed[False] - 1:+.0%}",
        )
    rollouts(m, prompts)
    grpo_step(m)
    for side in (64, 128, 256):
        photo = photos.to_image(F.interpolate(hr[:1], size=side, mode="bicubic")[0])
        start_time = time.perf_counter()
        restore.restore(photo, m, progress=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row(
            f"restore {side}×{side} → {4 * side}×{4 * side}", f"{time.perf_counter() - start_time:.1f} s, peak memory so far {peak:.1f} GiB"
        )


if __name__ == "__main__":
    main()
