"""Recipes of three trainings: the tokenizer, the policy, and the decoder on drawn codes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from realsr_r1 import perceptual, sft
from realsr_r1.photographs import SIDE, Pairs
from realsr_r1.policy import ChainPolicy
from realsr_r1.pretraining import losses
from realsr_r1.pretraining.loop import Fit, FitConfig
from realsr_r1.pretraining.muon import MuonAdamW
from realsr_r1.pretraining.redraw import blank_codes, redraw
from realsr_r1.sampling import Sampling, sample
from realsr_r1.tokenizer import VQModel
from realsr_r1.vlcot import PAD


@dataclass(frozen=True)
class Machine:
    """Where and how wide a training runs."""

    device: str = "cpu"
    batch: int = 8
    workers: int = 0
    draws: int = 48  # chains that are drawn at a time


@dataclass(frozen=True)
class Run:
    """One training: where its log and checkpoints go, on what, how long, and what it shows."""

    out: Path
    machine: Machine
    fit: FitConfig
    preview: Callable[[nn.Module], dict] | None = None

    def of(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Fit:
        return Fit(model, optimizer, self.out, self.fit)


def autocast(device: str | torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def forever(
    data: Dataset, machine: Machine, start: Callable[[], float], collate: Callable
) -> Iterator[dict]:
    """Endless batches on the device, pictures as floats in [0, 1], from the item that `start` says
    when the first is wanted: a training that is resumed goes on with new items."""
    loader = DataLoader(
        data,
        machine.batch,
        sampler=itertools.count(int(start())),
        num_workers=machine.workers,
        collate_fn=collate,
        drop_last=True,
        pin_memory=machine.device != "cpu",
        persistent_workers=machine.workers > 0,
        prefetch_factor=6 if machine.workers else None,
    )
    for batch in loader:
        out = {k: v.to(machine.device, non_blocking=True) for k, v in batch.items()}
        yield out | {k: out[k].float() / 255 for k in ("hr", "lr")}


class Discriminator(nn.Sequential):
    """Patch discriminator with spectral norm: image (b, 3, h, w) in [0, 1] → scores."""

    def __init__(self, width: int = 48):
        norm = nn.utils.parametrizations.spectral_norm
        parts, last = [], 3
        for i, (stride, k) in enumerate(((2, 4), (2, 4), (1, 3))):
            parts += [norm(nn.Conv2d(last, width << i, k, stride, 1)), nn.LeakyReLU(0.2)]
            last = width << i
        super().__init__(*parts, nn.Conv2d(last, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 - 1)


@dataclass(frozen=True)
class TokenizerLoss:
    """Weights of the tokenizer's loss and shares of its inputs (see `TokenizerTraining`)."""

    l1: float = 2.0
    lpips: float = 1.0
    vgg: float = 0.5
    codebook: float = 0.5
    adversary: float = 0.04
    adversary_from: float = 0.5  # share of the run
    codes_alone: float = 0.3  # share of the run before the LR photo comes in
    see_lr: float = 0.6
    see_codes: float = 0.8  # of those that see the LR photo
    reuse: int = 4  # how often the decoder sees a drawn chain
    vgg_file: str = ""


def _inputs(b: int, config: TokenizerLoss, done: float, device: str) -> tuple[Tensor, Tensor]:
    """Which samples see their codes, and which the LR photo: (b,) bool each."""
    lr = torch.rand(b, device=device) < (config.see_lr if done >= config.codes_alone else 0.0)
    return ~lr | (torch.rand(b, device=device) < config.see_codes), lr


def spoil_codes(q: Tensor, model: VQModel, codes: Tensor, chosen: Tensor) -> Tensor:
    """In half of the `chosen` samples, up to half of the code vectors replaced by others of the
    batch: a policy's codes are never all right."""
    half = torch.rand(len(q), 1, 1, device=q.device) < 0.5
    share = torch.rand(len(q), 1, 1, device=q.device) * 0.5 * half * chosen[:, None, None]
    wrong = torch.rand(codes.shape, device=q.device) < share
    other = codes.flatten()[torch.randint(codes.numel(), codes.shape, device=q.device)]
    return torch.where(wrong[:, None], model.codebook.embed(other).detach(), q)


class TokenizerTraining:
    """Loss of the tokenizer and its discriminator."""

    def __init__(
        self, model: VQModel, data: Iterator[dict], machine: Machine, config: TokenizerLoss
    ):
        self.model, self.data, self.machine, self.config = model, data, machine, config
        self.critic = Discriminator().to(machine.device)
        self.critic_step = torch.optim.AdamW(self.critic.parameters(), lr=4e-4, betas=(0.5, 0.95))
        self.generator = torch.Generator().manual_seed(0)

    def distance(self, y: Tensor, x: Tensor) -> Tensor:
        c = self.config
        out = c.l1 * (y - x).abs().mean()
        out = out + c.lpips * losses.robust_distance(y, x, self.generator).mean()
        if c.vgg_file and c.vgg:
            net = losses.vgg_features(c.vgg_file, str(y.device))
            out = out + c.vgg * net(y, x, normalize=True).mean()
        return out

    def judge(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of the discriminator on real `x` and made `y`; returns its loss."""
        with autocast(self.machine.device):
            real, made = self.critic(x).float(), self.critic(y.detach()).float()
        loss = F.relu(1 - real).mean() + F.relu(1 + made).mean()
        self.critic_step.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_step.step()
        return loss.detach()

    def __call__(self, step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        c, model, batch = self.config, self.model, next(self.data)
        x, lr = batch["hr"], batch["lr"]
        with autocast(self.machine.device):
            z = model.encoder(x)
        if step % 20 == 19 and done < 0.7:
            model.codebook.revive(z.detach())
        q, codes, book = model.codebook(z)
        see_codes, see_lr = _inputs(len(x), c, done, x.device)
        q = spoil_codes(q, model, codes, see_lr)
        with autocast(self.machine.device):
            y = model.decoder(q, lr, see_codes, see_lr).float()
            loss = self.distance(y, x) + c.codebook * book
        figures = {"l1": (y - x).abs().mean().detach(), "book": book.detach()}
        if step % 3 == 0:  # the chain's smaller images, whole pictures scaled down, codes alone
            small = F.interpolate(x, size=64 if step % 2 else 32, mode="area")
            with autocast(self.machine.device):
                q, _, book = model.codebook(model.encoder(small))
                remade = model.decoder(q).float()
                loss = loss + 0.3 * (c.l1 * (remade - small).abs().mean() + c.codebook * book)
                if small.shape[-1] == 64:
                    loss = loss + 0.3 * perceptual.distance(remade, small).mean()
        if c.adversary and done > c.adversary_from - 0.05:
            figures["critic"] = self.judge(x, y)
            grow = min(1.0, max(0.0, (done - c.adversary_from) / 0.1))
            if grow > 0:
                with autocast(self.machine.device):
                    loss = loss - c.adversary * grow * self.critic(y).float().mean()
        return loss, figures


class FinePairs(Pairs):
    """Pairs of which half are cut without scaling where the picture is large enough: fine
    texture."""

    def cut(self, image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, bool]:
        if min(image.size) < SIDE or rng.random() < 0.5:
            return super().cut(image, rng)
        x, y = (int(rng.integers(n - SIDE + 1)) for n in image.size)
        part, flip = image.crop((x, y, x + SIDE, y + SIDE)), bool(rng.random() < 0.5)
        return (ImageOps.mirror(part) if flip else part), flip


def crops(
    photos: list, general: list, large: list, seed: int = 0, presets: tuple[str, ...] = ("nano",)
) -> Dataset:
    """Squares for the tokenizer: 60% annotated photographs, 15% other things, 25% fine texture;
    the presets of their damage are equally frequent."""
    kinds = ((photos, 0.6, Pairs), (general, 0.15, Pairs), (large, 0.25, FinePairs))
    parts = [
        (kind(p, preset, seed, labels=False), share)
        for preset in presets
        for p, share, kind in kinds
        if p
    ]
    return Mixture([p for p, _ in parts], [share for _, share in parts], seed)


class Mixture(Dataset):
    """Item i comes from one of several endless sets, chosen at random with fixed weights."""

    def __init__(self, sets: list[Dataset], weights: list[float], seed: int = 0):
        self.sets, self.seed = sets, seed
        self.weights = torch.tensor(weights).cumsum(0) / sum(weights)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, i: int) -> dict:
        g = torch.Generator().manual_seed(self.seed * 7919 + i)
        k = int((torch.rand((), generator=g) > self.weights).sum())
        return self.sets[k][i]


def train_tokenizer(
    model: VQModel, data: Dataset, run: Run, loss: TokenizerLoss = TokenizerLoss()
) -> VQModel:
    """Train the tokenizer on crops; returns the averaged weights."""
    model.decoder.clean = None  # it belongs to the weights before
    model = model.to(run.machine.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.fit.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    fit = run.of(model, optimizer)
    batches = forever(data, run.machine, lambda: fit.step * run.machine.batch, _stack)
    training = TokenizerTraining(model, batches, run.machine, loss)
    fit.extra = {"critic": training.critic, "critic_step": training.critic_step}
    # No weights hold how often each code was used: without it, a training that goes on would take
    # long to see that a code is dead.
    fit.extra["usage"] = torch.nn.Module()
    fit.extra["usage"].register_buffer("usage", model.codebook.usage)
    return fit.run(training, run.preview)


def _stack(items: list[dict]) -> dict:
    return {k: torch.stack([x[k] for x in items]) for k in ("hr", "lr")}


class Replay:
    """Batches of `size` samples in random company, each sample used `reuse` times: preparing one
    takes longer than learning from it, on a GPU or where a policy has to draw it. `fresh` gives
    dicts of tensors (b, …) of one shape; at least `ahead` batches of samples that are not used up
    are kept, so that the uses of one lie apart."""

    def __init__(self, fresh: Iterator[dict], size: int, reuse: int, ahead: int = 8):
        self.fresh, self.size, self.reuse, self.ahead = fresh, size, reuse, ahead
        self.kept: dict[str, Tensor] = {}
        self.left = torch.zeros(0)  # how often each of them is still to be used

    def _add(self, batch: dict[str, Tensor]) -> None:
        """Put a batch in the place of what is used up."""
        stay = (self.left > 0).nonzero().flatten()
        for name, x in batch.items():
            before = self.kept[name][stay.to(x.device)] if name in self.kept else x[:0]
            self.kept[name] = torch.cat([before, x])
        new = torch.full((len(x),), self.reuse)
        self.left = torch.cat([self.left[stay], new])

    def __next__(self) -> dict[str, Tensor]:
        while int((self.left > 0).sum()) < self.ahead * self.size:
            self._add(next(self.fresh))
        chosen = self.left.clamp(min=0).multinomial(self.size)
        self.left[chosen] -= 1
        return {name: x[chosen.to(x.device)] for name, x in self.kept.items()}


@dataclass(frozen=True)
class PolicyLoss:
    """What the policy learns from (see `train_policy`)."""

    text_weight: float = 4.0  # of a word, where a code weighs 1
    own_from: float = 0.3  # share of the run before it sees codes of its own
    own: float = 0.5  # share of the chains that hold such codes, up to half of their cells
    reuse: int = 1  # how often each pair is used
    tags: tuple[str, ...] = sft.TAGS
    muon: bool = True
    blank: bool = False  # it sees no code before the one it draws (a control)


def _chains(policy: ChainPolicy, tokenizer: VQModel, batches: Iterator[dict]) -> Iterator[dict]:
    """True chains with their codes, all of one length, and LR photos, small in memory."""
    pad = policy.vocabulary.ids[PAD]
    length = len(policy.vocabulary.prompt) + policy.grammar().max_length
    for batch in batches:
        with torch.no_grad(), autocast(policy.device):
            ids = sft.fill(policy, batch["ids"], tokenizer.encode_steps(batch["hr"]))
        ids = F.pad(ids, (0, length - ids.shape[1]), value=pad)
        yield {"ids": ids.short(), "lr": (batch["lr"] * 255).round().byte()}


def train_policy(
    policy: ChainPolicy,
    tokenizer: VQModel,
    data: Dataset,
    run: Run,
    loss: PolicyLoss = PolicyLoss(),
) -> ChainPolicy:
    """Supervised fine-tuning from scratch on true chains; returns the averaged weights.

    Part of the codes that the policy has before it are its own, drawn given the true ones: in a
    chain of its own it meets nothing else (scheduled sampling in two passes, Mihaylova and Martins
    2019, arXiv 1906.07651)."""
    device, batch = run.machine.device, run.machine.batch
    policy, tokenizer = policy.to(device).train(), tokenizer.to(device).eval()
    if loss.muon:
        optimizer = MuonAdamW(policy, lr=run.fit.lr)
    else:
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=run.fit.lr, betas=(0.9, 0.95), weight_decay=0.05
        )
    weights = sft.token_weights(policy.vocabulary, loss.text_weight).to(device)
    collate = sft.collate(policy.vocabulary, loss.tags)
    fit = run.of(policy, optimizer)
    batches = forever(data, run.machine, lambda: fit.step * batch / loss.reuse, collate)
    source = Replay(_chains(policy, tokenizer, batches), batch, loss.reuse)

    def loss_of(step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        chains = next(source)
        ids, lr = chains["ids"].long(), chains["lr"].float() / 255
        ids = ids[:, : int((ids != policy.vocabulary.ids[PAD]).sum(1).max())]
        seen = ids
        with autocast(policy.device):
            if loss.blank:
                seen = blank_codes(policy, ids)
            elif done >= loss.own_from:
                share = torch.rand(len(ids), 1, device=ids.device) / 2
                share = share * (torch.rand_like(share) < loss.own)
                seen = redraw(policy, ids, lr, share=share)
            return sft.chain_loss(policy, ids, lr, weights, seen), {}

    return fit.run(loss_of, run.preview)


def _drawn(policy: ChainPolicy, model: VQModel, batches: Iterator[dict]) -> Iterator[dict]:
    """Pictures, LR photos, the codes of chains that the policy draws as at restoration, and the
    true codes."""
    for i, batch in enumerate(batches):
        heat = 0.5 + 0.5 * float(torch.rand(()))
        generator = torch.Generator().manual_seed(i)
        drawn = sample(policy, batch["lr"], Sampling(image_temperature=heat), generator).codes
        with torch.no_grad(), autocast(batch["hr"].device):
            true = model.encode(batch["hr"])
        pictures = {k: (batch[k] * 255).round().byte() for k in ("hr", "lr")}
        yield pictures | {"drawn": drawn, "true": true}


def on_drawn(
    model: VQModel,
    policy: ChainPolicy,
    data: Dataset,
    run: Run,
    reuse: int,
    draw: Callable[[Iterator[dict]], Iterator[dict]],
) -> tuple[Fit, Replay]:
    """What the trainings of the decoder share: the fit of those weights that want a gradient, and
    batches of what `draw` makes of crops, each used `reuse` times; a resumed run goes on
    after those that were used up."""
    machine = run.machine
    policy.to(machine.device).eval().requires_grad_(False)
    model.to(machine.device, memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=run.fit.lr, betas=(0.9, 0.95), weight_decay=0.01)
    fit = run.of(model, optimizer)
    draws = replace(machine, batch=machine.draws)
    batches = forever(data, draws, lambda: fit.step * machine.batch / reuse, _stack)
    return fit, Replay(draw(batches), machine.batch, reuse, ahead=2)  # a teacher is slow


def train_decoder(
    model: VQModel,
    policy: ChainPolicy,
    data: Dataset,
    run: Run,
    loss: TokenizerLoss = TokenizerLoss(),
) -> VQModel:
    """Go on with the decoder alone, three quarters of its codes from chains that the policy has
    drawn: it learns what to believe of them. Encoder and codebook stay, so the policy's tokens keep
    their meaning."""
    model.decoder.clean = None  # it belongs to the weights before
    model.eval().requires_grad_(False)
    model.decoder.train().requires_grad_(True)
    fit, source = on_drawn(model, policy, data, run, loss.reuse, partial(_drawn, policy, model))
    training = TokenizerTraining(model, source, run.machine, loss)

    def loss_of(step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(source)
        x, lr = (batch[k].float() / 255 for k in ("hr", "lr"))
        see_codes, see_lr = _inputs(len(x), loss, 1.0, x.device)
        own = see_lr & (torch.rand(len(x), device=x.device) < 0.75)
        codes = torch.where(own[:, None, None], batch["drawn"], batch["true"])
        with autocast(x.device):
            y = model.decoder(model.codebook.embed(codes), lr, see_codes, see_lr).float()
            total = training.distance(y, x)
        figures = {"l1": (y - x).abs().mean().detach(), "critic": training.judge(x, y)}
        if step > 200:
            with autocast(x.device):
                total = total - loss.adversary * training.critic(y).float().mean()
        return total, figures

    fit.extra = {"critic": training.critic, "critic_step": training.critic_step}
    return fit.run(loss_of, run.preview)
