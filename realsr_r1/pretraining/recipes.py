"""Recipes of the three trainings: the tokenizer, the policy, and the decoder on drawn codes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from realsr_r1 import perceptual, photographs, sft
from realsr_r1.policy import ChainPolicy
from realsr_r1.pretraining.loop import Fit, FitConfig
from realsr_r1.pretraining.muon import MuonAdamW
from realsr_r1.tokenizer import VQModel


@dataclass(frozen=True)
class Machine:
    """Where and how wide a training runs."""

    device: str = "cpu"
    batch: int = 8
    workers: int = 0

    def autocast(self):
        cuda = self.device.startswith("cuda")
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=cuda)


def forever(data: Dataset, machine: Machine, sampler, collate=None) -> Iterator[dict]:
    """Endless batches on the device, pictures as floats in [0, 1]."""
    loader = DataLoader(
        data,
        machine.batch,
        sampler=sampler,
        num_workers=machine.workers,
        collate_fn=collate,
        drop_last=True,
        pin_memory=machine.device != "cpu",
        persistent_workers=machine.workers > 0,
        prefetch_factor=6 if machine.workers else None,
    )
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
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
    """Weights of the tokenizer's loss and shares of its inputs (see `tokenizer_loss`)."""

    l1: float = 2.0
    lpips: float = 1.0
    vgg: float = 0.5
    codebook: float = 0.5
    adversary: float = 0.04
    adversary_from: float = 0.5  # share of the run
    codes_alone: float = 0.3  # share of the run before the LR photo comes in
    see_lr: float = 0.6
    see_codes: float = 0.8  # of those that see the LR photo
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
        out = out + c.lpips * perceptual.robust_distance(y, x, self.generator).mean()
        if c.vgg_file and c.vgg:
            net = perceptual.vgg_features(c.vgg_file, str(y.device))
            out = out + c.vgg * net(y, x, normalize=True).mean()
        return out

    def judge(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of the discriminator on real `x` and made `y`; returns its loss."""
        with self.machine.autocast():
            real, made = self.critic(x).float(), self.critic(y.detach()).float()
        loss = F.relu(1 - real).mean() + F.relu(1 + made).mean()
        self.critic_step.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_step.step()
        return loss.detach()

    def __call__(self, step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        c, model, batch = self.config, self.model, next(self.data)
        x, lr = batch["hr"], batch["lr"]
        with self.machine.autocast():
            z = model.encoder(x)
        if step % 20 == 19 and done < 0.7:
            model.codebook.revive(z.detach())
        q, codes, book = model.codebook(z)
        see_codes, see_lr = _inputs(len(x), c, done, x.device)
        q = spoil_codes(q, model, codes, see_lr)
        with self.machine.autocast():
            y = model.decoder(q, lr, see_codes, see_lr).float()
            loss = self.distance(y, x) + c.codebook * book
        figures = {"l1": (y - x).abs().mean().detach(), "book": book.detach()}
        if step % 3 == 0:  # the chain's smaller images, whole pictures scaled down, codes alone
            small = F.interpolate(x, size=64 if step % 2 else 32, mode="area")
            with self.machine.autocast():
                q, _, book = model.codebook(model.encoder(small))
                remade = model.decoder(q).float()
                loss = loss + 0.3 * (c.l1 * (remade - small).abs().mean() + c.codebook * book)
                if small.shape[-1] == 64:
                    loss = loss + 0.3 * perceptual.distance(remade, small).mean()
        if c.adversary and done > c.adversary_from - 0.05:
            figures["critic"] = self.judge(x, y)
            grow = min(1.0, max(0.0, (done - c.adversary_from) / 0.1))
            if grow > 0:
                with self.machine.autocast():
                    loss = loss - c.adversary * grow * self.critic(y).float().mean()
        return loss, figures


def crops(photos: list, general: list, large: list, seed: int = 0) -> Dataset:
    """Squares for the tokenizer: 60% annotated photographs, 15% other things, 25% fine texture."""
    parts = [(photos, 0.6, False), (general, 0.15, False), (large, 0.25, True)]
    parts = [(p, share, native) for p, share, native in parts if p]
    sets = [photographs.Pairs(p, seed=seed, labels=False, native=n) for p, _, n in parts]
    return Mixture(sets, [share for _, share, _ in parts], seed)


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


class Counting(torch.utils.data.Sampler):
    """Item numbers from `first` on, without end."""

    def __init__(self, first: int = 0):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


def train_tokenizer(
    model: VQModel,
    data: Dataset,
    out: Path,
    machine: Machine,
    fit: FitConfig,
    loss: TokenizerLoss = TokenizerLoss(),
    preview=None,
) -> VQModel:
    """Train the tokenizer on crops; returns the averaged weights."""
    model = model.to(machine.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=fit.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    run = Fit(model, optimizer, out, fit)
    batches = forever(data, machine, Counting(fit.seed * 10**8), _stack)
    training = TokenizerTraining(model, batches, machine, loss)
    run.extra = {"critic": training.critic, "critic_step": training.critic_step}
    return run.run(training, preview)


def _stack(items: list[dict]) -> dict:
    return {k: torch.stack([x[k] for x in items]) for k in ("hr", "lr")}


def train_policy(
    policy: ChainPolicy,
    tokenizer: VQModel,
    data: Dataset,
    out: Path,
    machine: Machine,
    fit: FitConfig,
    text_weight: float = 6.0,
    preview=None,
    tags=sft.TAGS,
    muon: bool = True,
) -> ChainPolicy:
    """Supervised fine-tuning from scratch on true chains; returns the averaged weights."""
    policy, tokenizer = policy.to(machine.device).train(), tokenizer.to(machine.device).eval()
    if muon:
        optimizer = MuonAdamW(policy, lr=fit.lr)
    else:
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=fit.lr, betas=(0.9, 0.95), weight_decay=0.05
        )
    weights = sft.token_weights(policy.vocabulary, text_weight).to(machine.device)
    collate = sft.collate(policy.vocabulary, tags)
    batches = forever(data, machine, Counting(fit.seed * 10**8), collate)

    def loss_of(step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(batches)
        with torch.no_grad(), machine.autocast():
            ids = sft.fill(policy, batch["ids"], tokenizer.encode_steps(batch["hr"]))
        with machine.autocast():
            return sft.chain_loss(policy, ids, batch["lr"], weights), {}

    return Fit(policy, optimizer, out, fit).run(loss_of, preview)


def train_decoder(
    model: VQModel,
    policy: ChainPolicy,
    data: Dataset,
    out: Path,
    machine: Machine,
    fit: FitConfig,
    loss: TokenizerLoss = TokenizerLoss(),
    preview=None,
) -> VQModel:
    """Go on with the decoder alone, three quarters of its codes drawn by the policy: it learns what
    to believe of them. Encoder and codebook stay, so the policy's tokens keep their meaning."""
    model = model.to(machine.device, memory_format=torch.channels_last)
    policy = policy.to(machine.device).eval().requires_grad_(False)
    model.eval().requires_grad_(False)
    model.decoder.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.decoder.parameters(), lr=fit.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    collate = sft.collate(policy.vocabulary)
    batches = forever(data, machine, Counting(fit.seed * 10**8), collate)
    training = TokenizerTraining(model, batches, machine, loss)

    def loss_of(step: int, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(batches)
        x, lr = batch["hr"], batch["lr"]
        with torch.no_grad(), machine.autocast():
            steps = model.encode_steps(x)
            ids = sft.fill(policy, batch["ids"], steps)
            heat = 0.6 + 0.4 * float(torch.rand(()))
            drawn = sft.drawn_codes(policy, ids, lr, heat)
        see_codes, see_lr = _inputs(len(x), loss, 1.0, x.device)
        own = see_lr & (torch.rand(len(x), device=x.device) < 0.75)
        codes = torch.where(own[:, None, None], drawn, steps[-1])
        with machine.autocast():
            y = model.decoder(model.codebook.embed(codes), lr, see_codes, see_lr).float()
            total = training.distance(y, x)
        figures = {"l1": (y - x).abs().mean().detach(), "critic": training.judge(x, y)}
        if step > 200:
            with machine.autocast():
                total = total - loss.adversary * training.critic(y).float().mean()
        return total, figures

    run = Fit(model, optimizer, out, fit)
    run.extra = {"critic": training.critic, "critic_step": training.critic_step}
    return run.run(loss_of, preview)
