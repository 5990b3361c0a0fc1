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
from realsr_r1.decoding import Writer
from realsr_r1.grammar import LayoutGrammar
from realsr_r1.policy import FIRST_CELL, ChainPolicy
from realsr_r1.vlcot import GRIDS, Vocabulary

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `rollout()` is what a loss sees: temperature 1, nothing else, one
    token after the other."""

    temperature: float = 1.0  # of text
    image_temperature: float = 0.65
    greedy_text: bool = True
    entropy_top_k: bool = True  # inside images; see the function of that name
    guidance: float = 1.0  # 1: off; PURE uses 0.8. See `guided_logits`
    num_generations: int = 1  # chains per LR photo
    lag: int = 1  # cells by which a row is drawn behind the one above; 0: all cells in order

    def __post_init__(self) -> None:
        for name in ("temperature", "image_temperature"):
            check_number(name, getattr(self, name), 1e-6)
        check_number("guidance", self.guidance, 0.0)
        check_number("num_generations", self.num_generations, 1)
        check_number("lag", self.lag, 0)

    @staticmethod
    def rollout(num_generations: int = 1) -> "Sampling":
        return Sampling(1.0, 1.0, False, False, num_generations=num_generations, lag=0)


@dataclass
class Samples:
    """Completions (b, n), padded; log-probabilities (b, n) at temperature 1 under the grammar and
    given what had been written by then; chains; the final images' codes (b, 16, 16)."""

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


def _guided(logits: list[Tensor], inside: Tensor, guidance: float) -> Tensor:
    """Masked logits (n, v), in rows that are in an image guided away from the blind reading's, if
    there is one."""
    if len(logits) == 1:
        return logits[0]
    mixed = guided_logits(*logits, guidance).masked_fill(logits[0].isinf(), float("-inf"))
    return torch.where(inside[:, None], mixed, logits[0])


def _chosen(logits: Tensor, inside: Tensor, how: Sampling, v: Vocabulary, u: Tensor) -> Tensor:
    """Tokens (n,) from masked logits whose last columns are the codes; `inside` (n,) marks rows
    that are in an image."""
    token = torch.zeros_like(inside, dtype=torch.long)
    if not bool(inside.all()):
        text = logits[~inside] / how.temperature
        token[~inside] = text.argmax(-1) if how.greedy_text else choose(text, u[~inside])
    if bool(inside.any()):
        codes = logits[inside, -v.codes :] / how.image_temperature
        if how.entropy_top_k:
            codes = keep_top_k(codes, entropy_top_k(codes))
        token[inside] = v.first_code + choose(codes, u[inside])
    return token


def _uniform(generator: Generators, settled: Tensor, n: int = 1) -> Tensor:
    """Numbers (b, n) in [0, 1). A photo's own generator gives none for `settled` (b,) tokens,
    forced or greedy: images have the same noise under any texts."""
    if not isinstance(generator, list):
        return torch.rand(len(settled), n, generator=generator)
    out = torch.zeros(len(generator), len(settled) // len(generator), n)
    for rows, fixed, g in zip(out, settled.cpu().view(out.shape[:2]), generator, strict=True):
        if not fixed.all():
            rows[:] = torch.rand(rows.shape, generator=g)
    return out.flatten(0, 1)


def _collect(writer: Writer) -> Samples:
    """What has been written, as Samples."""
    v, ids, logprobs = writer.policy.vocabulary, *writer.written()
    chains = [vlcot.parse(v.decode(row)) for row in ids.cpu()]
    codes = writer.codes[:, FIRST_CELL[-1] :] - v.first_code
    return Samples(ids, logprobs, chains, codes.unflatten(1, (GRIDS[-1], GRIDS[-1])))


@torch.no_grad()
def sample(
    policy: ChainPolicy,
    lr: Tensor,
    sampling: Sampling = Sampling(),
    generator: Generators = None,
    grammar: LayoutGrammar | None = None,
) -> Samples:
    """`num_generations` chains for each LR photo (b, 3, 32, 32) in [0, 1], or each of the eye's
    maps (b, hidden, 16, 16), adjacent. Same generator state, same chains, up to rounding.

    Args:
        generator: one for all, or one for each photo, whose chains then do not depend on the batch.
        grammar: the layout; None is the whole chain."""
    grammar, lr = (grammar or policy.grammar()).to(policy.device), lr.to(policy.device)
    photos = [lr.to(policy.dtype)]
    if sampling.guidance != 1.0:
        photos.append(photos[0].new_full((len(lr), 3, 2 * GRIDS[-1], 2 * GRIDS[-1]), 0.5))
    writer = Writer(policy, photos, grammar, sampling.num_generations, sampling.lag)

    def uniform(settled: Tensor, inside: Tensor, n: int) -> Tensor:
        return _uniform(generator, settled | (~inside & sampling.greedy_text), n)

    def pick(logits: list[Tensor], place: Tensor, inside: Tensor, u: Tensor) -> Tensor:
        x = _guided(logits, inside, sampling.guidance)
        return _chosen(x, inside, sampling, policy.vocabulary, u.to(x.device)).view_as(place)

    writer.run(pick, uniform)
    return _collect(writer)


def grammar_logprobs(
    policy: ChainPolicy, lr: Tensor, whole: Tensor, n: int, grammar: LayoutGrammar
) -> Tensor:
    """Log-probabilities (b, n, vocabulary) of the last n tokens of whole sequences, prompt first,
    in one forward pass, under the grammar: what `sample` draws from and a loss must use."""
    logits = policy(whole, lr, logits_to_keep=n + 1).logits[:, :-1].float()
    mask = grammar.allowed(grammar.states(whole[:, -n:]))
    return logits.masked_fill(~mask, float("-inf")).log_softmax(-1)


def logprobs_of(policy: ChainPolicy, lr: Tensor, ids: Tensor, grammar: LayoutGrammar) -> Tensor:
    """`grammar_logprobs` of the tokens of completions (b, n) themselves: (b, n)."""
    prompt = torch.tensor(policy.vocabulary.prompt, device=ids.device).expand(len(ids), -1)
    logp = grammar_logprobs(policy, lr, torch.cat([prompt, ids], 1), ids.shape[1], grammar)
    return logp.gather(-1, ids[..., None])[..., 0]
