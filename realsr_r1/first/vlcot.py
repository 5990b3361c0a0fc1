"""The vision-language chain of thought: its parts, its text, its tokens, and the grammar of its
layout.

A chain reads (RealSR-R1, Fig. 2): degradation → rough understanding, rough image → middle
understanding, middle image → final understanding, final image (the answer), each in its own pair of
tags. Images are sequences of ordinary vocabulary words, laid out as in Lumina-mGPT and PURE: start,
height and width, rows of codes each closed by a row end, end.
"""

import re
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from realsr_r1.first import degradation, scenes

TAGS = (
    "degradation",
    "rough_understand",
    "rough_image",
    "middle_understand",
    "middle_image",
    "final_understand",
    "final_image",
)
IMAGE_TAGS = tuple(t for t in TAGS if t.endswith("image"))
TEXT_TAGS = tuple(t for t in TAGS if t not in IMAGE_TAGS)
# The instruction of a reference-size prompt, in our words (the paper's asks for the same three
# things).
PROMPT = (
    "Perceive how this photo was degraded, understand what it shows, and restore it step by "
    "step from coarse to fine."
)
START, END, ROW = "<image>", "</image>", "<row>"
CHAIN, DIRECT = "<restore>", "<direct>"  # the nano prompt's task word, in place of the sentence
PAD, EOS = "<pad>", "<eos>"


@dataclass
class Chain:
    """The seven parts. Images are codes (h, w), int64; a part is None where a parsed completion
    lacks it."""

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


def image_words(codes: Tensor, prefix: str = "c") -> str:
    """Codes (h, w) → "<image> <n4> <n4> <c17> … <row> … </image>": h·(w + 1) + 4 words."""
    rows = [" ".join(f"<{prefix}{c}>" for c in row) + f" {ROW}" for row in codes.tolist()]
    return " ".join([START, f"<n{codes.shape[0]}>", f"<n{codes.shape[1]}>", *rows, END])


def parse_image(text: str, prefix: str = "c") -> Tensor | None:
    """Read an image back; None unless it is laid out exactly as `image_words` does."""
    words = text.split()
    if len(words) < 6 or words[0] != START or words[-1] != END:
        return None
    size = [re.fullmatch(r"<n([1-9]\d{0,3})>", w) for w in words[1:3]]
    if not all(size):
        return None
    h, w = (int(m[1]) for m in size)
    body = words[3:-1]
    if len(body) != h * (w + 1):
        return None
    codes = [
        [re.fullmatch(rf"<{prefix}(\d{{1,9}})>", x) for x in body[r * (w + 1) : r * (w + 1) + w]]
        for r in range(h)
    ]
    if any(body[r * (w + 1) + w] != ROW for r in range(h)) or not all(
        m for row in codes for m in row
    ):
        return None
    return torch.tensor([[int(m[1]) for m in row] for row in codes])


def render(chain: Chain) -> str:
    """A complete chain as the completion's text: every part in its tags, in the order of TAGS."""
    parts = []
    for tag in TAGS:
        value = getattr(chain, tag)
        parts += [
            f"<{tag}>",
            image_words(value) if tag in IMAGE_TAGS else value.replace(",", " ,"),
            f"</{tag}>",
        ]
    return " ".join(" ".join(parts).split())


def parse(text: str) -> Chain:
    """Completion text → Chain. Never raises: a part that is missing, repeated, empty or malformed
    is None."""
    chain = Chain()
    for tag in TAGS:
        found = re.findall(rf"<{tag}>((?:(?!</?(?:{'|'.join(TAGS)})>).)*)</{tag}>", text, re.DOTALL)
        if len(found) == 1:
            setattr(
                chain,
                tag,
                parse_image(found[0])
                if tag in IMAGE_TAGS
                else " ".join(found[0].split()).replace(" ,", ",") or None,
            )
    return chain


_FORMAT = re.compile(
    r"\s*"
    + r"\s*".join(rf"<{t}>((?:(?!</?(?:{'|'.join(TAGS)})>).)+)</{t}>" for t in TAGS)
    + r"\s*",
    re.DOTALL,
)


def well_formed(text: str) -> bool:
    """True if the whole text is the seven tags in order, each once and non-empty, with images laid
    out right and nothing before, between or after (the paper's format criterion)."""
    match = _FORMAT.fullmatch(text)
    return match is not None and parse(text).complete


class Vocabulary:
    """Words ↔ ids of the policy: task words, tags, layout words, caption words, LR codes, image
    codes.

    `base` puts them behind that many ids of a pretrained model's own vocabulary; `known` gives
    caption words that it has as one token (word → its id), which keep that id (see `middle`). The
    other old ids stay, as words no text contains.
    """

    def __init__(
        self,
        codes: int = 1024,
        lr_codes: int = 1280,
        words: list[str] | None = None,
        base: int = 0,
        known: dict[str, int] | None = None,
    ):
        text = sorted(
            set(words or scenes.vocabulary())
            | set(degradation.LEVELS)
            | set(degradation.RESIZES)
            | {"blur", "noise", "compression", ","}
        )
        tags = [w for t in TAGS for w in (f"<{t}>", f"</{t}>")]
        layout = [START, END, ROW, *(f"<n{n}>" for n in range(1, 18))]
        own = {i: w for w, i in (known or {}).items()}
        new = [
            PAD,
            EOS,
            CHAIN,
            DIRECT,
            *tags,
            *layout,
            *text,
            *(f"<l{i}>" for i in range(lr_codes)),
            *(f"<c{i}>" for i in range(codes)),
        ]
        self.words = [own.get(i, f"<old{i}>") for i in range(base)] + [
            w for w in new if w not in (known or {})
        ]
        self.ids = {w: i for i, w in enumerate(self.words)}
        self.text, self.base = text, base
        self.codes, self.lr_codes = codes, lr_codes
        self.first_code, self.first_lr_code = self.ids["<c0>"], self.ids["<l0>"]
        self.silent = {self.ids[PAD], self.ids[EOS]}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError naming the first word that is not in the vocabulary."""
        try:
            return [self.ids[w] for w in text.split()]
        except KeyError as e:
            raise ValueError(
                f"word {e} is not in the policy's vocabulary: captions must use scenes.vocabulary()"
            ) from e

    def decode(self, ids: Tensor | list[int]) -> str:
        """Ids → words; padding and the end word are left out."""
        return " ".join(
            self.words[i]
            for i in (ids.tolist() if isinstance(ids, Tensor) else ids)
            if i not in self.silent
        )

    def image_ids(self, codes: Tensor, lr: bool = False) -> Tensor:
        """A batch of images (b, h, w) → token ids (b, h·(w + 1) + 4), laid out as `image_words`,
        without any loop over it."""
        b, h, w = codes.shape
        row = torch.full((b, h, 1), self.ids[ROW])
        body = torch.cat(
            [codes.cpu() + (self.first_lr_code if lr else self.first_code), row], 2
        ).flatten(1)
        head = torch.tensor([self.ids[START], self.ids[f"<n{h}>"], self.ids[f"<n{w}>"]]).expand(
            b, 3
        )
        return torch.cat([head, body, torch.full((b, 1), self.ids[END])], 1)

    def prompts(self, lr_codes: Tensor, task: str = CHAIN) -> Tensor:
        """The reading of LR photos (b, h, w) → prompt ids (b, p): the image, then the task word."""
        return torch.cat(
            [self.image_ids(lr_codes, lr=True), torch.full((len(lr_codes), 1), self.ids[task])], 1
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The same words as a transformers tokenizer, for TRL. Codes are ordinary words on purpose:
        TRL decodes completions with skip_special_tokens=True, which would drop special ones."""
        inner = Tokenizer(models.WordLevel(self.ids, unk_token=PAD))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token=PAD, eos_token=EOS, padding_side="left"
        )


class LayoutGrammar:
    """Which words may come next, as a table: inside an image only codes, row ends and the end;
    around it, the tags.

    Every position of a completion is a state; a row's state is one integer and moves on in O(1),
    batched, without a Python loop over the batch: state + 1, or, where a text part is closed early,
    a jump. `allowed` gives a boolean mask of the vocabulary; in `forced` states a single word is
    possible, so it carries no choice and no gradient.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sizes: tuple[int, ...] = (4, 8, 16),
        tags: tuple[str, ...] = TAGS,
        max_words: int = 24,
    ):
        ids, self.vocabulary, self.tags = vocabulary.ids, vocabulary, tags
        only = lambda *words: frozenset(ids[w] for w in words)  # noqa: E731
        text = frozenset(ids[w] for w in vocabulary.text)
        codes = frozenset(range(vocabulary.first_code, vocabulary.first_code + vocabulary.codes))
        allowed: list[frozenset[int]] = []
        jumps: dict[int, tuple[int, int]] = {}  # state → (closing word, state after it)
        side = dict(
            zip(IMAGE_TAGS, sizes, strict=True)
        )  # a layout may lack parts; an image keeps its size
        for tag in tags:
            allowed.append(only(f"<{tag}>"))
            close = only(f"</{tag}>")
            if tag in IMAGE_TAGS:
                n = side[tag]
                allowed += [only(START), only(f"<n{n}>"), only(f"<n{n}>")]
                allowed += ([codes] * n + [only(ROW)]) * n
                allowed += [only(END), close]
            else:
                first = len(allowed)
                allowed += [text] + [text | close] * (max_words - 1) + [close]
                for state in range(first + 1, first + max_words):
                    jumps[state] = (ids[f"</{tag}>"], first + max_words + 1)
        allowed.append(only(EOS))
        allowed.append(only(PAD))  # the state after the end repeats itself
        kinds = {a: i for i, a in enumerate(dict.fromkeys(allowed))}
        self.masks = torch.zeros(len(kinds), len(vocabulary), dtype=torch.bool)
        for words, i in kinds.items():
            self.masks[i, list(words)] = True
        self.kind = torch.tensor([kinds[a] for a in allowed])
        self.forced = torch.tensor([len(a) == 1 for a in allowed])
        self.is_image = torch.tensor([a == codes for a in allowed])
        self.only_word = torch.tensor([next(iter(a)) if len(a) == 1 else -1 for a in allowed])
        self.closing = torch.full((len(allowed),), -1)
        self.after = torch.arange(len(allowed)) + 1
        self.after[-1] = len(allowed) - 1
        self.target = self.after.clone()
        for state, (word, to) in jumps.items():
            self.closing[state], self.target[state] = word, to
        self.final = len(allowed) - 1
        self.max_length = len(allowed) - 1

    def to(self, device: str | torch.device) -> "LayoutGrammar":
        for name in (
            "masks",
            "kind",
            "forced",
            "is_image",
            "only_word",
            "closing",
            "after",
            "target",
        ):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def start(self, batch: int) -> Tensor:
        """The states (batch,) before the first word."""
        return torch.zeros(batch, dtype=torch.long, device=self.kind.device)

    def allowed(self, state: Tensor) -> Tensor:
        """States (b,) → boolean mask (b, vocabulary) of the words that may come next."""
        return self.masks[self.kind[state]]

    def step(self, state: Tensor, word: Tensor) -> Tensor:
        """States (b,) and the words (b,) just taken → next states (b,)."""
        return torch.where(word == self.closing[state], self.target[state], self.after[state])

    def forced_mask(self, completions: Tensor) -> Tensor:
        """Completions (b, n) → boolean (b, n): words that the grammar alone decided (to be left out
        of a loss)."""
        state, out = self.start(len(completions)), []
        for word in completions.unbind(1):
            out.append(self.forced[state])
            state = self.step(state, word)
        return torch.stack(out, 1)
