"""Training loops of the tokenizer, the LR reader, the guided decoder and their feed-forward
control.

One small loop, `fit`, serves all four: cosine learning rate, averaged weights, a CSV log, and a
checkpoint every two minutes from which a killed run continues at the step it had reached.
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

from realsr_r1 import perceptual
from realsr_r1.common import device_of, fast_bfloat16
from realsr_r1.first import degradation, scenes
from realsr_r1.first.reader import LRReader, ReaderConfig, content_features, signal_features
from realsr_r1.first.tokenizer import NANO, GuidedDecoder, VQModel, guided_decode
from realsr_r1.first.weights import WEIGHTS, load, save

LABEL_CLASSES = {
    n: (degradation.RESIZES if "resize" in n else degradation.LEVELS) for n in degradation.LABELS
}


def fit(
    model: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    out: Path,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint_seconds: float = 120,
    log_every: int = 50,
    after_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """Minimise `loss_of(step)` for `steps` steps; returns the averaged (EMA) model and writes it to
    `out`.

    `out` is a .safetensors path; beside it lie `<out>.csv` (the log) and, until the run ends,
    `<out>.ckpt`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    ckpt, log = out.with_suffix(".ckpt"), out.with_suffix(".csv")
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            min(1, (i + 1) / 100)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, i / steps))))
        ),
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    first = 0
    if ckpt.exists():
        state = torch.load(ckpt, weights_only=True, map_location=next(model.parameters()).device)
        for name, part in (
            ("model", model),
            ("optimizer", optimizer),
            ("schedule", schedule),
            ("average", average),
        ):
            part.load_state_dict(state[name])
        first = state["step"]
        print(f"resumed {out.name} at step {first}", flush=True)
    elif log.exists():
        log.unlink()
    saved, started, sums, n = time.time(), time.time(), {}, 0
    model.train()
    for step in tqdm(
        range(first, steps), initial=first, total=steps, desc=out.stem, mininterval=10
    ):
        loss, parts = loss_of(step)
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss of {out.stem} became {float(loss)} at step {step}: lower --lr; the "
                f"last checkpoint is kept"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if after_step:
            after_step(step)
        for k, v in {"loss": float(loss.detach()), **parts}.items():
            sums[k] = sums.get(k, 0.0) + v
        n += 1
        if n == log_every or step + 1 == steps:
            row = {
                "step": step + 1,
                "seconds": round(time.time() - started, 1),
                **{k: round(v / n, 5) for k, v in sums.items()},
            }
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
    """Random training images from cached pairs and the shipped whole photos; step and seed decide
    what comes."""

    def __init__(
        self,
        data: scenes.Pairs,
        device: torch.device,
        seed: int = 0,
        photo_share: float = 0.25,
        photos: int = 1500,
    ):
        self.data, self.device, self.seed = data, device, seed
        self.photo_share = photo_share
        crops = [scenes.crop(seed * 100_000 + i) for i in range(photos)] if photo_share else []
        self.photos = (torch.stack(crops) * 255).round().byte() if crops else None

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 10_000_019 + step)

    def images(self, step: int, n: int, size: int) -> Tensor:
        """(n, 3, size, size) in [0, 1]: half of the smaller ones are crops, half are whole pictures
        scaled down."""
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
            x = torch.cat(
                [
                    x[: n // 2, :, top : top + size, left : left + size],
                    F.interpolate(x[n // 2 :], size=size, mode="area"),
                ]
            )
        return x.clamp(0, 1)

    def pairs(self, step: int, n: int, mirror: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """HR (n, 3, s, s), LR (n, 3, s/4, s/4) in [0, 1] and the indices of the pairs, mirrored
        half of the time if `mirror`."""
        g = self.generator(step)
        i = torch.randint(0, len(self.data), (n,), generator=g)
        hr, lr = (t[i].to(self.device).float() / 255 for t in (self.data.hr, self.data.lr))
        return (
            (hr.flip(-1), lr.flip(-1), i)
            if mirror and torch.rand((), generator=g) < 0.5
            else (hr, lr, i)
        )


def train_tokenizer(
    data: scenes.Pairs,
    out: Path = WEIGHTS / "tokenizer.safetensors",
    steps: int = 6000,
    lr: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
    config=NANO,
    init: VQModel | None = None,
) -> VQModel:
    """The VQ autoencoder on images of 32, 64 and 128 px: L1 + LPIPS on a moving grid + codebook
    loss.

    With `init` only the decoder goes on learning, from these weights: the codes, and whatever was
    trained on them, stay.
    """
    dev = device_of(device)
    torch.manual_seed(seed)
    model = VQModel(config).to(dev)
    if init is not None:
        model.load_state_dict(init.state_dict())
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False)
    batches = Batches(data, dev, seed)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = batches.generator(step + 10**9)
        u = float(torch.rand((), generator=g))
        n, size = (16, 64) if u < 0.55 else (4, 128) if u < 0.95 else (32, 32)
        x = batches.images(step, n, size)
        if init is None and step % 20 == 19 and step < 0.8 * steps:
            model.quantize.revive(model.latents(x).detach(), generator=g)
        y, _q, _codes, codebook = model(x)
        l1 = (x - y).abs().mean()
        # 32-px pictures are too small for AlexNet's last layers: those batches learn from L1 alone.
        lpips = (
            perceptual.robust_distance(y, x, g).mean() if size > 32 else torch.zeros((), device=dev)
        )
        used = float((model.quantize.usage > 0.05).float().mean())
        return 3 * l1 + lpips + 0.5 * codebook, {
            "l1": float(l1.detach()),
            "lpips": float(lpips.detach()),
            "codebook": float(codebook.detach()),
            "used": used,
        }

    return fit(model, loss_of, steps, Path(out), lr, seed)


def reader_targets(data: scenes.Pairs) -> tuple[dict[str, int], Tensor]:
    """Classes of the reader's heads and the targets (n, heads): the five labels, and what the
    picture shows."""
    m = scenes.metadata()
    entries = [*m["cutouts"].values(), *(p for p in m["photos"].values() if "category" in p)]
    names = {
        **{k: list(v) for k, v in LABEL_CLASSES.items()},
        "category": sorted({e["category"] for e in entries}),
        "kind": sorted({e["kind"] for e in entries}),
        "background": sorted(scenes.PREPOSITIONS),
    }
    shown = [
        [names[k].index(getattr(s, k)) for k in list(names)[len(LABEL_CLASSES) :]]
        for s in data.scenes
    ]
    shown = shown or [[-100] * (len(names) - len(LABEL_CLASSES))] * len(
        data
    )  # crops of photographs: nothing is known
    rows = [
        [names[k].index(la[k]) for k in LABEL_CLASSES] + s
        for la, s in zip(data.labels, shown, strict=True)
    ]
    return {k: len(v) for k, v in names.items()}, torch.tensor(rows)


@torch.no_grad()
def summary_features(lr: Tensor, device: torch.device, batch: int = 128) -> tuple[Tensor, Tensor]:
    """LR photos (n, 3, 32, 32), uint8 → signal features and content features, half precision, on
    the CPU."""
    rows = []
    for at in tqdm(
        range(0, len(lr), batch), desc="features", disable=len(lr) < 1000, mininterval=5
    ):
        x = lr[at : at + batch].to(device).float() / 255
        rows.append((signal_features(x).half().cpu(), content_features(x).half().cpu()))
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


def train_reader(
    data: scenes.Pairs,
    out: Path = WEIGHTS / "reader.safetensors",
    steps: int = 1500,
    lr: float = 2e-3,
    batch: int = 64,
    seed: int = 0,
    device: str | None = None,
    crops: scenes.Pairs | None = None,
    init: LRReader | None = None,
    summary_steps: int | None = None,
) -> LRReader:
    """The LR photo's own reader, in two fits: the pixel codes in `steps` (photos and their
    high-pass residual reconstructed), then the summary codes in `summary_steps`, by default as many
    (heads name degradation and content).

    `crops` are further pairs with labels but no scene. With `init` the pixel codes are taken over
    instead of trained.
    """
    dev, out = device_of(device), Path(out)
    torch.manual_seed(seed)
    model = LRReader(ReaderConfig(heads=reader_targets(data)[0])).to(dev)
    parts = [d for d in (data, crops) if d is not None]
    half_way = out.with_name(f"{out.stem}_pixels.safetensors")
    if init is not None or half_way.exists():
        model.pixels.load_state_dict(
            (init.pixels if init is not None else load(half_way, dev)).state_dict()
        )
    else:
        photos = Batches(data, dev, seed, photo_share=0)

        def highpass(z: Tensor) -> Tensor:
            return z - F.avg_pool2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3, 1)

        def pixel_loss(step: int) -> tuple[Tensor, dict[str, float]]:
            x = photos.pairs(step, batch)[1]
            if step % 20 == 19 and step < 0.8 * steps:
                model.pixels.quantize.revive(
                    model.pixels.latents(x).detach(), generator=torch.Generator().manual_seed(step)
                )
            y, codebook = model.pixels(x)
            l1, detail = (x - y).abs().mean(), (highpass(x) - highpass(y)).abs().mean()
            return 5 * l1 + 5 * detail + 0.25 * codebook, {
                "l1": float(l1.detach()),
                "detail": float(detail.detach()),
            }

        fit(model.pixels, pixel_loss, steps, half_way, lr, seed)

    signal, content = (
        torch.cat(f) for f in zip(*(summary_features(d.lr, dev) for d in parts), strict=True)
    )
    targets, total = torch.cat([reader_targets(d)[1] for d in parts]), summary_steps or steps

    def summary_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        g = torch.Generator().manual_seed(seed * 10_000_019 + step)
        i = torch.randint(0, len(targets), (2 * batch,), generator=g)
        s, c, t = signal[i].to(dev).float(), content[i].to(dev).float(), targets[i].to(dev)
        if step % 20 == 19 and step < 0.8 * total:
            model.summary.quantize.revive(model.summary.latents(s, c).detach(), generator=g)
        logits, codebook = model.summary(s, c)
        loss, right = 0.25 * codebook, {}
        for k, (name, row) in enumerate(logits.items()):
            loss = loss + F.cross_entropy(row, t[:, k], label_smoothing=0.05)
            known = t[:, k] != -100
            right[name] = float((row.argmax(1) == t[:, k])[known].float().mean())
        return loss, right

    done = out.with_name(f"{out.stem}_summary.safetensors")
    fit(model.summary, summary_loss, total, done, lr / 2, seed)
    save(model.eval(), out)
    for part in (half_way, done):
        part.unlink(missing_ok=True)
    return model


def train_guided(
    data: scenes.Pairs,
    tokenizer: VQModel | None = None,
    out: Path | None = None,
    steps: int = 2500,
    lr: float = 1e-3,
    batch: int = 8,
    seed: int = 0,
    device: str | None = None,
    use_codes: bool = True,
    said: Tensor | None = None,
    init: GuidedDecoder | None = None,
    crops: scenes.Pairs | None = None,
) -> GuidedDecoder:
    """The guided decoder on true codes, of which 0–40% are replaced at random (a policy errs); L1 +
    LPIPS.

    `said` (n, h, w): the codes that a policy draws for the first n pairs (`sft.drawn_codes`); then
    half of each batch has these, so that the decoder learns what the policy's errors look like.
    `crops`: further pairs that take the other half, with 0–80% of their codes replaced: where the
    LR photo is good, the decoder learns to believe it. `init`: weights to go on from.
    `use_codes=False` trains the control: feed-forward regression from the LR photo, same budget and
    loss.
    """
    dev = device_of(device)
    tokenizer = (
        (tokenizer or load(WEIGHTS / "tokenizer.safetensors")).to(dev).eval().requires_grad_(False)
    )
    out = Path(out or WEIGHTS / ("guided.safetensors" if use_codes else "regression.safetensors"))
    torch.manual_seed(seed)
    model = GuidedDecoder(tokenizer.config.code_dim, use_codes=use_codes).to(dev)
    if init is not None:
        model.load_state_dict(init.state_dict())
    if said is not None:
        n = len(said)
        data = scenes.Pairs(data.hr[:n], data.lr[:n], data.labels[:n], data.scenes[:n])
    batches = Batches(data, dev, seed, photo_share=0)
    others = Batches(crops, dev, seed, photo_share=0) if crops is not None else None

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = batches.generator(step + 10**9)
        hr, lr_image, i = batches.pairs(step, batch, mirror=said is None)
        seen, wrong = (), torch.full((batch,), 0.4)
        if others is not None:
            more = others.pairs(step, batch - batch // 2)
            hr, lr_image = (
                torch.cat([hr[: batch // 2], more[0]]),
                torch.cat([lr_image[: batch // 2], more[1]]),
            )
            wrong[batch // 2 :] = 0.8
        if use_codes:
            codes = corrupt(
                tokenizer.encode(hr),
                wrong * torch.rand((batch,), generator=g),
                tokenizer.config.codes,
                g,
            )
            if said is not None:
                codes[: batch // 2] = said[i[: batch // 2]].to(dev)
            with torch.no_grad():
                seen = (tokenizer.decode(codes), tokenizer.quantize.embed(codes))
        with torch.autocast(dev.type, torch.bfloat16, enabled=fast_bfloat16(dev)):
            y = model(lr_image, *seen).float()
            lpips = perceptual.robust_distance(y, hr, g).float().mean()
        l1 = (hr - y).abs().mean()
        return 3 * l1 + lpips, {"l1": float(l1.detach()), "lpips": float(lpips.detach())}

    return fit(model, loss_of, steps, out, lr, seed)


def corrupt(codes: Tensor, share: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Replace a share (b,) of each image's codes (b, h, w) by random ones."""
    wrong = torch.rand(codes.shape, generator=generator) < share.view(-1, 1, 1)
    return torch.where(
        wrong.to(codes.device),
        torch.randint(0, vocabulary, codes.shape, generator=generator).to(codes.device),
        codes,
    )


@torch.no_grad()
def measure_tokenizer(
    tokenizer: VQModel,
    guided: GuidedDecoder | None,
    data: scenes.Pairs,
    batch: int = 16,
    seed: int = 0,
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Per-image PSNR (RGB, dB), LPIPS-alex and, where its weights are at hand, LPIPS-vgg on
    held-out pairs, for the plain decode, the guided decode and its controls, and whole photographs;
    and the share of codes in use."""
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
            wrong = {
                "true codes": codes,
                "30% wrong codes": corrupt(codes, 0.3 * n, tokenizer.config.codes, g),
            }
            wrong |= {
                "all codes wrong": corrupt(codes, n, tokenizer.config.codes, g),
                "the LR's own codes": tokenizer.encode(up),
            }
            for name, c in wrong.items():
                add(f"guided decode, {name}", guided_decode(guided, tokenizer, c, lr), hr)
    return scores, len(seen) / tokenizer.config.codes
