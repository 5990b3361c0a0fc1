"""A middle size: a pretrained small language model (Qwen3-0.6B class) that learns the chain, on one
card of 16 GB.

Between the nano policy, which starts from nothing, and the paper's 7 B: a model that knows English
gets this project's words. Tags, layout words, LR codes and image codes become new rows of its
embedding; caption words that its tokenizer has as one token keep their row, the others start as the
mean of their pieces. What comes out is a policy folder like any other: `sft.train_sft(init=…)`,
`grpo.train_grpo` and `policy.sample` take it, with `lora` to train adapters and the new rows alone.
The image sizes and the LR reading are the nano chain's.
"""

import json
import os
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from realsr_r1.common import device_of
from realsr_r1.first import policy
from realsr_r1.first.grpo import GrpoSettings
from realsr_r1.first.policy import PolicyConfig
from realsr_r1.first.reader import LRReader
from realsr_r1.first.sft import Scale, sharded
from realsr_r1.first.tokenizer import VQModel
from realsr_r1.first.vlcot import EOS, PAD, LayoutGrammar, Vocabulary
from realsr_r1.planning import cost

SOURCE = "Qwen/Qwen3-0.6B"
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What a card of 16 GB holds (`cost.memory`, see `plan`): SFT sees chains one batch at a time, GRPO
# samples two groups of eight.
SFT = {"batch": 4, "lr": 2e-4}
GRPO = GrpoSettings(prompts=2, group=8, micro_batch=4, lr=2e-5)


def pretrained(
    source: str | Path = SOURCE, device: str | torch.device = "cpu"
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """A Qwen3 and its tokenizer from a folder in the hub's format, or by its name from the hub (or
    its local cache).

    Raises FileNotFoundError if there is no such folder and no network, ValueError for another class
    of model or damaged files, RuntimeError if it does not fit into free memory; one sentence each.
    """
    name = str(source)
    try:
        shape = AutoConfig.from_pretrained(source)
    except (OSError, HFValidationError) as e:
        raise FileNotFoundError(
            f"no model {name}: give a folder with config.json, model.safetensors and "
            f"tokenizer.json, or unset HF_HUB_OFFLINE where there is a network"
        ) from e
    except (ValueError, StrictDataclassError) as e:
        raise ValueError(
            f"{name}'s config.json is damaged or of a class that this transformers does not "
            f"know: use a Qwen3 such as {SOURCE}"
        ) from e
    if shape.model_type != "qwen3":
        raise ValueError(
            f"{name} is a {shape.model_type} model: the middle size takes a Qwen3 such as {SOURCE}"
        )
    cost.require(
        4 * cost.Shape.of(shape).parameters, torch.device(device), f"loading {Path(name).name}"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = Qwen3ForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise ValueError(
            f"the files of {name} are incomplete, damaged or do not fit together: download them "
            f"again"
        ) from e
    missing = [
        k for k in info["missing_keys"] if not (shape.tie_word_embeddings and k == "lm_head.weight")
    ]
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights, the first is {missing[0]}: download it again"
        )
    return model.to(device), tokenizer


def known_words(words: list[str], tokenizer: PreTrainedTokenizerBase, base: int) -> dict[str, int]:
    """Word → id for the words that the pretrained tokenizer has as one token within a text (with
    the space before it)."""
    out, taken = {}, set()
    for word in words:
        ids = tokenizer.encode(word if word == "," else f" {word}", add_special_tokens=False)
        if (
            len(ids) == 1
            and ids[0] < base
            and ids[0] not in taken
            and ids[0] != tokenizer.unk_token_id
        ):
            out[word] = ids[0]
            taken.add(ids[0])
    return out


def spoken(word: str) -> str:
    """What a new word means in English, from whose pieces its row starts: "</rough_image>" → " end
    of rough image"."""
    name = word.strip("</>").replace("_", " ")
    return f" end of {name}" if word.startswith("</") else f" {name}"


@torch.no_grad()
def start_rows(
    table: Tensor,
    old: Tensor,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    books: dict[int, Tensor],
    seed: int,
) -> None:
    """Fill the rows of our words in an embedding `table` (v, h) in place, on the scale of the
    pretrained rows `old` (n, h).

    Words: the mean of their pieces. Codes (`books`: first id → vectors (n, d)): the mean row, plus
    the codebook's unit vectors in a random direction each, as far out as pretrained rows lie: codes
    that look alike start alike.
    """
    g = torch.Generator().manual_seed(seed)
    old = old.float().cpu()
    centre, spread = old.mean(0), old.std(0)
    for i in range(vocabulary.base, vocabulary.first_lr_code):
        pieces = tokenizer.encode(spoken(vocabulary.words[i]), add_special_tokens=False)
        noise = (
            0.1 * spread * torch.randn(len(spread), generator=g) * (len(pieces) != 1)
        )  # one piece: the same word
        table[i] = ((old[pieces].mean(0) if pieces else centre) + noise).to(
            table.device, table.dtype
        )
    for first, book in books.items():
        unit = torch.nn.functional.normalize(book.detach().float().cpu(), dim=1)
        rows = centre + unit @ (torch.randn(unit.shape[1], len(spread), generator=g) * spread)
        rows += 0.1 * spread * torch.randn(len(unit), len(spread), generator=g)
        table[first : first + len(unit)] = rows.to(table.device, table.dtype)


def extend(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    vq: VQModel,
    reader: LRReader,
    like: PolicyConfig = PolicyConfig(),
    keep: bool = True,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """Give a pretrained model this project's words, in place: it has `.nano` and `.vocabulary`
    afterwards, as `policy.build`'s.

    Image sizes and text length are those of `like`. `keep=False` drops the pretrained vocabulary
    but for the words in use: the captions need 153 of its 151,936, and tables, logits and their
    gradients shrink sixtyfold.
    """
    c, base = model.config, model.config.vocab_size if keep else 0
    words = Vocabulary(vq.config.codes, reader.vocabulary).text
    nano = PolicyConfig(
        c.hidden_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.intermediate_size,
        vq.config.codes,
        reader.vocabulary,
        like.sizes,
        like.max_words,
        base,
        known_words(words, tokenizer, base),
    )
    vocabulary = nano.vocabulary
    books = {vocabulary.first_code: vq.quantize.weight, vocabulary.first_lr_code: reader.vectors}
    tables = [model.get_input_embeddings(), model.get_output_embeddings()][
        : 1 if c.tie_word_embeddings else 2
    ]
    olds = [t.weight.detach().clone() for t in tables]
    model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()][: len(olds)]
    for table, old in zip(tables, olds, strict=True):
        start_rows(table.weight, old, vocabulary, tokenizer, books, seed)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id, config.bos_token_id = (
            vocabulary.ids[PAD],
            vocabulary.ids[EOS],
            None,
        )
    model.nano, model.vocabulary = nano, vocabulary
    return model


def start(
    source: str | Path,
    out: str | Path,
    vq: VQModel,
    reader: LRReader,
    keep: bool = True,
    seed: int = 0,
) -> Path:
    """A policy folder `out` from pretrained weights, ready for `sft.train_sft(init=out)`; a
    finished one is kept."""
    out = Path(out)
    if not ((out / "model.safetensors").exists() and (out / "nano.json").exists()):
        policy.save(extend(*pretrained(source), vq, reader, keep=keep, seed=seed), out)
    return out


def lora(vocabulary: Vocabulary, rank: int = 16, tied: bool = True) -> LoraConfig:
    """Adapters on all matrices of all layers, and the rows of our own words trained in full.
    Pretrained rows stay."""
    rows = list(range(vocabulary.base, len(vocabulary)))
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=list(ADAPTED),
        trainable_token_indices={"embed_tokens": rows}
        if tied
        else {"embed_tokens": rows, "lm_head": rows},
    )


def scale(
    vocabulary: Vocabulary,
    full: bool = False,
    rank: int = 16,
    device: str | torch.device = "cpu",
    tied: bool = True,
) -> Scale:
    """How a middle-size policy trains on 16 GB: LoRA on bfloat16 weights (float32 on a CPU), or all
    weights in float32 under bfloat16 autocast; with checkpointing on an accelerator, where memory
    is short and operations are cheap."""
    gpu = torch.device(device).type == "cuda"
    if full:
        return Scale(checkpointing=gpu, optimizer="adamw_torch")
    return Scale(
        lora(vocabulary, rank, tied), torch.bfloat16 if gpu else torch.float32, checkpointing=gpu
    )


def config_of(folder: str | Path) -> PolicyConfig:
    """What `policy.save` wrote beside the weights. FileNotFoundError if there is no policy."""
    try:
        fields = json.loads((Path(folder) / "nano.json").read_text())
    except OSError as e:
        raise FileNotFoundError(
            f"no policy in {Path(folder).name}/: train it first (python -m realsr_r1.first "
            f"train sft --size middle --help)"
        ) from e
    return PolicyConfig(**{**fields, "sizes": tuple(fields["sizes"])})


def plan(
    folder: str | Path,
    phase: str,
    how: Scale,
    batch: int = 4,
    settings: GrpoSettings = GRPO,
    gpu: bool = True,
) -> cost.Memory:
    """Memory of `sft.train_sft` or `grpo.train_grpo` from the policy in `folder` with these
    settings, as `cost` counts it."""
    config, rank = config_of(folder), how.lora.r if how.lora else 0
    v = config.vocabulary
    shape = cost.Shape.of(AutoConfig.from_pretrained(folder))
    completion = LayoutGrammar(v, config.sizes, max_words=config.max_words).max_length
    run = cost.Run(
        phase,
        cost.chain_tokens(8 * config.sizes[-1])[0],
        completion,
        batch,
        prompts=settings.prompts,
        group=settings.group,
        lora=rank,
        precision="bfloat16"
        if how.dtype == torch.bfloat16
        else "mixed"
        if gpu and not rank and phase == "sft"
        else "float32",
        new_rows=(len(v) - v.base) * bool(rank),
        checkpointing=how.checkpointing,
        reference=settings.beta > 0,
        triton=gpu,
        accumulate=settings.prompts * settings.group // batch
        if phase == "grpo"
        else how.accumulate,
        sharded=sharded(),
        devices=int(os.environ.get("WORLD_SIZE", "1")),
    )
    return cost.memory(shape, run)


def prepare(
    folder: str | Path,
    phase: str,
    full: bool = False,
    device: str | None = None,
    batch: int = 4,
    settings: GrpoSettings = GRPO,
) -> Scale:
    """The scale for a run on this device; RuntimeError with one sentence, before anything is
    loaded, if it cannot fit."""
    dev = device_of(device)
    how = scale(config_of(folder).vocabulary, full, device=dev)
    need = plan(folder, phase, how, batch, settings, dev.type == "cuda")
    cost.require(
        need.peak,
        dev,
        f"{phase} of {'all weights' if full else 'LoRA adapters'} with {batch} chains a pass",
    )
    return how
