"""The four rewards of VLCoT-GRPO, and the variants that the lessons compare.

Every reward is called as TRL's GRPOTrainer calls it: keywords `completions`, the dataset's columns,
and things it ignores; lists in, a list of floats in [0, 1] out, no state. A completion is a string
or a conversation [{"role": …, "content": …}]. What a policy writes never raises: a malformed chain
just scores low. A missing or malformed column does: a ValueError names it. The paper's four are in
its Fig. 2 (arXiv 2506.16796); its released code adds them up, and has no degradation reward.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any
from unicodedata import category, normalize

import numpy as np
import torch
from torch import Tensor

from realsr_r1 import degradation as labels_of
from realsr_r1 import photographs, vlcot
from realsr_r1.tokenizer import VQModel

Reward = Callable[..., list[float]]

# Other words for the same thing, and plurals of the captions' nouns: each is read as the word that
# it stands for, in texts and in tags.
WORDS = json.loads((photographs.ASSETS / "words.json").read_text(encoding="utf-8"))
SYNONYMS = {other: word for word, others in WORDS["same"].items() for other in others.split()}
NOUNS = {noun.split()[-1] for noun in (*photographs.SUBJECTS, *photographs.EXTRAS)}
SYNONYMS |= {photographs.plural(n): n for n in NOUNS if photographs.plural(n) != n}
# Characters that are not seen: soft hyphen, zero-width and direction marks, variation selectors.
HIDDEN = (
    "[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)


def text_of(completion: str | Mapping | Sequence) -> str:
    """The text of a completion: a string, a message, or a conversation; else ValueError."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):  # a message, or one part of a content that is a list
        return text_of(completion.get("content", completion.get("text")) or "")
    if isinstance(completion, Sequence):
        return " ".join(map(text_of, completion))
    raise ValueError(f"a completion must be a string or messages, got {type(completion).__name__}")


def listed(values: Any) -> list | None:
    """Whatever can be gone through, as a list; None for a word, a dict, a number."""
    try:
        return None if isinstance(values, str | bytes | Mapping) else list(values)
    except TypeError:
        return None


def column(name: str, values: Any, n: int) -> list:
    """A dataset column as a list of n entries; ValueError naming it if it is not that."""
    if values is None:
        raise ValueError(f"this reward needs the dataset column '{name}', which is missing")
    entries = None if isinstance(values, Set) else listed(values)
    if entries is None or len(entries) != n:
        raise ValueError(f"column '{name}' must hold one entry for each of the {n} completions")
    return entries


def labels(completions: Iterable, degradation: Any) -> list[tuple[dict, dict]]:
    """For each completion the labels that it names and those of the column `degradation`."""
    out, completions = [], list(completions)
    for i, value in enumerate(column("degradation", degradation, len(completions))):
        try:
            text = value if isinstance(value, str) else labels_of.to_words(value)
            true = labels_of.from_words(plain(text))
        except (KeyError, TypeError, IndexError):
            true = {}
        if len(true) != 5:
            raise ValueError(
                f"column 'degradation', sample {i}: expected five labels ('medium blur, "
                f"downsample, …'), got {short(value)}"
            )
        said = vlcot.parse(text_of(completions[i])).degradation or ""
        out.append((labels_of.from_words(plain(said)), true))
    return out


def plain(text: str) -> str:
    """One form of what reads the same: NFKC and casefold, without HIDDEN characters."""
    text = re.sub(HIDDEN, "", text)
    for _ in range(2):  # folding may undo the composed form, and the other way round
        text = normalize("NFKC", text).casefold()
    return normalize("NFKC", text)


def singular(word: str) -> str:
    """What an English noun and its plural have in common: the first ending that fits is cut, in
    singulars, too, so that rose and roses are both "ros"."""
    word = WORDS["irregular"].get(word, word)
    return next((re.sub(e, to, word) for e, to in WORDS["endings"] if re.search(e, word)), word)


@lru_cache(maxsize=10_000)
def folded(word: str) -> str:
    return singular(SYNONYMS.get(word) or SYNONYMS.get(singular(word), word))


def words(text: str) -> str:
    """Words in one form, with a space on each side, so that `in` finds whole words: Dogs is dog,
    leaves leaf, STRASSE straße and ships boat; café is not cafe, car is not in scarf."""
    kept = (c if c.isalnum() or category(c)[0] == "M" else " " for c in plain(text))
    return " " + "".join(folded(w) + " " for w in re.findall(r"[^\W_]\S*", "".join(kept)))


def rough(completions: Iterable, tags: Any) -> list[tuple[str, list[str]]]:
    """Each completion's rough understanding text ("" for none) with its entry of column `tags`."""
    out, completions = [], list(completions)
    for i, given in enumerate(column("tags", tags, len(completions))):
        names = listed(given)
        if names is None or not all(isinstance(t, str) and words(t).strip() for t in names):
            raise ValueError(
                f"column 'tags', sample {i}: expected a list of words, such as ['bird', "
                f"'grass'], got {short(given)}"
            )
        out.append((vlcot.parse(text_of(completions[i])).rough_understand or "", names))
    return out


def needs(*columns: str) -> Callable[[Reward], Reward]:
    """Mark a reward with the dataset columns that it needs, for a trainer to check at its start."""

    def mark(reward: Reward) -> Reward:
        reward.columns = columns
        return reward

    return mark


def short(value: Any, length: int = 160) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= length else f"{text[: length - 43]} … {text[-40:]}")


def format_reward(completions: Sequence, **_) -> list[float]:
    """1 if the whole completion is the seven parts in order, each once, with nothing around them;
    otherwise 0. Paper: the same. Released code: a regular expression. Here the images' layout must
    be right, too."""
    return [float(vlcot.well_formed(text_of(c))) for c in completions]


@needs("degradation")
def degradation_reward(
    completions: Sequence, degradation: Sequence[str | Mapping] | None = None, **_
) -> list[float]:
    """Share of the five degradation labels (blur, resize, noise, compression, resize) that the
    chain names exactly: k/5. Paper: the same; its example is 3/5. Released code: absent.

    Order counts: the two resizes are told apart by their place alone. `degradation` holds the true
    labels, as sentences or dicts; ValueError if it is missing or an entry is not five labels."""
    return [
        sum(said.get(k) == true[k] for k in labels_of.LABELS) / 5
        for said, true in labels(completions, degradation)
    ]


@needs("tags")
def understanding_reward(
    completions: Sequence, tags: Sequence[Sequence[str]] | None = None, **_
) -> list[float]:
    """Share of the sample's tags that the rough understanding text names, as whole words; see
    `words` for what matches.

    Paper: the same, with tags from Grounded-SAM; its example is 3/4. Released code: as
    `ablations.rewards.substring_understanding_reward`. A tag of several words must stand as a
    whole; without tags 0. It is recall alone, so naming everything scores 1 (`ablations.rewards`
    has F1). ValueError if the column is missing or an entry is not a list of words."""
    pairs = [(words(text), {words(t) for t in names}) for text, names in rough(completions, tags)]
    return [sum(t in text for t in wanted) / max(1, len(wanted)) for text, wanted in pairs]


def final_images(completions: Sequence, tokenizer: VQModel) -> Iterator[tuple[list[int], Tensor]]:
    """Final images (b, 3, h, w) of equal size that can be read, with their completions' indices."""
    book, groups = tokenizer.codebook.weight, defaultdict(list)
    for i, completion in enumerate(completions):
        codes = vlcot.parse(text_of(completion)).final_image
        if codes is not None and codes.numel() and int(codes.max()) < len(book):
            groups[codes.shape].append((i, codes))
    for members in groups.values():
        for at in range(0, len(members), 32):  # as many as fit a small memory
            index, codes = zip(*members[at : at + 32], strict=True)
            yield list(index), tokenizer.decode(torch.stack(codes).to(book.device)).float()


class GenerationReward:
    """A visual expert's score of the final image, in [0, 1]; 0 where none can be decoded.

    Paper: the same. Released code: the mean of TOPIQ-NR, MUSIQ/100, MANIQA-pipal and CLIPIQA; a cut
    final image has the score of the step before, and without any image it crashes.

    `expert`: images (b, 3, h, w) in [0, 1] → (b,) in [0, 1], higher is better. ValueError if it
    does not return one score an image; `guarded` checks their range."""

    def __init__(self, expert: Callable[[Tensor], Tensor], tokenizer: VQModel):
        self.expert, self.tokenizer = expert, tokenizer
        self.__name__ = "generation_reward"

    @torch.no_grad()
    def __call__(self, completions: Sequence, **_) -> list[float]:
        out = [0.0] * len(completions)
        for index, images in final_images(completions, self.tokenizer):
            scores = self.expert(images)
            if not isinstance(scores, Tensor) or scores.shape != (len(index),):
                raise ValueError(
                    f"the expert must return a tensor of one score for each of {len(index)} "
                    f"images, got {short(scores)}"
                )
            for i, score in zip(index, scores.tolist(), strict=True):
                out[i] = score
        return out


def guarded(reward: Reward) -> Reward:
    """The same reward for a trainer, which would pass over NaN in silence: ValueError, in one
    sentence with its name and the sample, if it raises (out of memory apart) or does not return one
    number in [0, 1] a completion."""
    name = getattr(reward, "__name__", type(reward).__name__)

    def error(what: str, completions: Sequence, i: int = 0) -> ValueError:
        sample = short(completions[i] if len(completions) else "")
        return ValueError(f"reward {name} {what}, on sample {i}: {sample}")

    def checked(completions: Sequence, **columns) -> list[float]:
        try:
            scores = reward(completions=completions, **columns)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as e:
            i, why = _culprit(reward, completions, columns), " ".join(str(e).split())
            raise error(f"stopped with {type(e).__name__} ({why})", completions, i) from e
        scores = scores.tolist() if hasattr(scores, "tolist") else scores
        if not isinstance(scores, Sequence) or len(scores) != len(completions):
            what = f"returned {short(repr(scores), 80)} instead of {len(completions)} values"
            raise error(what, completions)
        for i, s in enumerate(scores):  # NaN fails the comparison
            if not isinstance(s, int | float | np.number) or not 0 <= s <= 1:
                raise error(f"returned {s!r}, which is not a number in [0, 1]", completions, i)
        return [float(s) for s in scores]

    checked.__name__, checked.__doc__ = name, reward.__doc__
    return checked


def _culprit(reward: Reward, completions: Sequence, columns: dict) -> int:
    """The first sample on which the reward raises alone; 0 if there is none."""
    n = len(completions)
    rows = {k for k, v in columns.items() if isinstance(v, list | tuple) and len(v) == n}
    for i in range(n):
        one = {k: v[i : i + 1] if k in rows else v for k, v in columns.items()}
        try:
            reward(completions=completions[i : i + 1], **one)
        except Exception:
            return i
    return 0
