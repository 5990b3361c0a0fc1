"""The policy: one causal language model over text, LR codes and image codes; build, save, load, sample.

The body is transformers' Qwen3 at a small size, with input and output embeddings tied. Sampling is ours: chains of a
batch advance together with a KV cache, under the layout grammar, with the settings of PURE (temperature, greedy text,
entropy-dependent top-k and guidance inside images) or, for reinforcement learning, from the bare softmax.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as transformers_logging

from realsr_r1.reader import LRReader
from realsr_r1.tokenizer import VQModel
from realsr_r1.vlcot import DIRECT, EOS, PAD, TAGS, LayoutGrammar, Vocabulary
from realsr_r1.weights import WEIGHTS

transformers_logging.disable_progress_bar()  # loading takes milliseconds


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of the nano policy, and the image sizes (codes per side) of its three steps."""

    hidden: int = 192
    layers: int = 6
    heads: int = 4
    mlp: int = 512
    codes: int = 1024
    lr_codes: int = 1280
    sizes: tuple[int, ...] = (4, 8, 16)
    max_words: int = 24


@dataclass(frozen=True)
class Sampling:
    """How words are chosen. `rollout()` is what a loss sees: temperature 1, nothing else; text sampled too."""

    temperature: float = 1.0
    greedy_text: bool = True
    entropy_top_k: bool = True  # inside images, see `entropy_k`; otherwise `top_k`
    top_k: int = 0  # 0: all
    guidance: float = 1.0  # 1: off; PURE uses 0.8
    image_greedy: bool = False

    @staticmethod
    def rollout() -> "Sampling":
        return Sampling(greedy_text=False, entropy_top_k=False)


def build(config: PolicyConfig = PolicyConfig(), vocabulary: Vocabulary | None = None, seed: int = 0) -> Qwen3ForCausalLM:
    """A new policy with random weights."""
    vocabulary = vocabulary or Vocabulary(config.codes, config.lr_codes)
    torch.manual_seed(seed)
    length = sum(n * (n + 1) + 6 for n in config.sizes) + len(TAGS) * 2 + 4 * config.max_words + 512
    shape = Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=config.hidden, intermediate_size=config.mlp, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.heads, head_dim=config.hidden // config.heads,
        max_position_embeddings=length, tie_word_embeddings=True, pad_token_id=vocabulary.ids[PAD], eos_token_id=vocabulary.ids[EOS], bos_token_id=None,
        initializer_range=0.02, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model = Qwen3ForCausalLM(shape)
    model.nano, model.vocabulary = config, vocabulary
    return model


@torch.no_grad()
def embed_codebooks(model: Qwen3ForCausalLM, tokenizer: VQModel, reader: LRReader, seed: int = 0) -> None:
    """Start the embeddings of codes from the codebooks, randomly projected: codes that look alike start alike."""
    g = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    for first, book in ((model.vocabulary.first_code, tokenizer.quantize.weight), (model.vocabulary.first_lr_code, reader.vectors)):
        vectors = torch.nn.functional.normalize(book, dim=1).cpu()
        projection = torch.randn(vectors.shape[1], table.shape[1], generator=g) * 0.02
        noise = torch.randn(len(vectors), table.shape[1], generator=g) * 0.005
        table[first : first + len(vectors)] = (vectors @ projection + noise).to(table.device, table.dtype)


def save(model: Qwen3ForCausalLM, folder: str | Path) -> None:
    """Write a transformers folder (half precision), with the nano configuration beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.dtype
    model.half().save_pretrained(folder)
    model.to(dtype)
    (folder / "nano.json").write_text(json.dumps(asdict(model.nano)))
    model.vocabulary.tokenizer.save_pretrained(folder)


def load(folder: str | Path = WEIGHTS / "policy-sft", device: str | torch.device = "cpu") -> Qwen3ForCausalLM:
    """A policy written by `save`. One-sentence errors, as in `weights.load`."""
    folder = Path(folder)
    if not (folder / "model.safetensors").exists() or not (folder / "nano.json").exists():
        raise FileNotFoundError(
            f"policy weights are missing in {folder.name}/: train them (python -m realsr_r1 train sft --help) or reinstall"
        )
    try:
        fields = json.loads((folder / "nano.json").read_text())
        config = PolicyConfig(**{**fields, "sizes": tuple(fields["sizes"])})
        model, info = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as e:
        raise ValueError(
            f"policy weights in {folder.name}/ are cut short, damaged or of another configuration: copy or train them again"
        ) from e
    vocabulary = Vocabulary(config.codes, config.lr_codes)
    if info["missing_keys"] or model.config.vocab_size != len(vocabulary):
        raise ValueError(f"policy weights in {folder.name}/ belong to another vocabulary or shape: train them again with this version")
    model.nano, model.vocabulary = config, vocabulary
    return model.to(device).eval()


def grammar_of(model: Qwen3ForCausalLM, direct: bool = False) -> LayoutGrammar:
    """The layout of this policy's completions: the chain, or for the direct variant the final image alone."""
    tags = ("final_image",) if direct else TAGS
    return LayoutGrammar(model.vocabulary, model.nano.sizes, tags, model.nano.max_words).to(model.device)


def entropy_k(logits: Tensor) -> Tensor:
    """PURE's image top-k from the entropy H of (b, v) logits, in nats clamped to 0–10: 1 + 1999·sigmoid(H − 5), (b,) int64."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)
    return (1 + 1999 * torch.sigmoid(entropy.clamp(0, 10) - 5)).round().long()


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Set all but each row's k (b,) largest logits (b, v) to minus infinity."""
    ordered = logits.sort(-1, descending=True).values
    threshold = ordered.gather(-1, (k.clamp(1, logits.shape[-1]) - 1)[:, None])
    return logits.masked_fill(logits < threshold, float("-inf"))


class RoomyLayer(DynamicLayer):
    """A cache layer with room for `length` words from the start: DynamicLayer copies the whole cache at every word."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.room = length, None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = self.get_seq_length(), key_states.shape[-2]
        if self.room is None or self.room[0].shape[0] != key_states.shape[0]:  # at first, or after a repeat of the rows
            b, heads, _, dim = key_states.shape
            self.room = [x.new_empty(b, heads, self.length, dim) for x in (key_states, value_states)]
            for room, x in zip(self.room, (self.keys, self.values), strict=True):
                if held:
                    room[:, :, :held] = x
        for room, x in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, held : held + new] = x
        self.keys, self.values = (room[:, :, : held + new] for room in self.room)
        return self.keys, self.values


def new_cache(model: Qwen3ForCausalLM, length: int) -> Cache:
    """An empty cache for `length` words."""
    return Cache(layers=[RoomyLayer(length) for _ in range(model.config.num_hidden_layers)])


@dataclass
class Sampled:
    """Completions (b, n) padded with the pad word, and of each word its log-probability (b, n): under the softmax over
    the words that the grammar allows, from which it was drawn, and under the bare softmax, which a trainer sees."""

    ids: Tensor
    logprobs: Tensor
    bare: Tensor


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, prompts: Tensor, how: Sampling = Sampling(), generator: torch.Generator | None = None,
           grammar: LayoutGrammar | None = None, use_grammar: bool = True, prefix: Tensor | None = None, max_new: int | None = None,
           copies: int = 1, rows: tuple[int, int] | None = None) -> Sampled:  # fmt: skip
    """Complete prompts (b, p) of equal length, each `copies` times (b·copies completions, those of a prompt adjacent):
    a group reads its shared prompt once. Same generator state, same completions.

    `prefix` (b·copies, n) fixes the first words (an oracle's text, say). `use_grammar=False` lets any word come anywhere,
    which measures whether the form has been learnt. `rows` = (first, total) says that these completions are rows
    first… of a larger batch of `total`, drawn by several processes with equal generators: each gets the same
    completions as one process would. Log-probabilities are at temperature 1.
    """
    if how.temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {how.temperature}: use image_greedy for greedy images")
    device, v = model.device, model.vocabulary
    direct = bool((prompts[:, -1] == v.ids[DIRECT]).all())
    grammar = grammar or grammar_of(model, direct)
    b = len(prompts) * copies
    first, total = rows or (0, b)
    prompts = prompts.to(device)
    cache, state = new_cache(model, prompts.shape[1] + (max_new or grammar.max_length)), grammar.start(b)
    unconditional = None  # the guidance cache: it starts anew at each image
    hidden = model.model(prompts, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    if copies > 1:
        cache.batch_repeat_interleave(copies)
        hidden = hidden.repeat_interleave(copies, 0)
    words, logprobs, bare = [], [], []
    done = torch.zeros(b, dtype=torch.bool, device=device)
    last = hidden_free = None
    start, end = v.ids["<image>"], v.ids["</image>"]
    for i in range(max_new or grammar.max_length):
        logits = model.lm_head(hidden).float()
        mask = grammar.allowed(state) if use_grammar else None
        scores = logits.masked_fill(~mask, float("-inf")) if use_grammar else logits
        image = grammar.is_image[state]
        chosen = scores / how.temperature
        if prefix is not None and i < prefix.shape[1]:
            word = prefix[:, i].to(device)
        else:
            if how.guidance != 1.0 and hidden_free is not None:
                free = (
                    model.lm_head(hidden_free).float().masked_fill(~mask, float("-inf"))
                    if use_grammar
                    else model.lm_head(hidden_free).float()
                )
                mixed = torch.where(torch.isinf(scores), scores, free + how.guidance * (scores - free))
                chosen = torch.where(image[:, None], mixed / how.temperature, chosen)
            if how.entropy_top_k:
                chosen = torch.where(image[:, None], keep_top_k(chosen, entropy_k(chosen)), chosen)
            elif how.top_k:
                chosen = torch.where(image[:, None], keep_top_k(chosen, torch.full((b,), how.top_k, device=device)), chosen)
            shape = (total, chosen.shape[1])
            noise = torch.rand(shape, generator=generator, device=generator.device if generator is not None else device)
            noise = noise[first : first + b].to(device)
            gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
            greedy = image & how.image_greedy | ~image & how.greedy_text
            word = torch.where(greedy, chosen.argmax(-1), (chosen + gumbel).argmax(-1))
        word = torch.where(done, v.ids[PAD], word)
        words.append(word)
        for kept, x in ((logprobs, scores), (bare, logits)):
            kept.append(x.log_softmax(-1).gather(-1, word[:, None])[:, 0].masked_fill(done, 0.0))
        done = done | (word == v.ids[EOS])
        state = grammar.step(state, word)
        if bool(done.all()):
            break
        hidden = model.model(word[:, None], past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        if how.guidance != 1.0:
            # Rows reach their images together when their texts have the same length; a straggler just goes unguided.
            if bool((word == start).all()):
                unconditional, last = new_cache(model, grammar.max_length), None
            if unconditional is not None:
                out = model.model(word[:, None], past_key_values=unconditional, use_cache=True)
                hidden_free = out.last_hidden_state[:, -1]
                if bool((word == end).any()):
                    unconditional = hidden_free = last
    return Sampled(torch.stack(words, 1), torch.stack(logprobs, 1), torch.stack(bare, 1))


def logprobs_of(model: Qwen3ForCausalLM, prompts: Tensor, completions: Tensor, grammar: LayoutGrammar | None = None) -> Tensor:
    """Log-probability (b, n) of each word of given completions (b, n), as a trainer computes it: one forward pass.

    With a grammar the softmax runs over the words it allows (what `sample` draws from); without, over the vocabulary.
    """
    ids = torch.cat([prompts, completions], 1).to(model.device)
    logits = model(ids).logits[:, prompts.shape[1] - 1 : -1].float()
    if grammar is not None:
        state = grammar.start(len(ids))
        for i, word in enumerate(completions.to(model.device).unbind(1)):
            logits[:, i] = logits[:, i].masked_fill(~grammar.allowed(state), float("-inf"))
            state = grammar.step(state, word)
    return logits.log_softmax(-1).gather(-1, completions.to(model.device)[..., None])[..., 0]
