"""One token at a time, fast: the policy's body unrolled for sampling in batches.

A small model's step is mostly overhead: many small operators, and a cache that is read once per
token. Here the weights of each layer are joined (queries, keys and values in one product; norms
multiplied into the next matrix), the cache has its full length from the start, and the chains of a
group attend to one copy of their shared prompt. The numbers are those of transformers' forward
pass up to rounding (a test compares them).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Model


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
    """Sequences that grow by one embedding per step."""

    @torch.no_grad()
    def __init__(self, body: Qwen3Model, prompt: Tensor, length: int, copies: int = 1):
        """Reads prompts (b, p, hidden), each followed by `copies` sequences of at most `length`."""
        c = body.config
        self.heads, self.kv, self.d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.eps, self.norm = c.rms_norm_eps, body.norm.weight
        self.layers = [_Layer(layer) for layer in body.layers]
        self.copies, self.prompt, self.at = copies, prompt.shape[1], 0
        b, device, dtype = len(prompt) * copies, prompt.device, prompt.dtype
        read = body(inputs_embeds=prompt, use_cache=True)
        self.last = read.last_hidden_state[:, -1].repeat_interleave(copies, 0)
        self.shared = [(layer.keys, layer.values) for layer in read.past_key_values.layers]
        shape = (b, self.kv, length, self.d)
        self.cache = [
            tuple(torch.empty(shape, dtype=dtype, device=device) for _ in "kv") for _ in self.layers
        ]
        positions = torch.arange(self.prompt + length, device=device)[None]
        self.cos, self.sin = (x[0] for x in body.rotary_emb(prompt, positions))

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Append one input (b, hidden) to each sequence → hidden state (b, hidden)."""
        place, both = self.prompt + self.at, self.heads + self.kv
        cos, sin = self.cos[place], self.sin[place]
        for i, layer in enumerate(self.layers):
            h = F.linear(self._normalize(x), layer.qkv)
            qk, v = h.view(len(x), -1, self.d).split([both, self.kv], 1)
            qk = self._normalize(qk) * layer.qk_norm
            turned = torch.cat([-qk[..., self.d // 2 :], qk[..., : self.d // 2]], -1)
            q, k = (qk * cos + turned * sin).split([self.heads, self.kv], 1)
            x = x + F.linear(self._attend(i, q, k, v).reshape(len(x), -1), layer.out)
            gate, up = F.linear(self._normalize(x), layer.up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        self.at += 1
        self.last = self._normalize(x) * self.norm
        return self.last

    def _normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _attend(self, i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (b, heads, d), the new token's key and value (b, kv, d) → (b, heads, d).

        A group reads its prompt's keys once for all its sequences; the softmax runs over the prompt
        and the sequence together."""
        keys, values = self.cache[i]
        keys[:, :, self.at], values[:, :, self.at] = k, v
        keys, values = keys[:, :, : self.at + 1], values[:, :, : self.at + 1]
        prompt_keys, prompt_values = self.shared[i]
        b, per, n = len(q), self.heads // self.kv, self.prompt
        q = q.view(b, self.kv, per, self.d) * self.d**-0.5
        common = self._grouped(q) @ prompt_keys.transpose(-1, -2)
        weight = torch.cat([self._single(common, per), q @ keys.transpose(-1, -2)], -1).softmax(-1)
        common = self._grouped(weight[..., :n]) @ prompt_values
        return (self._single(common, per) + weight[..., n:] @ values).flatten(1, 2)

    def _grouped(self, x: Tensor) -> Tensor:
        """(b, kv, per, m) → (groups, kv, copies·per, m)."""
        x = x.reshape(-1, self.copies, *x.shape[1:])
        return x.transpose(1, 2).flatten(2, 3)

    def _single(self, x: Tensor, per: int) -> Tensor:
        """The inverse of `_grouped`."""
        return x.unflatten(2, (self.copies, per)).transpose(1, 2).flatten(0, 1)
