"""Speculative Jacobi decoding: several image codes from one forward pass, without training and
without changing what is drawn.

Teng et al. 2024 (arXiv 2410.01699), which PURE offers, too. A window of guessed words follows the
words that are settled. One forward pass gives, for every place of the window, the distribution that
plain sampling would draw from if the guesses before it were right. From the left, a guess x that
was drawn from q is kept with probability min(1, p(x)/q(x)); the first that is not kept is drawn
anew from the positive part of p − q, which makes its distribution p exactly (speculative sampling,
Leviathan et al. 2023). What stands behind it is drawn afresh from the distributions just computed
and is the next pass's guess: a Jacobi iteration. New places at the right end start with a uniform
guess. Forced words (row ends) are guessed right by themselves, and greedy decoding is the case in
which every distribution is a single word.

Simplifications: one sequence at a time (rows of a batch would settle different numbers of words),
and PURE's other ways to start a guess (the code to the left) are left out. PURE counts a uniform
guess as certain (q = 1 at x); here q is uniform, which is as exact and is kept more often.

Measured on the shipped nano policy (final images of three validation scenes, 273 words, temperature
1, one core, CPU seconds): word by word 273 passes, 0.9 s with transformers' cache and 0.7 s with
`decoding`; window 8: 127 passes, 0.7 s; 16: 99 passes, 0.6 s; 32: 105 passes, 0.8 s. On a CPU a
pass over a window costs more than one over a word; the saved passes should count fully where a pass
costs the reading of the weights, as with 7B on a GPU (not measured here).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from realsr_r1.first.policy import Sampling, draw, entropy_k, keep_top_k


def target(
    logits: Tensor,
    allowed: Tensor,
    how: Sampling,
    free: Tensor | None = None,
    k_first: bool = False,
) -> Tensor:
    """The scores (m, v), up to a constant log-probabilities, from which image words are drawn;
    minus infinity is impossible.

    `logits`, `free` (m, v): with the whole context, and with the image alone, for guidance `free +
    s·(logits − free)`; `allowed` boolean (m, v). `k_first`: the entropy of top-k is taken before
    the temperature, as PURE does, and not after it, as `policy.sample` does.
    """
    if how.temperature <= 0:
        raise ValueError(
            f"temperature must be above 0, got {how.temperature}: use image_greedy for greedy "
            f"images"
        )
    scores = logits.float()
    if free is not None and how.guidance != 1.0:
        scores = free.float() + how.guidance * (scores - free.float())
    scores = scores.masked_fill(~allowed, float("-inf"))
    if how.image_greedy:
        best = torch.zeros_like(allowed).scatter(-1, scores.argmax(-1, keepdim=True), True)
        return scores.masked_fill(~best, float("-inf"))
    if not k_first:
        scores = scores / how.temperature
    if how.entropy_top_k:
        scores = keep_top_k(scores, entropy_k(scores))
    elif how.top_k:
        scores = keep_top_k(scores, torch.full((len(scores),), how.top_k, device=scores.device))
    return scores / how.temperature if k_first else scores


class Reading:
    """A context (1, p) and its cache: `logits` reads words that follow, `forget` takes the last of
    them back."""

    def __init__(self, model: PreTrainedModel, context: Tensor):
        self.model, self.cache, self.pending = model, DynamicCache(), context.to(model.device)

    def logits(self, guesses: Tensor) -> Tensor:
        """Guesses (m,) → logits (m + 1, v) of their places and of the place after them; reads what
        is pending first."""
        out = self.model.model(
            torch.cat([self.pending, guesses[None]], 1), past_key_values=self.cache, use_cache=True
        )
        return (
            self.model.lm_head(out.last_hidden_state[0, -len(guesses) - 1 :])
            .float()
            .to(guesses.device)
        )

    def settle(self, wrong: int, word: Tensor) -> None:
        """Take the last `wrong` guesses back; `word` (1,) follows and is read by the next pass."""
        self.cache.crop(-wrong)
        self.pending = word[None]


@dataclass
class Drawn:
    """What was drawn, (n,) on the CPU, and in how many forward passes of the model (the reading of
    the context is in the first)."""

    ids: Tensor
    passes: int


def _verify(guesses: Tensor, q: Tensor, p: Tensor, u: Tensor) -> int:
    """How many guesses (m,), drawn from q (m, v), stand under p (m, v), from the left; u (m,)
    uniform in [0, 1)."""
    at = guesses[:, None]
    stands = u * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]
    return int(stands.long().cumprod(0).sum())


@torch.no_grad()
def speculative(
    model: PreTrainedModel,
    context: Tensor,
    kinds: Tensor,
    masks: Tensor,
    how: Sampling = Sampling(),
    window: int = 16,
    generator: torch.Generator | None = None,
    free: Tensor | None = None,
    k_first: bool = False,
) -> Drawn:
    """Draw the n words after `context` (1, p) that `policy.sample` would draw, up to `window` + 1 a
    forward pass.

    `kinds` (n,) says which row of `masks` (k, v), boolean, holds the words allowed at each place
    (`LayoutGrammar.kind` and `.masks`, for an image of known size). `free` (1, f) is guidance's
    context (the image's first words); its passes are not counted. The model is any causal language
    model with `.model`, `.lm_head` and a cache that can be cropped; the generator may live on
    another device. Raises ValueError for more than one row or a window below 1.
    """
    if context.shape[0] != 1 or window < 1:
        raise ValueError(
            f"speculative decoding takes one sequence and a window of at least 1, got "
            f"{context.shape[0]} and {window}"
        )
    kinds, masks, n = kinds.to(model.device), masks.to(model.device), len(kinds)
    # Words that no place allows (most of a large vocabulary) are left out: below, a word is its
    # number among the others.
    columns = masks[kinds.unique()].any(0).nonzero()[:, 0]
    masks = masks[:, columns]
    readings = [
        Reading(model, c) for c in (context, free if how.guidance != 1.0 else None) if c is not None
    ]

    def uniform(m: int) -> Tensor:
        return torch.rand(
            m,
            generator=generator,
            device=generator.device if generator is not None else model.device,
        ).to(model.device)

    settled = torch.zeros(0, dtype=torch.long, device=model.device)
    guesses, q, passes = settled, torch.zeros(0, masks.shape[1], device=model.device), 0
    while (at := len(settled)) < n:
        new = masks[kinds[at + len(guesses) : min(n, at + window)]].float()
        if len(new):
            guesses = torch.cat([guesses, draw(new.log(), uniform(len(new)))])
            q = torch.cat([q, new / new.sum(-1, keepdim=True)])
        m = len(guesses)
        ahead = masks[
            kinds[at : at + m + 1]
        ]  # one row less at the very end: nothing follows the last word
        logits = [r.logits(columns[guesses])[: len(ahead), columns] for r in readings]
        passes += 1
        scores = target(logits[0], ahead, how, logits[1] if len(logits) > 1 else None, k_first)
        p = scores.softmax(-1)
        kept = _verify(guesses, q, p[:m], uniform(m))
        settled = torch.cat([settled, guesses[:kept]])
        if len(settled) == n:
            break
        left = (p[kept] - q[kept]).clamp_min(0) if kept < m else p[kept]
        # Equal distributions differ by rounding alone, and then a refusal says nothing: draw from
        # p.
        left = left if float(left.sum()) > 1e-6 else p[kept]
        word = draw(left.log()[None], uniform(1))
        settled = torch.cat([settled, word])
        for r in readings:
            r.settle(m - kept, columns[word])
        guesses, q = draw(scores[kept + 1 :], uniform(len(scores) - kept - 1)), p[kept + 1 :]
    return Drawn(columns[settled].cpu(), passes)
