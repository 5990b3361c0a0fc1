"""A few tokens at a time, fast: the policy's body unrolled for sampling in batches.

A small model's step is mostly overhead: many small operators, and a cache that is read once per
step. Here the weights of each layer are joined (queries, keys and values in one product; norms
multiplied into the next matrix), the cache has its full length from the start, the chains of a
group share the reading of their prompt, and several rows of an image can be drawn together.
The numbers are those of transformers' forward pass up to rounding (a test compares them).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Model

from realsr_r1.grammar import LayoutGrammar
from realsr_r1.policy import CELLS, FIRST_CELL, ChainPolicy
from realsr_r1.vlcot import GRIDS, PAD

Pick = Callable[[list[Tensor], Tensor, Tensor, Tensor], Tensor]
Uniform = Callable[[Tensor, Tensor, int], Tensor]


class _Layer:
    """One layer's weights, joined. `qk_norm` (heads + key heads, d) scales queries and keys."""

    def __init__(self, layer: torch.nn.Module):
        a, m = layer.self_attn, layer.mlp
        before, after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]) * before
        self.up = torch.cat([m.gate_proj.weight, m.up_proj.weight]) * after
        self.out, self.down = a.o_proj.weight, m.down_proj.weight
        heads, kv = (p.weight.shape[0] // a.head_dim for p in (a.q_proj, a.k_proj))
        norms = (a.q_norm.weight.expand(heads, -1), a.k_norm.weight.expand(kv, -1))
        self.qk_norm = torch.cat(norms)


class Decoder:
    """Sequences (b of them) that grow by a few embeddings per step, each at its own place."""

    @torch.no_grad()
    def __init__(self, body: Qwen3Model, prompt: Tensor, length: int, copies: int = 1):
        """Reads prompts (b, p, hidden), each followed by `copies` sequences of at most `length`."""
        c = body.config
        self.heads, self.kv, self.d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.eps, self.norm = c.rms_norm_eps, body.norm.weight
        self.layers = [_Layer(layer) for layer in body.layers]
        self.prompt = self.top = prompt.shape[1]  # top: so much of the cache is in use
        read = body(inputs_embeds=prompt, use_cache=True)
        self.last = read.last_hidden_state[:, -1:].repeat_interleave(copies, 0)
        b, device = len(self.last), prompt.device
        shape = b, self.prompt + length, self.kv, self.d
        self.cache = [(prompt.new_zeros(shape), prompt.new_zeros(shape)) for _ in self.layers]
        for parts, layer in zip(self.cache, read.past_key_values.layers, strict=True):
            for part, x in zip(parts, (layer.keys, layer.values), strict=True):
                part[:, : self.prompt] = x.transpose(1, 2).repeat_interleave(copies, 0)
        self.rows = torch.arange(b, device=device)[:, None]
        positions = torch.arange(self.prompt + length, device=device)[None]
        self.slot = positions.repeat(b, 1)  # where in the cache each place is written
        nothing = self.slot.shape[1]  # a place that no query can see
        self.holds = self.slot.masked_fill(positions >= self.prompt, nothing)  # place, by slot
        half = self.d // 2  # transformers has each angle twice
        self.cos, self.sin = (x[0, :, :half] for x in body.rotary_emb(prompt, positions))

    def arrange(self, place: Tensor, order: list[int]) -> None:
        """Places (b, n) after the prompt will be written in this order of theirs: the cache keeps
        it, so that no step has to read beyond what is written."""
        place = self.prompt + place
        self.slot[self.rows, place[:, order]] = place

    @torch.no_grad()
    def step(self, x: Tensor, place: Tensor) -> Tensor:
        """Inputs (b, m, hidden) at places (b, m) after the prompt → hidden states (b, m, hidden).
        Each sees the places up to its own that are written; a place may be written again."""
        place = self.prompt + place
        slot = self.slot[self.rows, place]
        self.holds[self.rows, slot] = place
        self.top = top = max(self.top, int(slot.max()) + 1)
        seen = (self.holds[:, None, :top] <= place[..., None])[:, None]
        bias = x.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))
        cos, sin = self.cos[place][:, :, None], self.sin[place][:, :, None]
        for i, layer in enumerate(self.layers):
            h = F.linear(self._normalize(x), layer.qkv).unflatten(-1, (-1, self.d))
            qk, v = h.split([self.heads + self.kv, self.kv], 2)
            one, two = (self._normalize(qk) * layer.qk_norm).chunk(2, -1)
            turned = torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
            q, k = turned.split([self.heads, self.kv], 2)
            for part, new in zip(self.cache[i], (k, v), strict=True):
                part[self.rows, slot] = new
            keys, values = (part[:, :top].transpose(1, 2) for part in self.cache[i])
            q, many = q.transpose(1, 2), self.heads > self.kv
            h = F.scaled_dot_product_attention(q, keys, values, bias, enable_gqa=many)
            x = x + F.linear(h.transpose(1, 2).flatten(2), layer.out)
            gate, up = F.linear(self._normalize(x), layer.up).chunk(2, -1)
            x = x + F.linear(F.silu(gate).mul_(up), layer.down)
        self.last = self._normalize(x) * self.norm
        return self.last

    def _normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


def wave(n: int, lag: int) -> list[tuple[list[int], list[int], list[int]]]:
    """How an image of n × n cells is drawn, a row `lag` cells behind the one above it (n: in
    order). For each step: the cells that are drawn; for each of them the cell whose code is its
    input (-1: what stood before the image), at a row's start the latest code of the row above,
    whose last one is not drawn yet; and the rows' last cells, drawn the step before, whose codes
    now take the place of that stand-in."""
    steps = []
    for t in range(n + (n - 1) * lag):
        row = [r for r in range(n) if 0 <= t - r * lag < n]
        drawn = [r * n + t - r * lag for r in row]
        source = [c - 1 if c % n or not c else c - n + lag - 1 for c in drawn]
        ended = [r * n + n - 1 for r in range(n - 1) if t - r * lag == n and lag < n]
        steps.append((drawn, source, ended))
    return steps


class Writer:
    """A batch of chains being written, each token at its place; a chain that has reached an image
    waits for the others. How tokens are chosen is `sampling`'s.

    `ids` (b, n) tokens, `codes` (b, cells) those of the images, `state` and `at` (b,) the grammar's
    state and the place of each chain's next token."""

    @torch.no_grad()
    def __init__(
        self,
        policy: ChainPolicy,
        photos: list[Tensor],
        grammar: LayoutGrammar,
        copies: int,
        lag: int,
    ):
        """`photos`: LR photos (b, 3, 32, 32) or the eye's maps of them, and for guidance what the
        blind reading sees."""
        self.policy, self.grammar, self.lag = policy, grammar, lag
        length, task = grammar.max_length + 1, torch.tensor(policy.vocabulary.prompt[-1:])
        task = policy.get_input_embeddings()(task.to(policy.device))
        self.readings = []
        for lr in photos:
            patches, seen = policy.look(lr)
            prompt = torch.cat([patches, task.expand(len(lr), 1, -1)], 1)
            decoder = Decoder(policy.model, prompt, length, copies)
            self.readings.append((decoder, seen.repeat_interleave(copies, 0)))
        self.rows = self.readings[0][0].rows
        self.state = grammar.start(len(self.rows))
        self.at = torch.zeros_like(self.state)
        self.ids = self.at.new_full((len(self.at), length), policy.vocabulary.ids[PAD])
        self.codes = self.at.new_full((len(self.at), CELLS), -1)
        self.logprobs = torch.zeros(self.ids.shape, device=self.at.device)

    @torch.no_grad()
    def run(self, pick: Pick, uniform: Uniform) -> None:
        """Write to the end. `pick`: masked logits (b·m, v) of each reading, of the codes alone if
        all are in an image, places (b, m), whether in an image (b·m,), numbers (b·m,) in [0, 1) →
        tokens (b, m). `uniform`: which chains (b,) need none, which are in an image, how many each
        → numbers (b, n)."""
        self.pick, self.uniform = pick, uniform
        while not bool((self.state == self.grammar.max_length).all()):
            if bool(self._ready().all()):
                self._image()
            elif forced := int(self.grammar.run[self.state].min()):
                self._forced(forced)
            else:
                self._token()

    def written(self) -> tuple[Tensor, Tensor]:
        """Tokens (b, n), padded, and their log-probabilities under the grammar."""
        n, pad = int(self.at.max()), self.policy.vocabulary.ids[PAD]
        behind = torch.arange(n, device=self.at.device) >= self.at[:, None]
        ids = self.ids[:, :n].masked_fill(behind, pad)
        return ids, self.logprobs[:, :n].masked_fill(ids == pad, 0.0)

    def _ready(self) -> Tensor:
        """Which chains (b,) stand before an image whose rows are drawn together."""
        first = torch.tensor(FIRST_CELL, device=self.at.device)
        return torch.isin(self.grammar.cell[self.state], first) & bool(self.lag)

    def _token(self) -> None:
        """One more token for every chain that does not wait; the others repeat their last one."""
        waits = self._ready() | (self.state == self.grammar.max_length)
        inside = self.grammar.cell[self.state] >= 0
        u = self.uniform(self.grammar.forced[self.state] | waits, inside, 1)
        token = self._take(self.state[:, None], self.at[:, None], u)[:, 0]
        self.state = torch.where(waits, self.state, self.grammar.step(self.state, token))
        self.at = self.at + (~waits).long()
        self._write_last()

    def _forced(self, n: int) -> None:
        """The next n tokens, which are forced in every chain, in one step."""
        ahead = torch.arange(n, device=self.at.device)
        states, places = self.state[:, None] + ahead, self.at[:, None] + ahead
        self.uniform(torch.ones_like(self.state).bool(), self.state < 0, n)  # a number per token
        self.ids[self.rows, places] = self.grammar.allowed(states).int().argmax(-1)
        self.state, self.at = self.state + n, self.at + n
        self._write(self.ids.gather(1, places), places, self.grammar.cell[states + 1])
        for decoder, _ in self.readings:
            decoder.last = decoder.last[:, -1:]

    def _image(self) -> None:
        """The image that all chains stand before, several rows at a time; see `wave`."""
        first = int(self.grammar.cell[self.state[0]])
        n = GRIDS[FIRST_CELL.index(first)]
        everywhere = torch.ones_like(self.state).bool()
        u = self.uniform(~everywhere, everywhere, n * n)
        cells = torch.arange(n * n, device=self.at.device)
        steps = wave(n, min(self.lag, n))
        order = [c - 1 for drawn, _, _ in steps for c in drawn if c] + [n * n - 1]
        for decoder, _ in self.readings:
            decoder.arrange(self.at[:, None] + cells, order)
        for drawn, source, ended in steps:
            if drawn[0] > 0:  # the first code follows from what was written before
                next_ = cells[[*drawn, *(c + 1 for c in ended)]]
                known = self.codes[:, [first + c for c in source + ended]]
                self._write(known, self.at[:, None] - 1 + next_, (first + next_).expand_as(known))
            self._take(
                self.state[:, None] + cells[drawn], self.at[:, None] + cells[drawn], u[:, drawn]
            )
        self.state, self.at = self.state + n * n, self.at + n * n
        self._write_last()

    def _take(self, state: Tensor, place: Tensor, u: Tensor) -> Tensor:
        """Tokens (b, m) for places (b, m) in these states, from the first m of the last logits."""
        cell, v = self.grammar.cell[state], self.policy.vocabulary
        inside = cell >= 0
        first = v.first_code if bool(inside.all()) else 0
        hidden = [decoder.last[:, : state.shape[1]].flatten(0, 1) for decoder, _ in self.readings]
        logits = [self.policy.head(h, first).float() for h in hidden]
        if not first:  # in images every code is allowed
            mask = ~self.grammar.allowed(state).flatten(0, 1)
            logits = [x.masked_fill_(mask, float("-inf")) for x in logits]
        token = self.pick(logits, place, inside.flatten(), u.flatten())
        self.ids[self.rows, place] = token
        logp = logits[0].gather(-1, token.view(-1, 1) - first)[:, 0] - logits[0].logsumexp(-1)
        self.logprobs[self.rows, place] = logp.view_as(token)
        self.codes[self.rows.expand_as(cell)[inside], cell[inside]] = token[inside]
        return token

    def _write_last(self) -> None:
        place = self.at[:, None] - 1
        self._write(self.ids.gather(1, place), place, self.grammar.cell[self.state][:, None])

    def _write(self, token: Tensor, place: Tensor, following: Tensor) -> None:
        """Feed tokens (b, m) at places (b, m); `following` (b, m): the cell that is predicted from
        each (-1: none)."""
        x, here = self.policy.get_input_embeddings()(token), (following >= 0)[..., None]
        for decoder, seen in self.readings:
            if not self.policy.config.aligned or not bool(here.any()):
                decoder.step(x, place)
                continue
            extra = seen[self.rows, following.clamp(min=0)]
            extra = extra + self.policy.previous(self.codes, following)
            decoder.step(x + torch.where(here, extra, 0.0), place)
