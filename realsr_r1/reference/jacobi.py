"""Speculative Jacobi decoding: several image codes from one forward pass, without training and
without changing what is drawn.

Teng et al. 2024 (arXiv 2410.01699), which PURE offers, too. A window of guessed tokens follows
what is settled. One forward pass gives, for every place of the window, the distribution that
plain sampling would draw from if the guesses before it were right. From the left, a guess x that
was drawn from q is kept with probability min(1, p(x)/q(x)); the first that is not kept is drawn
anew from the positive part of p − q, which makes its distribution p exactly (speculative sampling,
Leviathan et al. 2023). What stands behind it is drawn afresh from the distributions just computed
and is the next pass's guess: a Jacobi iteration. New places at the right end start with a uniform
guess. Forced tokens (row ends) are guessed right by themselves, and greedy decoding is the case in
which every distribution is a single token.

Simplifications: one sequence at a time (rows of a batch would settle different numbers of tokens),
and PURE's other ways to start a guess (the code to the left) are left out. PURE counts a uniform
guess as certain (q = 1 at x); here q is uniform, which is as exact and is kept more often.

Measured on the shipped policy (final images of three validation photographs, 256 codes, image
temperature 0.8, one busy core, CPU seconds): token by token 256 passes, 2.3 s; window 4: 114
passes, 1.3 s; 8: 89, 1.3 s; 16: 72, 1.2 s; 32: 76, 1.7 s. A pass over a window costs more than one
over a token on a CPU; the saved passes should count fully where a pass costs the reading of the
weights, as with 7B on a GPU (not measured here).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from realsr_r1.policy import ChainPolicy
from realsr_r1.sampling import Sampling, choose, entropy_top_k, guided_logits, keep_top_k


def target(
    logits: Tensor,
    allowed: Tensor,
    sampling: Sampling,
    blind: Tensor | None = None,
    k_first: bool = False,
) -> Tensor:
    """The scores (m, v), up to a constant log-probabilities, from which image tokens are drawn;
    minus infinity is impossible.

    `logits`, `blind` (m, v): with the whole context, and with the image alone, for guidance;
    `allowed` boolean (m, v). `k_first`: the entropy of top-k is taken before the temperature, as
    PURE does, and not after it, as `sampling.sample` does."""
    scores, heat = logits.float(), sampling.image_temperature
    if blind is not None and sampling.guidance != 1.0:
        scores = guided_logits(scores, blind.float(), sampling.guidance)
    scores = scores.masked_fill(~allowed, float("-inf")) / (1.0 if k_first else heat)
    if sampling.entropy_top_k:
        scores = keep_top_k(scores, entropy_top_k(scores))
    return scores / heat if k_first else scores


class Reading:
    """A context (1, p) of a causal language model and its cache: `logits` reads tokens that follow,
    `settle` takes the wrong ones back. The model has `.model`, `.lm_head` and a cache that can be
    cropped."""

    def __init__(self, model: PreTrainedModel, context: Tensor):
        self.model, self.device = model, model.device
        self.cache, self.pending = DynamicCache(), context.to(model.device)

    def logits(self, guesses: Tensor) -> Tensor:
        """Guesses (m,) → logits (m + 1, v) of their places and of the place after them; reads what
        is pending first."""
        ids = torch.cat([self.pending, guesses[None]], 1)
        out = self.model.model(ids, past_key_values=self.cache, use_cache=True)
        hidden = out.last_hidden_state[0, -len(guesses) - 1 :]
        return self.model.lm_head(hidden).float().to(guesses.device)

    def settle(self, wrong: int, token: Tensor) -> None:
        """Take the last `wrong` guesses back; `token` (1,) follows and is read by the next pass."""
        self.cache.crop(-wrong)
        self.pending = token[None]


class ChainReading(Reading):
    """The same for the final image of the course's own policy, whose inputs also get what lies at
    the cell that comes next. That is settled with the middle image, so guesses may be wrong."""

    @torch.no_grad()
    def __init__(self, policy: ChainPolicy, lr: Tensor, completion: Tensor):
        """LR photo (1, 3, 32, 32); completion (1, p) up to the final image's start token."""
        prompt = torch.tensor(policy.vocabulary.prompt, device=completion.device)
        ids = torch.cat([prompt[None], completion], 1).to(policy.device)
        super().__init__(policy, ids)
        # Whole sequences of placeholders: what each place of the image gets beside its token.
        cells = len(policy.grammar(("final_image",)).cell)
        filler = torch.full((1, cells), policy.vocabulary.first_code, device=policy.device)
        self.inputs = policy.embed(torch.cat([ids, filler], 1), lr.to(policy.device))
        self.table = policy.get_input_embeddings()
        self.filler, self.start, self.at = self.table(filler)[0, 0], ids.shape[1], 0

    def logits(self, guesses: Tensor) -> Tensor:
        n = self.at + self.pending.shape[1] + len(guesses)
        x = self.inputs[:, self.at : n].clone()
        tokens = torch.cat([self.pending[0], guesses])
        new = torch.arange(self.at, n, device=x.device) >= self.start
        x[0, new] += self.table(tokens)[new] - self.filler
        out = self.model.model(inputs_embeds=x, past_key_values=self.cache, use_cache=True)
        self.at = n
        return self.model.head(out.last_hidden_state[0, -len(guesses) - 1 :]).float()

    def settle(self, wrong: int, token: Tensor) -> None:
        super().settle(wrong, token)
        self.at -= wrong


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


def _left(p: Tensor, q: Tensor, kept: int) -> Tensor:
    """What the first place after the `kept` guesses is drawn from, (v,): where its guess was
    refused, what p has more than q."""
    left = (p[kept] - q[kept]).clamp_min(0) if kept < len(q) else p[kept]
    # Equal distributions differ by rounding alone, and then a refusal says nothing: draw from p.
    return left if float(left.sum()) > 1e-6 else p[kept]


def _extended(
    guesses: Tensor, q: Tensor, new: Tensor, draw: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Guesses (m,) and their distributions (m, v) with uniform ones for new places, whose masks are
    `new` (k, v), behind them."""
    if not len(new):
        return guesses, q
    drawn = choose(new.log(), draw(len(new)))
    return torch.cat([guesses, drawn]), torch.cat([q, new / new.sum(-1, keepdim=True)])


def uniform(generator: torch.Generator | None, device: torch.device, m: int) -> Tensor:
    """Numbers (m,) in [0, 1) on the device."""
    where = generator.device if generator is not None else device
    return torch.rand(m, generator=generator, device=where).to(device)


@torch.no_grad()
def speculative(
    readings: list[Reading],
    kinds: Tensor,
    masks: Tensor,
    sampling: Sampling = Sampling(),
    window: int = 16,
    generator: torch.Generator | None = None,
    k_first: bool = False,
) -> Drawn:
    """Draw the n tokens that plain sampling would draw, up to `window` + 1 a forward pass.

    `readings`: of the context and, for guidance, of the image alone. `kinds` (n,) says which row of
    `masks` (k, v), boolean, holds the tokens allowed at each place (`LayoutGrammar.kind` and
    `.masks`). Raises ValueError for a context of more than one row or a window below 1."""
    rows = readings[0].pending.shape[0]
    if rows != 1 or window < 1:
        what = f"one sequence and a window of at least 1, got {rows} and {window}"
        raise ValueError(f"speculative decoding takes {what}")
    device, n = readings[0].device, len(kinds)
    kinds, masks = kinds.to(device), masks.to(device)
    # Tokens that no place allows are left out: below, a token is its number among the others.
    columns = masks[kinds.unique()].any(0).nonzero()[:, 0]
    masks = masks[:, columns]
    draw = partial(uniform, generator, device)
    settled = torch.zeros(0, dtype=torch.long, device=device)
    guesses, q, passes = settled, torch.zeros(0, masks.shape[1], device=device), 0
    while (at := len(settled)) < n:
        new = masks[kinds[at + len(guesses) : min(n, at + window)]].float()
        guesses, q = _extended(guesses, q, new, draw)
        m = len(guesses)
        ahead = masks[kinds[at : at + m + 1]]  # nothing follows the very last token
        seen = [r.logits(columns[guesses])[: len(ahead), columns] for r in readings]
        scores = target(seen[0], ahead, sampling, seen[1] if len(seen) > 1 else None, k_first)
        p, passes = scores.softmax(-1), passes + 1
        kept = _verify(guesses, q, p[:m], draw(m))
        settled = torch.cat([settled, guesses[:kept]])
        if len(settled) == n:
            break
        token = choose(_left(p, q, kept).log()[None], draw(1))
        settled = torch.cat([settled, token])
        for r in readings:
            r.settle(m - kept, columns[token])
        rest = scores[kept + 1 :]
        guesses, q = choose(rest, draw(len(rest))), p[kept + 1 :]
    return Drawn(columns[settled].cpu(), passes)
