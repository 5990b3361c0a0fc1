"""Sampling chains: under the layout grammar, a batch at a time, replayable.

The settings are PURE's (temperature, greedy text, entropy-dependent top-k and guidance inside
images) or, for reinforcement learning, the policy's own distribution. What a chain is drawn from,
the softmax over the tokens that the grammar allows, is also what a loss must see.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realsr_r1 import vlcot
from realsr_r1.common import check_number
from realsr_r1.decoding import Decoder
from realsr_r1.grammar import LayoutGrammar
from realsr_r1.policy import CELLS, FIRST_CELL, ChainPolicy
from realsr_r1.vlcot import GRIDS, PAD


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `rollout()` is what a loss sees: temperature 1, nothing else."""

    temperature: float = 1.0  # of text
    image_temperature: float = 0.8
    greedy_text: bool = True
    entropy_top_k: bool = True  # inside images; see the function of that name
    guidance: float = 1.0  # 1: off; PURE uses 0.8. See `guided_logits`
    num_generations: int = 1  # chains per LR photo

    def __post_init__(self) -> None:
        for name in ("temperature", "image_temperature"):
            check_number(name, getattr(self, name), 1e-6)
        check_number("guidance", self.guidance, 0.0)
        check_number("num_generations", self.num_generations, 1)

    @staticmethod
    def rollout(num_generations: int = 1) -> "Sampling":
        return Sampling(1.0, 1.0, False, False, num_generations=num_generations)


@dataclass
class Samples:
    """Completions (b, n), padded; log-probabilities (b, n) at temperature 1 under the grammar;
    chains; the final images' codes (b, 16, 16)."""

    ids: Tensor
    logprobs: Tensor
    chains: list[vlcot.Chain]
    codes: Tensor


def entropy_top_k(logits: Tensor) -> Tensor:
    """PURE's number of candidates from the entropy H of logits (b, v), in nats clamped to 0–10:
    1 + 1999·sigmoid(H - 5), (b,) int64."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)
    return (1 + 1999 * torch.sigmoid(entropy.clamp(0, 10) - 5)).round().long()


def _ascending(x: Tensor) -> Tensor:
    """Rows in order; on a CPU by numpy, whose sort is many times faster than torch's."""
    return torch.from_numpy(np.sort(x.numpy())) if x.device.type == "cpu" else x.sort(-1).values


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Set all but each row's k (b,) largest logits (b, v) to minus infinity."""
    n = logits.shape[-1]
    threshold = _ascending(logits).gather(-1, (n - k.clamp(1, n))[:, None])
    return logits.masked_fill(logits < threshold, float("-inf"))


def guided_logits(logits: Tensor, blind: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): blind + guidance · (logits - blind), where
    `blind` are the logits without the LR photo."""
    return blind + guidance * (logits - blind)


def choose(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens (b,) from the softmax of logits (b, v), inverted at uniform u (b,) in [0, 1)."""
    mass = logits.softmax(-1).cumsum(-1)
    # A token without probability has its predecessor's sum, so it is never the first to exceed u.
    return (mass <= (u * mass[:, -1])[:, None]).sum(-1)


class _Writer:
    """A batch of chains being written: the decoder, and what the cells get to see."""

    @torch.no_grad()
    def __init__(self, policy: ChainPolicy, lr: Tensor, length: int, copies: int):
        self.policy = policy
        patches, seen = policy.look(lr)
        task = torch.tensor(policy.vocabulary.prompt[-1:], device=lr.device)
        task = policy.get_input_embeddings()(task).expand(len(lr), 1, -1)
        self.decoder = Decoder(policy.model, torch.cat([patches, task], 1), length, copies)
        self.seen = seen.repeat_interleave(copies, 0)
        shape = (len(lr) * copies, CELLS)
        self.codes = torch.full(shape, -1, device=lr.device)
        self.rows = torch.arange(shape[0], device=lr.device)

    def logits(self) -> Tensor:
        return self.policy.head(self.decoder.last).float()

    def write(self, token: Tensor, cell: Tensor, following: Tensor) -> None:
        """Append tokens (b,); `cell` (b,) is the cell each one fills, `following` the cell that the
        next one will fill (-1: none)."""
        inside = cell >= 0
        self.codes[self.rows[inside], cell[inside]] = token[inside]
        x = self.policy.get_input_embeddings()(token)
        if self.policy.config.aligned and bool((following >= 0).any()):
            extra = self.seen[self.rows, following.clamp(min=0)]
            extra = extra + self.policy.previous(self.codes, following[:, None])[:, 0]
            x = x + torch.where((following >= 0)[:, None], extra, 0.0)
        self.decoder.step(x)


def _guided(logits: Tensor, blind: _Writer | None, inside: Tensor, guidance: float) -> Tensor:
    """Masked logits (b, v), in rows that are in an image guided away from the `blind` reading."""
    if blind is None:
        return logits
    mixed = guided_logits(logits, blind.logits(), guidance)
    mixed = mixed.masked_fill(logits.isinf(), float("-inf"))
    return torch.where(inside[:, None], mixed, logits)


def _chosen(logits: Tensor, inside: Tensor, sampling: Sampling, first: int, u: Tensor) -> Tensor:
    """Tokens (b,) from masked logits (b, v); `inside` (b,) marks rows that are in an image."""
    heat = torch.where(inside, sampling.image_temperature, sampling.temperature)
    scores = logits / heat[:, None]
    if sampling.entropy_top_k and bool(inside.any()):
        some = scores[inside, first:]
        scores[inside, first:] = keep_top_k(some, entropy_top_k(some))
    drawn = choose(scores, u.to(scores.device))
    return torch.where(~inside & sampling.greedy_text, scores.argmax(-1), drawn)


def _collect(writer: _Writer, ids: Tensor, logprobs: Tensor) -> Samples:
    """What has been written, as Samples."""
    vocabulary = writer.policy.vocabulary
    chains = [vlcot.parse(vocabulary.decode(row)) for row in ids.cpu()]
    codes = writer.codes[:, FIRST_CELL[-1] :] - vocabulary.first_code
    logprobs = logprobs.masked_fill(ids == vocabulary.ids[PAD], 0.0)
    return Samples(ids, logprobs, chains, codes.unflatten(1, (GRIDS[-1], GRIDS[-1])))


def _uniform(generator: torch.Generator | list[torch.Generator] | None, settled: Tensor) -> Tensor:
    """Numbers in [0, 1) for rows (b,). A photo's own generator gives none for `settled` tokens,
    forced or greedy: images have the same noise under any texts."""
    if not isinstance(generator, list):
        return torch.rand(len(settled), generator=generator)
    out = torch.zeros(len(generator), len(settled) // len(generator))
    for row, fixed, g in zip(out, settled.cpu().view(out.shape), generator, strict=True):
        if not fixed.all():
            row[:] = torch.rand(len(row), generator=g)
    return out.flatten()


@torch.no_grad()
def sample(
    policy: ChainPolicy,
    lr: Tensor,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | list[torch.Generator] | None = None,
    grammar: LayoutGrammar | None = None,
    prefix: Tensor | None = None,
) -> Samples:
    """Chains for LR photos (b, 3, 32, 32) in [0, 1], `num_generations` for each, those of a photo
    adjacent. Same generator state, same chains, on every device up to rounding.

    Args:
        generator: one for all, or one for each photo, whose chains then do not depend on the batch.
        grammar: the layout; None is the whole chain.
        prefix: first tokens (b, n) that are not chosen, such as a true chain's."""
    grammar = (grammar or policy.grammar()).to(policy.device)
    lr = lr.to(policy.device, policy.dtype)
    copies, vocabulary = sampling.num_generations, policy.vocabulary
    writer = _Writer(policy, lr, grammar.max_length + 1, copies)
    blind = None
    if sampling.guidance != 1.0:
        blind = _Writer(policy, torch.full_like(lr, 0.5), grammar.max_length + 1, copies)
    state = grammar.start(len(lr) * copies)
    tokens, logprobs = [], []
    for i in range(grammar.max_length):
        mask, cell = grammar.allowed(state), grammar.cell[state]
        logits = writer.logits().masked_fill(~mask, float("-inf"))
        chosen = _guided(logits, blind, cell >= 0, sampling.guidance)
        u = _uniform(generator, grammar.forced[state] | ((cell < 0) & sampling.greedy_text))
        token = _chosen(chosen, cell >= 0, sampling, vocabulary.first_code, u)
        if prefix is not None and i < prefix.shape[1]:
            token = prefix[:, i].to(policy.device)
        tokens.append(token)
        logprobs.append(logits.log_softmax(-1).gather(-1, token[:, None])[:, 0])
        state = grammar.step(state, token)
        if bool((state == grammar.max_length).all()):
            break
        for w in filter(None, (writer, blind)):
            w.write(token, cell, grammar.cell[state])
    return _collect(writer, torch.stack(tokens, 1), torch.stack(logprobs, 1))


def logprobs_of(policy: ChainPolicy, lr: Tensor, ids: Tensor, grammar: LayoutGrammar) -> Tensor:
    """Log-probability (b, n) of completions (b, n) in one forward pass, under the grammar: what
    `sample` draws from and a loss must use."""
    prompt = torch.tensor(policy.vocabulary.prompt, device=ids.device).expand(len(ids), -1)
    whole = torch.cat([prompt, ids], 1)
    logits = policy(whole, lr, logits_to_keep=ids.shape[1] + 1).logits[:, :-1].float()
    logits = logits.masked_fill(~grammar.allowed(grammar.states(ids)), float("-inf"))
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
