"""Reference-size models: Chameleon-class weights in the hub's format (`nonwhy/PURE`, Lumina-mGPT),
loaded to draw images, too.

Facts and their source: the public code of PURE (`nonwhy/PURE`: item_processor.py, vocab.py,
inference_solver.py, modeling_chameleon.py) and transformers' Chameleon. Which id stands for which
code is written in the checkpoint itself: a token named IMGIMG + the code in letters (A = 0 … J = 9)
+ Z. Three things keep transformers' class from being used as it is:

- its forward pass sets the logits of image tokens to the lowest number, also in `generate`;
- it carries an image encoder with 8,192 codes, while the codes here are LlamaGen's, and PURE's
  training deletes it;
- Lumina-mGPT and PURE store one row of query and key norms for all heads, (1, head dim), where it
  expects one per head.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm

from realsr_r1.common import device_of
from realsr_r1.planning import cost

# Token names, from PURE's vocab.py and item_processor.py, and their ids: <reservedNNNNN> is NNNNN +
# 4 throughout.
BOS, PAD, START, END = "<s>", "<pad>", "<racm3:break>", "<eoss>"
ROW, TURN = "<reserved08799>", "<reserved08706>"
PUBLISHED_IDS = {BOS: 0, PAD: 1, END: 8196, START: 8197, TURN: 8710, ROW: 8803}
# <reserved(8800+n)> means n·32 pixels; PURE's widest picture of 512² pixels is 32 units.
SIZE_UNIT, LARGEST_SIZE = 32, 32
# Ids of the codes: (first code, first id, how many). The second block is PURE's extension from
# Chameleon's 8,192 codes to LlamaGen's 16,384. The blocks are in inference_solver.py. That ids rise
# with codes inside a block is how vocab.py inverts the map (it sorts both sides); it is used only
# for codes that a checkpoint does not name.
CODE_BLOCKS = ((0, 4, 8192), (8192, 65536, 8192))


def size_name(units: int) -> str:
    """The token that says `units`·32 pixels; its published id is 8804 + units."""
    return f"<reserved{8800 + units:05d}>"


def code_name(code: int) -> str:
    """The name of a code's token: IMGIMG, the decimal digits as letters, Z (17 → IMGIMGBHZ)."""
    return "IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(code)) + "Z"


def published_names() -> dict[str, int]:
    """Name → id of all layout tokens and codes, as published: what a checkpoint's own names are
    compared with."""
    names = PUBLISHED_IDS | {size_name(n): 8804 + n for n in range(1, LARGEST_SIZE + 1)}
    return names | {
        code_name(first + i): start + i for first, start, count in CODE_BLOCKS for i in range(count)
    }


@dataclass(eq=False)
class Layout:
    """The vocabulary map: special tokens by name → id, and `code_ids` (codes,), the id of every
    code."""

    names: dict[str, int]
    code_ids: Tensor
    vocab_size: int
    factor: int = 8  # pixels a code, per axis

    @staticmethod
    def of(names: dict[str, int], vocab_size: int) -> "Layout":
        """Read the map off a checkpoint's token names; codes past 8,191 may go unnamed where the
        vocabulary has room for PURE's extension. Raises ValueError if it is another vocabulary."""
        wanted = [*PUBLISHED_IDS, *(size_name(n) for n in range(1, LARGEST_SIZE + 1))]
        absent = [w for w in wanted if w not in names]
        found = {
            int("".join(str(ord(c) - 65) for c in m[1])): i
            for n, i in names.items()
            if (m := re.fullmatch(r"IMGIMG([A-J]+)Z", n))
        }
        first, start, count = CODE_BLOCKS[1]
        if len(found) == first and vocab_size >= start + count:
            found |= {first + i: start + i for i in range(count)}
        if (
            absent
            or not found
            or sorted(found) != list(range(len(found)))
            or max(found.values()) >= vocab_size
        ):
            what = (
                f"lacks {absent[0]}"
                if absent
                else f"names {len(found)} image codes, not all from 0 on"
            )
            raise ValueError(
                f"this checkpoint has another vocabulary (it {what}): take one of Chameleon's, "
                f"such as nonwhy/PURE"
            )
        ids = torch.tensor([found[c] for c in range(len(found))])
        return Layout(
            {w: names[w] for w in wanted}, ids, vocab_size, factor=8 if len(found) > first else 16
        )

    @property
    def codes(self) -> int:
        return len(self.code_ids)

    @property
    def unit(self) -> int:
        """Codes per side and size unit: 4 for LlamaGen's 8 pixels a code, 2 for Chameleon's 16."""
        return SIZE_UNIT // self.factor

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Id of a size token → codes per side."""
        return {self.names[size_name(n)]: n * self.unit for n in range(1, LARGEST_SIZE + 1)}

    @cached_property
    def code_of(self) -> Tensor:
        """(vocabulary,) the code of every id, −1 where it is none."""
        table = torch.full((self.vocab_size,), -1)
        table[self.code_ids] = torch.arange(self.codes)
        return table

    def image_ids(self, codes: Tensor) -> list[int]:
        """Codes (h, w) → h·(w + 1) + 4 ids: start, height, width, rows each closed by a row end,
        end."""
        h, w = codes.shape
        if h % self.unit or w % self.unit or not 0 < max(h, w) <= LARGEST_SIZE * self.unit:
            raise ValueError(
                f"an image of {w}x{h} codes has no size token: sides are multiples of "
                f"{SIZE_UNIT} pixels up to 1024"
            )
        rows = (
            torch.cat([self.code_ids[codes.cpu()], torch.full((h, 1), self.names[ROW])], 1)
            .flatten()
            .tolist()
        )
        sides = [self.names[size_name(n // self.unit)] for n in (h, w)]
        return [self.names[START], *sides, *rows, self.names[END]]


class ImageChameleon(ChameleonForConditionalGeneration):
    """Chameleon whose image tokens can be generated; without the image encoder, so it saves and
    loads the language part (keys as in the hub's checkpoints, less `model.vqmodel.*`).
    `config.qk_norm_rows` is 1 where a checkpoint has one norm for all heads.
    """

    _keys_to_ignore_on_load_unexpected = [r"^model\.vqmodel\."]
    layout: Layout
    words: PreTrainedTokenizerBase

    def __init__(self, config: ChameleonConfig):
        super().__init__(config)
        del self.model.vqmodel
        self.model.vocabulary_mapping.image_tokens = []  # those whose logits are masked
        if rows := getattr(config, "qk_norm_rows", None):
            for layer in self.model.layers:
                a = layer.self_attn
                a.q_norm, a.k_norm = (ChameleonLayerNorm((rows, a.head_dim)) for _ in "qk")


def local_folder(name: str | Path) -> Path:
    """A folder as it is, or the hub's repository of that name through the hub's cache.
    FileNotFoundError if it cannot be had."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(
            snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.model"])
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as e:
        raise FileNotFoundError(
            f"model {name} is neither a folder here nor to be had from the hub: "
            "check the name and the network, allow downloads (--download, HF_HUB_OFFLINE=0), or "
            "give a folder"
        ) from e


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape from the headers of all .safetensors files, without reading a weight."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as f:
                shapes |= {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}
        except (SafetensorError, OSError) as e:
            raise ValueError(
                f"weights {path.name} in {folder.name}/ are cut short or damaged: copy or "
                f"download them again"
            ) from e
    if not shapes:
        raise FileNotFoundError(
            f"no .safetensors weights in {folder.name}/: download the whole repository"
        )
    return shapes


def read_config(folder: Path) -> ChameleonConfig:
    """The configuration, with the norms' rows as stored. Raises ValueError with one sentence for
    another class."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"no config.json in {folder.name}/: give a folder in the hub's format"
        )
    damaged = f"config.json in {folder.name}/ is damaged: download it again"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(damaged) from e
    if kind not in ("chameleon", "chameleon_xllmx"):
        raise ValueError(
            f"{folder.name}/ holds a model of class {kind!r}, not Chameleon: take nonwhy/PURE "
            f"or one tuned from it"
        )
    try:
        config = ChameleonConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, StrictDataclassError) as e:
        raise ValueError(damaged) from e
    stored = _shapes(folder).get("model.layers.0.self_attn.q_norm.weight")
    if stored and stored[0] != config.num_attention_heads:
        if stored[0] != 1:
            raise ValueError(
                f"{folder.name}/ stores query norms in {stored[0]} shards: only one shard, or "
                f"one row a head, can be read"
            )
        config.qk_norm_rows = 1
    return config


def needed_bytes(
    config: ChameleonConfig, bits: int = 16, tokens: int = 10_000, batch: int = 1
) -> int:
    """Memory to generate: weights at `bits` (embeddings and head at 16 at least) and keys and
    values of `tokens`, in 16 bits or 32.

    7B with PURE's vocabulary in bfloat16: 14.2 GB, and 0.5 MB a token. Activations are small beside
    these and left out.
    """
    shape, width = cost.Shape.of(config), max(bits, 16) // 8
    weights = shape.layers * shape.linear * bits // 8 + shape.tables * width
    return weights + 2 * shape.layers * shape.kv * width * tokens * batch


def quantization(bits: int) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration for 4 (NF4) or 8 bits; None for 16 or 32. One sentence where the
    package is absent."""
    if bits not in (4, 8, 16, 32):
        raise ValueError(f"{bits} bits are not offered: choose 4, 8, 16 or 32")
    if bits >= 16:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{bits}-bit weights need the bitsandbytes package: pip install bitsandbytes, or "
            f"take --bits 16"
        )
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load(
    name: str | Path, device: str | None = None, bits: int = 16, batch: int = 1
) -> ImageChameleon:
    """A Chameleon-class checkpoint, from a folder or the hub, with `.layout` and `.words` (its
    tokenizer), in evaluation mode.

    `bits`: 32, 16 (bfloat16), 8 or 4. `batch`: sequences at a time, for the memory check before
    loading. One-sentence errors: FileNotFoundError, ValueError (class, vocabulary, keys),
    RuntimeError (memory).
    """
    quantized, dev = quantization(bits), device_of(device)
    folder = local_folder(name)
    config = read_config(folder)
    words = _words(folder)
    layout = Layout.of((config.vocabulary_map or {}) | words.get_vocab(), config.vocab_size)
    needed, free = needed_bytes(config, bits, batch=batch), cost.free_bytes(dev)
    if needed > free:
        raise RuntimeError(
            f"{folder.name} needs about {needed / 1e9:.1f} GB at {bits} bits and {dev} has "
            f"{free / 1e9:.1f} GB free: take --bits 8 or 4, or a larger device"
        )
    if config.vocabulary_map is None:  # transformers wants one; only its <image> entry is looked up
        config.vocabulary_map = {}
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    model = _weights(folder, config, dtype, quantized, dev)
    model.layout, model.words = layout, words
    return model.eval()


def _words(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; ValueError, in one sentence, where none can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"the tokenizer in {folder.name}/ is missing or damaged: download the whole repository"
        ) from e


def _weights(
    folder: Path,
    config: ChameleonConfig,
    dtype: torch.dtype,
    quantized: BitsAndBytesConfig | None,
    device: torch.device,
) -> ImageChameleon:
    """The model with all its weights; ValueError, in one sentence, where they do not fit."""
    try:
        model, info = ImageChameleon.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=quantized,
            device_map={"": device},
            output_loading_info=True,
            local_files_only=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as e:
        raise ValueError(
            f"weights in {folder.name}/ do not fit their configuration or are damaged: copy or "
            f"download them again"
        ) from e
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"weights in {folder.name}/ lack {len(missing)} tensors, first {missing[0]}: "
            f"download the whole repository"
        )
    return model
