"""Training loops of the tokenizer, the LR reader, the guided decoder and their feed-forward control.

One small loop, `fit`, serves all four: cosine learning rate, averaged weights, a CSV log, and a checkpoint every two
minutes from which a killed run continues at the step it had reached.
"""

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from realsr_r1 import degradation, perceptual, scenes
from realsr_r1.reader import LabelBody, LRReader, ReaderConfig
from realsr_r1.tokenizer import NANO, GuidedDecoder, VQModel, guided_decode
from realsr_r1.weights import WEIGHTS, load, save

LABEL_CLASSES = {n: (degradation.RESIZES if "resize" in n else degradation.LEVELS) for n in degradation.LABELS}


def device_of(name: str | None) -> torch.device:
    """`name`, or the best device there is; raises ValueError with one sentence if a device that is absent is asked for."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"no device {name!r}: choose cpu, cuda or mps")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device {name!r} was asked for but torch finds none here: use --device cpu, or install a torch built for it")
    return torch.device(name)


def fit(model: nn.Module, loss_of: Callable[[int], tuple[Tensor, dict[str, float]]], steps: int, out: Path, lr: float = 1e-3,
        seed: int = 0, checkpoint_seconds: float = 120, log_every: int = 50, after_step: Callable[[int], None] | None = None) -> nn.Module:  # fmt: skip
    """Minimise `loss_of(step)` for `steps` steps; returns the averaged (EMA) model and writes it to `out`.

    `out` is a .safetensors path; beside it lie `<out>.csv` (the log) and, until the run ends, `<out>.ckpt`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    ckpt, log = out.with_suffix(".ckpt"), out.with_suffix(".csv")
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, i / steps))))
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    first = 0
    if ckpt.exists():
        state = torch.load(ckpt, weights_only=True, map_location=next(model.parameters()).device)
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule), ("average", average)):
            part.load_state_dict(state[name])
        first = state["step"]
        print(f"resumed {out.name} at step {first}", flush=True)
    elif log.exists():
        log.unlink()
    saved, started, sums, n = time.time(), time.time(), {}, 0
    model.train()
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=out.stem, mininterval=10):
        loss, parts = loss_of(step)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of {out.stem} became {float(loss)} at step {step}: lower --lr; the last checkpoint is kept")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if after_step:
            after_step(step)
        for k, v in {"loss": float(loss.detach()), **parts}.items():
            sums[k] = sums.get(k, 0.0) + v
        n += 1
        if n == log_every or step + 1 == steps:
            row = {"step": step + 1, "seconds": round(time.time() - started, 1), **{k: round(v / n, 5) for k, v in sums.items()}}
            new = not log.exists()
            with log.open("a", newline="") as f:
                w = csv.DictWriter(f, list(row))
                if new:
                    w.writeheader()
                w.writerow(row)
            sums, n = {}, 0
        if time.time() - saved > checkpoint_seconds:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "average": average.state_dict(),
                    "step": step + 1,
                },
                ckpt.with_suffix(".part"),
            )
            ckpt.with_suffix(".part").replace(ckpt)
            saved = time.time()
    model.load_state_dict(average.module.state_dict())
    save(model.eval(), out)
    ckpt.unlink(missing_ok=True)
    return model


class Batches:
    """Random training images from cached pairs and the shipped whole photos; step and seed decide what comes."""

    def __init__(self, data: scenes.Pairs, device: torch.device, seed: int = 0, photo_share: float = 0.25, photos: int = 1500):
        self.data, self.device, self.seed = data, device, seed
        self.photo_share = photo_share
        crops = [scenes.crop(seed * 100_000 + i) for i in range(photos)] if photo_share else []
        self.photos = (torch.stack(crops) * 255).round().byte() if crops else None

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 10_000_019 + step)

    def images(self, step: int, n: int, size: int) -> Tensor:
        """(n, 3, size, size) in [0, 1]: half of the smaller ones are crops, half are whole pictures scaled down."""
        g = self.generator(step)
        own = int(n * self.photo_share)
        x = self.data.hr[torch.randint(0, len(self.data), (n - own,), generator=g)]
        if own:
            x = torch.cat([x, self.photos[torch.randint(0, len(self.photos), (own,), generator=g)]])
        x = x.to(self.device).float() / 255
        x = x[torch.randperm(n, generator=g)]
        x = x * (0.85 + 0.3 * torch.rand((n, 1, 1, 1), generator=g)).to(x.device)  # brightness
        if size < x.shape[-1]:
            top, left = torch.randint(0, x.shape[-1] - size + 1, (2,), generator=g).tolist()
            x = torch.cat([x[: n // 2, :, top : top + size, left : left + size], F.interpolate(x[n // 2 :], size=size, mode="area")])
        return x.clamp(0, 1)

    def pairs(self, step: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """HR (n, 3, s, s), LR (n, 3, s/4, s/4) in [0, 1] and the indices of the pairs, mirrored half of the time."""
        g = self.generator(step)
        i = torch.randint(0, len(self.data), (n,), generator=g)
        hr, lr = (t[i].to(self.device).float() / 255 for t in (self.data.hr, self.data.lr))
        return (hr.flip(-1), lr.flip(-1), i) if torch.rand((), generator=g) < 0.5 else (hr, lr, i)


def train_tokenizer(data: scenes.Pairs, out: Path = WEIGHTS / "tokenizer.safetensors", steps: int = 6000, lr: float = 1e-3,
                    seed: int = 0, device: str | None = None, config=NANO) -> VQModel:  # fmt: skip
    """The VQ autoencoder on images of 32, 64 and 128 px: L1 + LPIPS on a moving grid + codebook loss."""
    dev = device_of(device)
    torch.manual_seed(seed)
    model = VQModel(config).to(dev)
    batches = Batches(data, dev, seed)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = batches.generator(step + 10**9)
        u = float(torch.rand((), generator=g))
        n, size = (16, 64) if u < 0.55 else (4, 128) if u < 0.95 else (32, 32)
        x = batches.images(step, n, size)
        if step % 20 == 19 and step < 0.8 * steps:
            model.quantize.revive(model.latents(x).detach(), generator=g)
        y, _q, _codes, codebook = model(x)
        l1 = (x - y).abs().mean()
        # 32-px pictures are too small for AlexNet's last layers: those batches learn from L1 alone.
        lpips = perceptual.robust_distance(y, x, g).mean() if size > 32 else torch.zeros((), device=dev)
        used = float((model.quantize.usage > 0.05).float().mean())
        return 3 * l1 + lpips + 0.5 * codebook, {
            "l1": float(l1.detach()),
            "lpips": float(lpips.detach()),
            "codebook": float(codebook.detach()),
            "used": used,
        }

    return fit(model, loss_of, steps, Path(out), lr, seed)


def reader_targets(data: scenes.Pairs) -> tuple[dict[str, int], Tensor]:
    """Classes of the reader's heads and the targets (n, heads): the five labels, and what the picture shows."""
    m = scenes.metadata()
    entries = [*m["cutouts"].values(), *(p for p in m["photos"].values() if "category" in p)]
    names = {
        **{k: list(v) for k, v in LABEL_CLASSES.items()},
        "category": sorted({e["category"] for e in entries}),
        "kind": sorted({e["kind"] for e in entries}),
        "background": sorted(scenes.PREPOSITIONS),
    }
    shown = [[names[k].index(getattr(s, k)) for k in list(names)[len(LABEL_CLASSES) :]] for s in data.scenes]
    shown = shown or [[-100] * (len(names) - len(LABEL_CLASSES))] * len(data)  # crops of photographs: nothing is known
    rows = [[names[k].index(la[k]) for k in LABEL_CLASSES] + s for la, s in zip(data.labels, shown, strict=True)]
    return {k: len(v) for k, v in names.items()}, torch.tensor(rows)


class Mixed:
    """Labelled batches for networks that name things: half scenes, half crops of photographs (if given), mirrored and
    in slightly other colours at random, so that they are not learnt by heart."""

    def __init__(self, data: scenes.Pairs, crops: scenes.Pairs | None, device: torch.device, seed: int):
        self.parts = [(Batches(d, device, seed, photo_share=0), reader_targets(d)[1].to(device)) for d in (data, crops) if d is not None]

    def __call__(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        """LR photos (n, 3, h, w) in [0, 1] and their targets (n, heads), -100 where nothing is known."""
        found = [(batches.pairs(step, n // len(self.parts)), targets) for batches, targets in self.parts]
        x = torch.cat([lr for (_, lr, _), _ in found])
        tint = 1 + 0.3 * (torch.rand((len(x), 3, 1, 1), generator=self.parts[0][0].generator(step + 10**9)) - 0.5)
        return (x * tint.to(x.device)).clamp(0, 1), torch.cat([t[i.to(t.device)] for (_, _, i), t in found])


def train_reader(data: scenes.Pairs, out: Path = WEIGHTS / "reader.safetensors", steps: int = 1500, lr: float = 2e-3, batch: int = 64,
                 seed: int = 0, device: str | None = None, crops: scenes.Pairs | None = None) -> LRReader:  # fmt: skip
    """The LR photo's own reader: pixels and their high-pass residual reconstructed from the pixel codes, and heads that
    name the degradation and the content from the summary codes alone."""
    dev = device_of(device)
    torch.manual_seed(seed)
    model = LRReader(ReaderConfig(heads=reader_targets(data)[0])).to(dev)
    batches = Mixed(data, crops, dev, seed)

    def highpass(z: Tensor) -> Tensor:
        return z - F.avg_pool2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3, 1)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x, t = batches(step, batch)
        if step % 20 == 19 and step < 0.8 * steps:
            for book, z in zip((model.quantize, model.quantize_summary), model.latents(x), strict=True):
                book.revive(z.detach(), generator=torch.Generator().manual_seed(step))
        y, logits, codebook = model(x)
        pixels, detail = (x - y).abs().mean(), (highpass(x) - highpass(y)).abs().mean()
        loss, parts = 5 * pixels + 5 * detail + 0.25 * codebook, {"l1": float(pixels.detach())}
        for k, (name, out_k) in enumerate(logits.items()):
            loss = loss + 0.5 * F.cross_entropy(out_k, t[:, k], label_smoothing=0.05)
            known = t[:, k] != -100
            parts[name] = float((out_k.argmax(1) == t[:, k])[known].float().mean())
        return loss, parts

    return fit(model, loss_of, steps, Path(out), lr, seed)


def train_guided(data: scenes.Pairs, tokenizer: VQModel | None = None, out: Path | None = None, steps: int = 2500, lr: float = 1e-3,
                 batch: int = 8, seed: int = 0, device: str | None = None, use_codes: bool = True) -> GuidedDecoder:  # fmt: skip
    """The guided decoder on true codes, of which 0–40% are replaced at random (a policy errs); L1 + LPIPS.

    `use_codes=False` trains the control: feed-forward regression from the LR photo, same budget and loss.
    """
    dev = device_of(device)
    tokenizer = (tokenizer or load(WEIGHTS / "tokenizer.safetensors")).to(dev).eval().requires_grad_(False)
    out = Path(out or WEIGHTS / ("guided.safetensors" if use_codes else "regression.safetensors"))
    torch.manual_seed(seed)
    model = GuidedDecoder(tokenizer.config.code_dim, use_codes=use_codes).to(dev)
    batches = Batches(data, dev, seed, photo_share=0)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = batches.generator(step + 10**9)
        hr, lr_image, _ = batches.pairs(step, batch)
        if use_codes:
            codes = corrupt(tokenizer.encode(hr), 0.4 * torch.rand((batch,), generator=g), tokenizer.config.codes, g)
            with torch.no_grad():
                plain, embedded = tokenizer.decode(codes), tokenizer.quantize.embed(codes)
            y = model(lr_image, plain, embedded)
        else:
            y = model(lr_image)
        l1, lpips = (hr - y).abs().mean(), perceptual.robust_distance(y, hr, g).mean()
        return 3 * l1 + lpips, {"l1": float(l1.detach()), "lpips": float(lpips.detach())}

    return fit(model, loss_of, steps, out, lr, seed)


def corrupt(codes: Tensor, share: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Replace a share (b,) of each image's codes (b, h, w) by random ones."""
    wrong = torch.rand(codes.shape, generator=generator) < share.view(-1, 1, 1)
    return torch.where(wrong.to(codes.device), torch.randint(0, vocabulary, codes.shape, generator=generator).to(codes.device), codes)


@torch.no_grad()
def measure_tokenizer(
    tokenizer: VQModel, guided: GuidedDecoder | None, data: scenes.Pairs, batch: int = 16, seed: int = 0
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Per-image PSNR (RGB, dB), LPIPS-alex and, where its weights are at hand, LPIPS-vgg on held-out pairs, for the plain
    decode, the guided decode and its controls, and whole photographs; and the share of codes in use."""
    g = torch.Generator().manual_seed(seed)
    scores: dict[str, dict[str, list[float]]] = {}
    seen = set()

    def add(name: str, y: Tensor, x: Tensor) -> None:
        metrics = {"PSNR": perceptual.psnr(y, x), "LPIPS-alex": perceptual.distance(y, x)}
        if perceptual.lpips_vgg() is not None and name.startswith("plain"):
            metrics["LPIPS-vgg"] = perceptual.lpips_vgg()(y, x, normalize=True).flatten()
        for metric, v in metrics.items():
            scores.setdefault(name, {}).setdefault(metric, []).extend(v.tolist())

    for at in range(0, len(data), batch):
        hr, lr = data.hr[at : at + batch].float() / 255, data.lr[at : at + batch].float() / 255
        codes = tokenizer.encode(hr)
        photos = torch.stack([scenes.crop(i, "test") for i in range(at, at + len(hr))])
        photo_codes = tokenizer.encode(photos)
        seen |= set(codes.flatten().tolist()) | set(photo_codes.flatten().tolist())
        up = F.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
        add("bicubic of the LR", up, hr)
        add("plain decode, scenes", tokenizer.decode(codes), hr)
        add("plain decode, photographs", tokenizer.decode(photo_codes), photos)
        if guided is not None:
            n = torch.ones(len(hr))
            wrong = {"true codes": codes, "30% wrong codes": corrupt(codes, 0.3 * n, tokenizer.config.codes, g)}
            wrong |= {"all codes wrong": corrupt(codes, n, tokenizer.config.codes, g), "the LR's own codes": tokenizer.encode(up)}
            for name, c in wrong.items():
                add(f"guided decode, {name}", guided_decode(guided, tokenizer, c, lr), hr)
    return scores, len(seen) / tokenizer.config.codes


class LabelNet(nn.Module):
    """A small CNN that names degradation and content: the yardstick on LR pixels (b, 3, 32, 32), and, given a reader,
    the probe of what its codes carry (both codebooks' embeddings instead of the pixels)."""

    def __init__(self, classes: dict[str, int], reader: LRReader | None = None, width: int = 48):
        super().__init__()
        self.reader = [reader] if reader is not None else []  # in a list: not a part that trains
        d = reader.config.code_dim if reader else 3
        self.body = LabelBody(d, width, stride=1 if reader else 2)
        extra = reader.config.summary * d if reader else 0
        self.heads = nn.ModuleDict({k: nn.Linear(4 * width + extra, n) for k, n in classes.items()})

    def forward(self, lr: Tensor) -> dict[str, Tensor]:
        """LR photos (b, 3, 32, 32) in [0, 1] → logits of each label."""
        if self.reader:
            with torch.no_grad():
                e = self.reader[0].vectors[self.reader[0].encode(lr)].permute(0, 3, 1, 2)
            h = torch.cat([self.body(e[:, :, :-1]), e[:, :, -1].flatten(1)], 1)
        else:
            h = self.body(lr - 0.5)
        return {k: head(h) for k, head in self.heads.items()}


def train_labelnet(
    data: scenes.Pairs,
    reader: LRReader | None = None,
    crops: scenes.Pairs | None = None,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    device: str | None = None,
) -> LabelNet:
    """Train a LabelNet on LR pixels, or, given a reader, on its codes (same net, same budget)."""
    dev = device_of(device)
    torch.manual_seed(seed)
    net = LabelNet(reader_targets(data)[0], reader).to(dev).train()
    batches = Mixed(data, crops, dev, seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in tqdm(range(steps), desc="probe on codes" if reader else "CNN on pixels", mininterval=10):
        x, t = batches(step, batch)
        loss = sum(F.cross_entropy(logits, t[:, k], label_smoothing=0.05) for k, logits in enumerate(net(x).values()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def label_accuracy(net: LabelNet, data: scenes.Pairs, batch: int = 100) -> dict[str, Tensor]:
    """Right (1) or wrong (0) for each pair and label, (n,) each."""
    _, targets = reader_targets(data)
    device = next(net.parameters()).device
    right: dict[str, list[Tensor]] = {}
    for at in range(0, len(data), batch):
        out = net(data.lr[at : at + batch].to(device).float() / 255)
        for k, (name, logits) in enumerate(out.items()):
            right.setdefault(name, []).append((logits.argmax(1).cpu() == targets[at : at + batch, k]).float())
    return {k: torch.cat(v) for k, v in right.items()}
