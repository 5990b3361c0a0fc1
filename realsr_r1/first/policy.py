"""The policy: one causal language model over text, LR codes and image codes; build, save, load,
sample.

The body is transformers' Qwen3 at a small size, with input and output embeddings tied. Sampling is
ours: chains of a batch advance together with a KV cache, under the layout grammar, with the
settings of PURE (temperature, greedy text, entropy-dependent top-k and guidance inside images) or,
for reinforcement learning, from the bare softmax.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from realsr_r1.first.decoding import Decoder, suits
from realsr_r1.first.reader import LRReader
from realsr_r1.first.tokenizer import VQModel
from realsr_r1.first.vlcot import DIRECT, EOS, PAD, TAGS, LayoutGrammar, Vocabulary
from realsr_r1.first.weights import WEIGHTS

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
    # ids of a pretrained vocabulary in front of ours, and our words that it has (see `Vocabulary`,
    # `middle`)
    base: int = 0
    known: dict[str, int] = field(default_factory=dict)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.codes, self.lr_codes, base=self.base, known=self.known)


@dataclass(frozen=True)
class Sampling:
    """How words are chosen. `rollout()` is what a loss sees: temperature 1, nothing else; text
    sampled too."""

    temperature: float = 1.0
    greedy_text: bool = True
    entropy_top_k: bool = True  # inside images, see `entropy_k`; otherwise `top_k`
    top_k: int = 0  # 0: all
    guidance: float = 1.0  # 1: off; PURE uses 0.8
    image_greedy: bool = False

    @staticmethod
    def rollout() -> "Sampling":
        return Sampling(greedy_text=False, entropy_top_k=False)


def build(
    config: PolicyConfig = PolicyConfig(), vocabulary: Vocabulary | None = None, seed: int = 0
) -> Qwen3ForCausalLM:
    """A new policy with random weights."""
    vocabulary = vocabulary or config.vocabulary
    torch.manual_seed(seed)
    length = sum(n * (n + 1) + 6 for n in config.sizes) + len(TAGS) * 2 + 4 * config.max_words + 512
    shape = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=config.hidden,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden // config.heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        pad_token_id=vocabulary.ids[PAD],
        eos_token_id=vocabulary.ids[EOS],
        bos_token_id=None,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    model = Qwen3ForCausalLM(shape)
    model.nano, model.vocabulary = config, vocabulary
    return model


@torch.no_grad()
def embed_codebooks(
    model: Qwen3ForCausalLM, tokenizer: VQModel, reader: LRReader, seed: int = 0
) -> None:
    """Start the embeddings of codes from the codebooks, randomly projected: codes that look alike
    start alike."""
    g = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    for first, book in (
        (model.vocabulary.first_code, tokenizer.quantize.weight),
        (model.vocabulary.first_lr_code, reader.vectors),
    ):
        vectors = torch.nn.functional.normalize(book, dim=1).cpu()
        projection = torch.randn(vectors.shape[1], table.shape[1], generator=g) * 0.02
        noise = torch.randn(len(vectors), table.shape[1], generator=g) * 0.005
        table[first : first + len(vectors)] = (vectors @ projection + noise).to(
            table.device, table.dtype
        )


def save(model: Qwen3ForCausalLM, folder: str | Path) -> None:
    """Write a transformers folder (half precision), with the nano configuration beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.dtype
    model.half().save_pretrained(folder)
    model.to(dtype)
    (folder / "nano.json").write_text(json.dumps(asdict(model.nano)))
    model.vocabulary.tokenizer.save_pretrained(folder)


def load(
    folder: str | Path = WEIGHTS / "policy-sft",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Qwen3ForCausalLM:
    """A policy written by `save`. One-sentence errors, as in `weights.load`."""
    folder = Path(folder)
    if not (folder / "model.safetensors").exists() or not (folder / "nano.json").exists():
        raise FileNotFoundError(
            f"policy weights are missing in {folder.name}/: train them (python -m "
            f"realsr_r1.first train sft --help) or reinstall"
        )
    try:
        fields = json.loads((folder / "nano.json").read_text())
        config = PolicyConfig(**{**fields, "sizes": tuple(fields["sizes"])})
        model, info = Qwen3ForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as e:
        raise ValueError(
            f"policy weights in {folder.name}/ are cut short, damaged or of another "
            f"configuration: copy or train them again"
        ) from e
    vocabulary = config.vocabulary
    if info["missing_keys"] or model.config.vocab_size != len(vocabulary):
        raise ValueError(
            f"policy weights in {folder.name}/ belong to another vocabulary or shape: train "
            f"them again with this version"
        )
    model.nano, model.vocabulary = config, vocabulary
    return model.to(device).eval()


def blend(first: str | Path, second: str | Path, share: float, out: str | Path) -> None:
    """Write to `out` the weights (1 - share) · first + share · second: between a policy and what
    was fine-tuned from it there is often one that has most of the gain and little of the loss
    (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903). Raises ValueError for a share outside [0, 1]
    or policies of different shapes, and what `load` raises."""
    if not 0 <= share <= 1:
        raise ValueError(
            f"a blend of {share} is not between 0 (the first policy) and 1 (the second)"
        )
    model, other = load(first), load(second).state_dict()
    if any(other[k].shape != p.shape for k, p in model.state_dict().items()):
        raise ValueError(
            f"{Path(first).name} and {Path(second).name} have different shapes: only policies "
            f"of one configuration can be blended"
        )
    model.load_state_dict(
        {
            k: torch.lerp(p, other[k], share) if p.is_floating_point() else p
            for k, p in model.state_dict().items()
        }
    )
    save(model, out)


def grammar_of(
    model: Qwen3ForCausalLM, direct: bool = False, tags: tuple[str, ...] | None = None
) -> LayoutGrammar:
    """The layout of this policy's completions: the chain, for the direct variant the final image
    alone, or these parts."""
    tags = tags or (("final_image",) if direct else TAGS)
    return LayoutGrammar(model.vocabulary, model.nano.sizes, tags, model.nano.max_words).to(
        model.device
    )


def entropy_k(logits: Tensor) -> Tensor:
    """PURE's image top-k from the entropy H of (b, v) logits, in nats clamped to 0–10: 1 +
    1999·sigmoid(H − 5), (b,) int64."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)
    return (1 + 1999 * torch.sigmoid(entropy.clamp(0, 10) - 5)).round().long()


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Set all but each row's k (b,) largest logits (b, v) to minus infinity."""
    ordered = logits.sort(-1, descending=True).values
    threshold = ordered.gather(-1, (k.clamp(1, logits.shape[-1]) - 1)[:, None])
    return logits.masked_fill(logits < threshold, float("-inf"))


class PlainDecoder:
    """`decoding.Decoder`'s interface on transformers' own forward pass and cache: any causal
    language model with a head."""

    def __init__(self, model: PreTrainedModel, prompts: Tensor, copies: int = 1):
        self.model, self.cache = model, DynamicCache()
        out = model(prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last = out.logits[:, -1]
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
            self.last = self.last.repeat_interleave(copies, 0)

    def logits(self) -> Tensor:
        return self.last.float()

    def step(self, word: Tensor) -> None:
        self.last = self.model(word[:, None], past_key_values=self.cache, use_cache=True).logits[
            :, -1
        ]


def decoder_of(
    model: PreTrainedModel, prompts: Tensor, length: int, copies: int = 1, bfloat16: bool = False
) -> Decoder | PlainDecoder:
    """The fast decoder where the model allows it, else the plain one, with the
    prompts (b, p) read."""
    return (
        Decoder(model, prompts, length, copies, bfloat16)
        if suits(model)
        else PlainDecoder(model, prompts, copies)
    )


def draw(scores: Tensor, u: Tensor) -> Tensor:
    """Words (b,) drawn from the softmax of scores (b, v) with uniform numbers u (b,) in [0, 1), by
    inverting the distribution."""
    mass = scores.softmax(-1).cumsum(-1)
    # A word without probability has its predecessor's sum, so it is never the first to exceed the
    # target.
    return (mass <= (u * mass[:, -1])[:, None]).sum(-1)


@dataclass
class Sampled:
    """Completions (b, n) padded with the pad word, and of each word its log-probability (b, n):
    under the softmax over the words that the grammar allows, from which it was drawn, and under the
    bare softmax, which a trainer sees."""

    ids: Tensor
    logprobs: Tensor
    bare: Tensor


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM,
    prompts: Tensor,
    how: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    grammar: LayoutGrammar | None = None,
    use_grammar: bool = True,
    prefix: Tensor | None = None,
    max_new: int | None = None,
    copies: int = 1,
    rows: tuple[int, int] | None = None,
    bfloat16: bool = False,
) -> Sampled:
    """Complete prompts (b, p) of equal length, each `copies` times (b·copies completions, those of
    a prompt adjacent): a group reads its shared prompt once. Same generator state, same
    completions.

    `prefix` (b·copies, n) fixes the first words (an oracle's text, say). `use_grammar=False` lets
    any word come anywhere, which measures whether the form has been learnt. `rows` = (first, total)
    says that these completions are rows first… of a larger batch of `total`, drawn by several
    processes with equal generators: each gets the same completions as one process would.
    Log-probabilities are at temperature 1. `bfloat16`: faster, and rounded (see `decoding`).
    """
    if how.temperature <= 0:
        raise ValueError(
            f"temperature must be above 0, got {how.temperature}: use image_greedy for greedy "
            f"images"
        )
    device, v = model.device, model.vocabulary
    direct = bool((prompts[:, -1] == v.ids[DIRECT]).all())
    grammar = grammar or grammar_of(model, direct)
    b, length = len(prompts) * copies, max_new or grammar.max_length
    first, total = rows or (0, b)
    decoder, state = (
        decoder_of(model, prompts.to(device), length, copies, bfloat16),
        grammar.start(b),
    )
    free = None  # guidance's second reading, without the prompt: it starts anew at each image
    words, logprobs, bare = [], [], []
    done = torch.zeros(b, dtype=torch.bool, device=device)
    start, end, codes = (
        v.ids["<image>"],
        v.ids["</image>"],
        slice(v.first_code, v.first_code + v.codes),
    )
    for i in range(length):
        logits = decoder.logits()
        mask = grammar.allowed(state) if use_grammar else torch.ones_like(logits, dtype=torch.bool)
        scores = logits.masked_fill(~mask, float("-inf"))
        if prefix is not None and i < prefix.shape[1]:
            word = prefix[:, i].to(device)
        else:
            image, chosen = grammar.is_image[state], scores
            if free is not None:
                other = free.logits().masked_fill(~mask, float("-inf"))
                chosen = torch.where(
                    image[:, None] & mask, other + how.guidance * (scores - other), scores
                )
            chosen = chosen / how.temperature
            if (how.entropy_top_k or how.top_k) and bool(image.any()):
                columns = (
                    codes if use_grammar else slice(None)
                )  # under the grammar nothing but codes is possible there
                some = chosen[image, columns]
                k = (
                    entropy_k(some)
                    if how.entropy_top_k
                    else torch.full((len(some),), how.top_k, device=device)
                )
                chosen[image, columns] = keep_top_k(some, k)
            u = torch.rand(
                total,
                generator=generator,
                device=generator.device if generator is not None else device,
            )
            greedy = image & how.image_greedy | ~image & how.greedy_text
            word = torch.where(
                greedy, chosen.argmax(-1), draw(chosen, u[first : first + b].to(device))
            )
        word = torch.where(done, v.ids[PAD], word)
        words.append(word)
        for kept, x in ((logprobs, scores), (bare, logits)):
            kept.append(x.log_softmax(-1).gather(-1, word[:, None])[:, 0].masked_fill(done, 0.0))
        done = done | (word == v.ids[EOS])
        state = grammar.step(state, word)
        if bool(done.all()) or i + 1 == length:
            break
        decoder.step(word)
        if how.guidance != 1.0:
            # Rows reach their images together when their texts have the same length; a straggler
            # just goes unguided.
            if bool((word == start).all()):
                free = decoder_of(model, word[:, None], length, 1, bfloat16)
            elif free is not None:
                free = None if bool((word == end).any()) else free
                if free is not None:
                    free.step(word)
    return Sampled(torch.stack(words, 1), torch.stack(logprobs, 1), torch.stack(bare, 1))


def logprobs_of(
    model: Qwen3ForCausalLM,
    prompts: Tensor,
    completions: Tensor,
    grammar: LayoutGrammar | None = None,
) -> Tensor:
    """Log-probability (b, n) of each word of given completions (b, n), as a trainer computes it:
    one forward pass.

    With a grammar the softmax runs over the words it allows (what `sample` draws from); without,
    over the vocabulary.
    """
    ids = torch.cat([prompts, completions], 1).to(model.device)
    logits = model(ids).logits[:, prompts.shape[1] - 1 : -1].float()
    if grammar is not None:
        state = grammar.start(len(ids))
        for i, word in enumerate(completions.to(model.device).unbind(1)):
            logits[:, i] = logits[:, i].masked_fill(~grammar.allowed(state), float("-inf"))
            state = grammar.step(state, word)
    return logits.log_softmax(-1).gather(-1, completions.to(model.device)[..., None])[..., 0]
