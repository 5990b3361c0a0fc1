"""The vision-language chain of thought: its parts, its text and its tokens.

A chain reads (RealSR-R1, Fig. 2): degradation → rough understanding, rough image → middle
understanding, middle image → final understanding, final image (the answer), each in its own pair of
tags. An image is a sequence of ordinary vocabulary tokens: start, the codes row by row, end.
Simplification: PURE's tokens for height, width and the end of a row are left out, because a nano
policy's images are squares of known size; the reference policy keeps them.
"""

import math
import re
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from realsr_r1 import degradation, photographs

STEPS = ("rough", "middle", "final")
TAGS = ("degradation", *(f"{s}_{kind}" for s in STEPS for kind in ("understand", "image")))
IMAGE_TAGS = tuple(t for t in TAGS if t.endswith("image"))
TEXT_TAGS = tuple(t for t in TAGS if t not in IMAGE_TAGS)
GRIDS = (4, 8, 16)  # codes per side of the three images
PATCH_TOKENS = 64  # placeholders in the prompt that the eye's patches replace
PAD, EOS, LR, RESTORE, START, END = "<pad>", "<eos>", "<lr>", "<restore>", "<image>", "</image>"


@dataclass
class Chain:
    """The seven parts. Images are codes (h, w), int64; a part is None where it is lacking."""

    degradation: str | None = None
    rough_understand: str | None = None
    rough_image: Tensor | None = None
    middle_understand: str | None = None
    middle_image: Tensor | None = None
    final_understand: str | None = None
    final_image: Tensor | None = None

    @property
    def labels(self) -> dict[str, str]:
        """The five labels that the degradation sentence names; what it does not name is absent."""
        return degradation.from_words(self.degradation or "")

    @property
    def complete(self) -> bool:
        return all(getattr(self, f.name) is not None for f in fields(self))


def image_length(grid: int) -> int:
    """Tokens of an image of grid × grid codes."""
    return grid * grid + 2


def image_tokens(codes: Tensor) -> str:
    """Codes (n, n) → "<image> <c17> … </image>"."""
    return " ".join([START, *(f"<c{c}>" for c in codes.flatten().tolist()), END])


def parse_image(text: str) -> Tensor | None:
    """Read a square image back; None unless it is laid out exactly as `image_tokens` does."""
    tokens = text.split()
    side = math.isqrt(max(0, len(tokens) - 2))
    found = [re.fullmatch(r"<c(\d{1,9})>", t) for t in tokens[1:-1]]
    whole = side > 0 and len(tokens) == image_length(side) and all(found)
    if not whole or (tokens[0], tokens[-1]) != (START, END):
        return None
    return torch.tensor([int(m[1]) for m in found]).view(side, side)


def render(chain: Chain, tags: tuple[str, ...] = TAGS) -> str:
    """The parts of `tags` as the completion's text, each in its tags; ValueError without one."""
    parts = []
    for tag in tags:
        value = getattr(chain, tag)
        if value is None:
            raise ValueError(f"the chain lacks its {tag}: leave it out of `tags`")
        text = image_tokens(value) if tag in IMAGE_TAGS else value.replace(",", " ,")
        parts += [f"<{tag}>", text, f"</{tag}>"]
    return " ".join(" ".join(parts).split())


_ANY_TAG = rf"</?(?:{'|'.join(TAGS)})>"


def _part(tag: str) -> str:
    return rf"<{tag}>((?:(?!{_ANY_TAG}).)+)</{tag}>"


def parse(text: str) -> Chain:
    """Completion text → Chain. Never raises: a part missing, repeated or malformed is None."""
    chain = Chain()
    for tag in TAGS:
        found = re.findall(_part(tag), text, re.DOTALL)
        if len(found) != 1 or text.count(f"<{tag}>") != 1:
            continue
        words = " ".join(found[0].split()).replace(" ,", ",")
        setattr(chain, tag, parse_image(found[0]) if tag in IMAGE_TAGS else words or None)
    return chain


_FORMAT = re.compile(r"\s*" + r"\s*".join(_part(t) for t in TAGS) + r"\s*", re.DOTALL)


def well_formed(text: str) -> bool:
    """True if the whole text is the seven parts in order, each once and non-empty, with images laid
    out right and nothing before, between or after (the paper's format criterion)."""
    return _FORMAT.fullmatch(text) is not None and parse(text).complete


class Vocabulary:
    """Tokens ↔ ids of the policy: prompt tokens, tags, caption words, image codes."""

    def __init__(self, codes: int = 2048, words: list[str] | None = None):
        named = {*degradation.LEVELS, *degradation.RESIZES, "blur", "noise", "compression", ","}
        self.text = sorted(named | set(words or photographs.vocabulary()))
        tags = [w for t in TAGS for w in (f"<{t}>", f"</{t}>")]
        own = [PAD, EOS, LR, RESTORE, START, END, *tags, *self.text]
        self.tokens = [*own, *(f"<c{i}>" for i in range(codes))]
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        self.codes, self.first_code = codes, len(own)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> list[int]:
        """Token ids of every prompt: placeholders for the LR photo, then the task."""
        return [self.ids[LR]] * PATCH_TOKENS + [self.ids[RESTORE]]

    def encode(self, text: str) -> list[int]:
        """Raises ValueError naming the first token that is not in the vocabulary."""
        try:
            return [self.ids[t] for t in text.split()]
        except KeyError as e:
            raise ValueError(f"{e} is not in the policy's vocabulary: use its caption words") from e

    def decode(self, ids: Tensor | list[int]) -> str:
        """Ids → text; padding and the end token are left out."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return " ".join(self.tokens[i] for i in ids if self.tokens[i] not in (PAD, EOS))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The same tokens for transformers and TRL. Codes are ordinary tokens on purpose: TRL
        decodes completions with skip_special_tokens=True, which would drop special ones."""
        inner = Tokenizer(models.WordLevel(self.ids, unk_token=PAD))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token=PAD, eos_token=EOS, padding_side="left"
        )
