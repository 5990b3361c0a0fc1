"""One word at a time, fast: a Qwen3-shaped body unrolled for sampling in batches.

A small model's step is mostly overhead: many small operators, and a cache that is read once for
every word. Here the weights of each layer are joined (queries, keys and values in one product;
norms multiplied into the next matrix), the cache has its full length from the start, and the chains
of a group attend to one copy of their shared prompt. The numbers are those of transformers' forward
pass up to rounding (a test compares them); with `bfloat16` the products and the cache are in half
precision, which restoration uses and reinforcement learning, whose loss is in float32, does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

LARGEST = 64e6  # parameters: above, joining copies of the weights costs more than it saves


def suits(model: torch.nn.Module) -> bool:
    """Whether `Decoder` can take this model: a plain, small Qwen3 (an adapter or another class goes
    the usual way)."""
    return type(model) is Qwen3ForCausalLM and sum(p.numel() for p in model.parameters()) <= LARGEST


class Layer:
    """One layer's weights, joined. `qk_norm` (heads + key heads, d) scales the normalised queries
    and keys."""

    def __init__(self, layer: torch.nn.Module, dtype: torch.dtype):
        a, m = layer.self_attn, layer.mlp
        before, after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = (torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]) * before).to(
            dtype
        )
        self.up = (torch.cat([m.gate_proj.weight, m.up_proj.weight]) * after).to(dtype)
        self.out, self.down = a.o_proj.weight.to(dtype), m.down_proj.weight.to(dtype)
        heads, kv = (p.weight.shape[0] // a.head_dim for p in (a.q_proj, a.k_proj))
        self.qk_norm = torch.cat(
            [a.q_norm.weight.expand(heads, -1), a.k_norm.weight.expand(kv, -1)]
        )


class Decoder:
    """A batch of sequences that grow by a word a step. Same results as `model.model(…,
    past_key_values=…)`."""

    @torch.no_grad()
    def __init__(
        self,
        model: Qwen3ForCausalLM,
        prompts: Tensor,
        length: int,
        copies: int = 1,
        bfloat16: bool = False,
    ):
        """Reads prompts (b, p), each followed by `copies` sequences of at most `length` further
        words."""
        c, body, self.dtype = model.config, model.model, torch.bfloat16 if bfloat16 else model.dtype
        self.heads, self.kv, self.d, self.eps = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.rms_norm_eps,
        )
        self.layers = [Layer(layer, self.dtype) for layer in body.layers]
        self.embedding = body.embed_tokens.weight
        self.head = (model.lm_head.weight * body.norm.weight).to(self.dtype)
        self.copies, self.prompt, self.at = copies, prompts.shape[1], 0
        device, b = model.device, len(prompts) * copies
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            read = body(prompts.to(device), use_cache=True)
        self.last = (
            (read.last_hidden_state[:, -1] / body.norm.weight).float().repeat_interleave(copies, 0)
        )  # its weight is in the head
        self.shared = [
            tuple(x.to(self.dtype) for x in (layer.keys, layer.values))
            for layer in read.past_key_values.layers
        ]
        room = self.prompt * (copies == 1) + length
        self.cache = [
            tuple(
                torch.empty((b, self.kv, room, self.d), dtype=self.dtype, device=device)
                for _ in "kv"
            )
            for _ in self.layers
        ]
        if copies == 1:
            for own, prompt in zip(self.cache, self.shared, strict=True):
                for x, p in zip(own, prompt, strict=True):
                    x[:, :, : self.prompt] = p
        positions = torch.arange(self.prompt + length, device=device)[None]
        self.cos, self.sin = (x[0] for x in body.rotary_emb(self.embedding, positions))

    def logits(self) -> Tensor:
        """(b, vocabulary), float32: what comes after the words so far."""
        return F.linear(self.last.to(self.dtype), self.head).float()

    @torch.no_grad()
    def step(self, word: Tensor) -> None:
        """Append one word (b,) to each sequence."""
        x, b = self.embedding[word], len(word)
        cos, sin, both = (
            self.cos[self.prompt + self.at],
            self.sin[self.prompt + self.at],
            self.heads + self.kv,
        )
        for i, layer in enumerate(self.layers):
            h = F.linear(self._norm(x), layer.qkv)
            qk, v = h.view(b, -1, self.d).split([both, self.kv], 1)
            qk = F.rms_norm(qk.float(), (self.d,), eps=self.eps) * layer.qk_norm
            qk = (
                qk * cos + torch.cat([-qk[..., self.d // 2 :], qk[..., : self.d // 2]], -1) * sin
            ).to(self.dtype)
            q, k = qk.split([self.heads, self.kv], 1)
            x = x + F.linear(self._attend(i, q, k, v).reshape(b, -1), layer.out)
            gate, up = F.linear(self._norm(x), layer.up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        self.at += 1
        self.last = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(self.dtype)

    def _attend(self, i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention: queries (b, heads, d), the new word's key and value (b, kv, d) →
        (b, heads, d)."""
        keys, values = self.cache[i]
        held = self.at + (self.prompt if self.copies == 1 else 0)
        keys[:, :, held], values[:, :, held] = k, v
        keys, values = keys[:, :, : held + 1], values[:, :, : held + 1]
        if self.copies == 1:
            return F.scaled_dot_product_attention(
                q[:, :, None], keys, values, enable_gqa=self.heads != self.kv
            )[:, :, 0]
        # A group reads its prompt's keys once for all its chains; the softmax runs over the prompt
        # and the chain together.
        b, per, n = len(q), self.heads // self.kv, self.prompt
        prompt_keys, prompt_values = self.shared[i]
        q = q.view(b, self.kv, per, self.d) * self.d**-0.5
        grouped = (
            q.view(-1, self.copies, self.kv, per, self.d).transpose(1, 2).flatten(2, 3)
        )  # (groups, kv, copies·per, d)
        common = (
            (grouped @ prompt_keys.transpose(-1, -2))
            .unflatten(2, (self.copies, per))
            .transpose(1, 2)
            .flatten(0, 1)
        )
        weight = (
            torch.cat([common, q @ keys.transpose(-1, -2)], -1).float().softmax(-1).to(self.dtype)
        )  # (b, kv, per, n + t)
        grouped = (
            weight[..., :n].view(-1, self.copies, self.kv, per, n).transpose(1, 2).flatten(2, 3)
        )
        common = (
            (grouped @ prompt_values).unflatten(2, (self.copies, per)).transpose(1, 2).flatten(0, 1)
        )
        return (common + weight[..., n:] @ values).flatten(1, 2)
