"""The four rewards of VLCoT-GRPO, and the variants that the lessons compare.

Every reward is called as TRL's GRPOTrainer calls it: keywords `completions`, the dataset's columns,
and things it ignores; lists in, a list of floats in [0, 1] out, no state. A completion is a string
(words separated by spaces) or a conversation [{"role": …, "content": …}], whose content is read.
What a policy writes never raises: an empty, cut, repeated or reordered chain just scores low. Data
do raise: a missing or malformed column gives a ValueError that names it.

The paper (arXiv 2506.16796, Fig. 2) has four: format, degradation, understanding, generation. Its
released code adds them without weights, and has no degradation reward.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realsr_r1 import perceptual
from realsr_r1.first import degradation as labels_of
from realsr_r1.first import experts, scenes, vlcot
from realsr_r1.first.tokenizer import VQModel

Reward = Callable[..., list[float]]

# Other words for the same thing: each word on the right is read as the one on the left, in texts
# and in tags. None on the right is in the nano vocabulary, so the table matters only for free text
# (own photos, the reference size). Kinds are not here on purpose: the rough text has to name the
# category, and "seabird" is not the word "bird".
SAME = {
    "grass": "lawn meadow turf",
    "sand": "beach desert dune dunes",
    "road": "street pavement asphalt roads",
    "wall": "walls",
    "water": "sea ocean lake river pond",
    "leaves": "leaf foliage",
    "sky": "skies",
    "bird": "birds",
    "mammal": "mammals",
    "fish": "fishes",
    "insect": "insects bug bugs",
    "fruit": "fruits",
    "plant": "plants",
    "coin": "coins",
    "tool": "tools",
    "instrument": "instruments",
    "vehicle": "vehicles",
    "landmark": "landmarks",
    "car": "cars automobile",
    "bicycle": "bike",
    "plane": "airplane aeroplane aircraft",
    "ship": "boat",
    "photo": "photograph picture",
    "gray": "grey",
}
SYNONYMS = {other: word for word, others in SAME.items() for other in others.split()}


def text_of(completion: str | Mapping | Sequence) -> str:
    """The text of a completion: a string, a message, or a conversation (contents joined by spaces).
    ValueError for anything else."""
    if isinstance(
        completion, str
    ):  # a number of nine digits is no code or size, and might not fit an int64
        return re.sub(r"<[a-z]\d{9,}>", "<?>", completion)
    if isinstance(completion, Mapping):  # a message, or one part of a content that is a list
        return text_of(completion.get("content", completion.get("text")) or "")
    if isinstance(completion, Sequence):
        return " ".join(map(text_of, completion))
    raise ValueError(
        f"a completion must be a string or a list of messages with a 'content', got "
        f"{type(completion).__name__}"
    )


def _column(name: str, values: Any, n: int) -> list:
    """A dataset column as a list of n entries; ValueError naming the column if it is absent or of
    another length."""
    if values is None:
        raise ValueError(f"this reward needs the dataset column '{name}', which is missing")
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or len(values) != n:
        raise ValueError(f"column '{name}' must hold one entry for each of the {n} completions")
    return list(values)


def _labels(completions: Sequence, degradation: Any) -> list[tuple[dict, dict]]:
    """For each completion the labels that its chain names and the true ones, from the column
    `degradation`."""
    true = []
    for i, value in enumerate(_column("degradation", degradation, len(completions))):
        try:
            true.append(
                labels_of.from_words(value if isinstance(value, str) else labels_of.to_words(value))
            )
        except (KeyError, TypeError, IndexError):
            true.append({})
        if len(true[-1]) != 5:
            raise ValueError(
                f"column 'degradation', sample {i}: expected five labels ('medium blur, "
                f"downsample, …'), got {_short(value)}"
            )
    return [(vlcot.parse(text_of(c)).labels, t) for c, t in zip(completions, true, strict=True)]


def _words(text: str) -> str:
    """Lower-case words of letters and digits, synonyms replaced, with a space on each side, so that
    `in` finds whole words."""
    return " " + "".join(SYNONYMS.get(w, w) + " " for w in re.findall(r"[^\W_]+", text.lower()))


def _rough(completions: Sequence, tags: Any) -> list[tuple[str, list[str]]]:
    """The rough understanding text of each completion ("" where there is none), with its entry of
    the column `tags`."""
    columns = _column("tags", tags, len(completions))
    for i, names in enumerate(columns):
        listed = hasattr(names, "__iter__") and not isinstance(names, str | Mapping)
        if not listed or not all(isinstance(t, str) and _words(t).strip() for t in names):
            raise ValueError(
                f"column 'tags', sample {i}: expected a list of words, such as ['bird', "
                f"'grass'], got {_short(names)}"
            )
    return [
        (vlcot.parse(text_of(c)).rough_understand or "", list(names))
        for c, names in zip(completions, columns, strict=True)
    ]


def needs(*columns: str) -> Callable[[Reward], Reward]:
    """Mark a reward with the dataset columns that it cannot do without, for a trainer to check
    before it samples anything."""

    def mark(reward: Reward) -> Reward:
        reward.columns = columns
        return reward

    return mark


def _columns(*rewards: Reward) -> tuple[str, ...]:
    return tuple(dict.fromkeys(c for r in rewards for c in getattr(r, "columns", ())))


def _short(value: Any, length: int = 160) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= length else f"{text[: length - 43]} … {text[-40:]}")


def format_reward(completions: Sequence, **_) -> list[float]:
    """1 if the whole completion is the seven parts in order, each once, with nothing around them;
    otherwise 0.

    Paper: the same. Released code: a regular expression. Here the images' layout (size, rows, ends)
    must be right, too.
    """
    return [float(vlcot.well_formed(text_of(c))) for c in completions]


@needs("degradation")
def degradation_reward(
    completions: Sequence, degradation: Sequence[str | Mapping] | None = None, **_
) -> list[float]:
    """Share of the five degradation labels (blur, resize, noise, compression, resize) that the
    chain names exactly: k/5.

    Paper: the same; its example is 3/5 = 0.6. Released code: absent. Order counts, because the two
    resizes are told apart by their place alone; further words after the fifth label are ignored.
    `degradation` holds the true labels of each sample, as the sentence or as the dict. Raises
    ValueError if the column is missing or an entry is not five labels.
    """
    return [
        sum(said.get(k) == true[k] for k in labels_of.LABELS) / 5
        for said, true in _labels(completions, degradation)
    ]


@needs("tags")
def understanding_reward(
    completions: Sequence, tags: Sequence[Sequence[str]] | None = None, **_
) -> list[float]:
    """Share of the sample's tags that the rough understanding text names, as whole words, upper and
    lower case alike.

    Paper: the same, with tags from Grounded-SAM; its example is 3/4 = 0.75. Released code:
    `substring_understanding_reward`. Words pass through SYNONYMS; a tag of several words must stand
    as a whole; repeated tags count once; a sample without tags scores 0. It is recall alone, so
    naming everything scores 1: `understanding_f1_reward` mends that. Raises ValueError if the
    column is missing or an entry is not a list of words.
    """
    pairs = [
        (_words(text), {_words(t) for t in names}) for text, names in _rough(completions, tags)
    ]
    return [sum(t in text for t in wanted) / max(1, len(wanted)) for text, wanted in pairs]


def _final_images(
    completions: Sequence, tokenizer: VQModel, batch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Decoded final images (b, 3, h, w) in [0, 1] of equal size, with the indices of their
    completions; unreadable ones are left out."""
    book, groups = tokenizer.quantize.weight, defaultdict(list)
    for i, completion in enumerate(completions):
        codes = vlcot.parse(text_of(completion)).final_image
        if codes is not None and codes.numel() and int(codes.max()) < len(book):
            groups[codes.shape].append((i, codes))
    for members in groups.values():
        for at in range(0, len(members), batch):
            index, codes = zip(*members[at : at + batch], strict=True)
            yield list(index), tokenizer.decode(torch.stack(codes).to(book.device)).float()


class GenerationReward:
    """A visual expert's score of the final image, in [0, 1]; 0 where there is no readable final
    image.

    Paper: a visual expert scores the final image. Released code: the mean of TOPIQ-NR, MUSIQ/100,
    MANIQA-pipal and CLIPIQA; where the final image is cut off it scores the step before instead,
    and without any image it crashes. Here a missing, cut, repeated or malformed final image, or one
    with a code that the tokenizer does not have, scores 0.

    `expert`: images (b, 3, h, w) in [0, 1] → (b,) in [0, 1], higher is better. `size`: codes a side
    that the final image must have, else it scores 0 (None: any). `batch`: images decoded and scored
    at a time. Raises ValueError if the expert does not return one score an image; that scores are
    numbers in [0, 1] is for `guarded` to check.
    """

    def __init__(
        self,
        expert: Callable[[Tensor], Tensor],
        tokenizer: VQModel,
        size: int | None = None,
        batch: int = 32,
    ):
        self.expert, self.tokenizer, self.size, self.batch = expert, tokenizer, size, batch
        self.__name__ = "generation_reward"

    @torch.no_grad()
    def __call__(self, completions: Sequence, **_) -> list[float]:
        out = [0.0] * len(completions)
        for index, images in _final_images(completions, self.tokenizer, self.batch):
            if (
                self.size is not None
                and images.shape[-2:] != (self.size * self.tokenizer.factor,) * 2
            ):
                continue
            scores = self.expert(images)
            if not isinstance(scores, Tensor) or scores.shape != (len(index),):
                raise ValueError(
                    f"the expert must return a tensor of one score for each of {len(index)} "
                    f"images, got {_short(scores)}"
                )
            for i, score in zip(index, scores.tolist(), strict=True):
                out[i] = score
        return out


def partial_format_reward(completions: Sequence, **_) -> list[float]:
    """Partial credit for form: (parts that are whole and there just once + 1 if the whole is in
    form) / 8.

    1 only where `format_reward` is 1. A cut chain keeps its whole parts; out of order or with words
    around it, it has 7/8.
    """
    parses = [(text_of(c), vlcot.parse(text_of(c))) for c in completions]
    return [
        (sum(getattr(chain, t) is not None for t in vlcot.TAGS) + vlcot.well_formed(text)) / 8
        for text, chain in parses
    ]


@needs("degradation")
def degradation_distance_reward(
    completions: Sequence, degradation: Sequence[str | Mapping] | None = None, **_
) -> list[float]:
    """Degradation labels with credit for being near: the mean over five labels of 1 - steps / most
    steps possible.

    On no < light < medium < heavy, "medium" for "heavy" earns 2/3 and "no" 0; on downsample < keep
    < upsample, "keep" earns 1/2 beside either end. A label that is missing earns 0. Column and
    errors as in `degradation_reward`. Mind the hedge: a middle answer is never far off, so a policy
    that always says "medium" does well.
    """

    scales = {k: labels_of.RESIZES if "resize" in k else labels_of.LEVELS for k in labels_of.LABELS}
    out = []
    for said, true in _labels(completions, degradation):
        steps = {
            k: abs(scale.index(said[k]) - scale.index(true[k]))
            for k, scale in scales.items()
            if k in said
        }
        out.append(sum(1 - n / (len(scales[k]) - 1) for k, n in steps.items()) / 5)
    return out


# Words that name nothing, whatever the vocabulary.
FUNCTION_WORDS = frozenset(
    "a an the this that these those some of on in at by with and or to from near under over "
    "beside behind against between into is are it its there".split()
)


@lru_cache(maxsize=1)
def tag_nouns() -> frozenset[str]:
    """Words that count as naming a thing: all categories and backgrounds (bird, wall), not kinds,
    details, colours, sizes."""
    m = scenes.metadata()
    return frozenset(
        e["category"] for part in ("cutouts", "photos") for e in m[part].values() if "category" in e
    ) | {*scenes.PREPOSITIONS}


@needs("tags")
def understanding_f1_reward(
    completions: Sequence, tags: Sequence[Sequence[str]] | None = None, **_
) -> list[float]:
    """F1 of the things named in the rough text against the tags: 2 · hits / (things named + tags);
    listing all does not pay.

    Named are the tags that are hit, and every other word of the text, each once, but for
    FUNCTION_WORDS and what only describes in our captions (kinds, details, colours, sizes: free of
    charge). In free text an adjective that our captions do not know is charged as a thing. Where
    nothing is hit, or there are no tags, 0. Column and errors as in `understanding_reward`.
    """
    out, free = [], FUNCTION_WORDS | (frozenset(scenes.vocabulary()) - tag_nouns())
    for text, names in _rough(completions, tags):
        said, wanted = _words(text), {_words(t) for t in names}
        hits = {t for t in wanted if t in said}
        others = set(said.split()) - free - set("".join(hits).split())
        out.append(2 * len(hits) / (len(hits) + len(others) + len(wanted)) if hits else 0.0)
    return out


@needs("tags")
def substring_understanding_reward(
    completions: Sequence, tags: Sequence[Sequence[str]] | None = None, **_
) -> list[float]:
    """Share of tags found anywhere in the rough text, even inside a word, as the released code
    matches: "car" in "scarf".

    For the lesson only; no synonyms; 0 where the list of tags is empty (the released code divides
    by zero there). Column and errors as in `understanding_reward`.
    """
    pairs = [
        (text.lower(), {t.lower() for t in names}) for text, names in _rough(completions, tags)
    ]
    return [sum(t in text for t in wanted) / max(1, len(wanted)) for text, wanted in pairs]


def hr_image(value: Any, sample: int = 0) -> Tensor:
    """An entry of the column `hr` → (3, h, w) float in [0, 1]; ValueError naming the column and the
    sample if it is malformed.

    Either a dict {"seed": …, "split": …} and perhaps "size" (pixels, else 128), from which
    `scenes.scene` makes the picture again: a few bytes a row. Or the pixels (3, h, w) as an array,
    tensor or nested list: integers 0–255 or floats 0–1.
    """
    if (
        isinstance(value, Mapping)
        and isinstance(value.get("seed"), int)
        and value.get("split") in scenes.SPLITS
    ):
        return scenes.scene(value["seed"], value["split"], value.get("size") or 128).image
    try:
        pixels = torch.as_tensor(np.asarray(value))
        top = 1 if pixels.is_floating_point() else 255
        if pixels.ndim == 3 and len(pixels) == 3 and 0 <= pixels.min() <= pixels.max() <= top:
            return pixels.float() / top
    except (ValueError, TypeError, RuntimeError):
        pass  # ragged lists, words, None, no pixels at all
    raise ValueError(
        f"column 'hr', sample {sample}: expected {{'seed': …, 'split': …}} or pixels (3, h, w), "
        f"got {_short(value, 80)}"
    )


class ReferenceReward:
    """Likeness of the decoded final image to the true HR photo, in [0, 1]; 0 without a readable
    final image of its size.

    `measure`: "lpips" (1 - LPIPS, AlexNet) or "ssim" (Wang et al. 2004, mean of R, G and B, through
    pyiqa), both clipped to [0, 1]. `hr` entries: see `hr_image`; ValueError if missing or
    malformed, or for another measure. A no-reference expert can be pleased by a pretty picture of
    something else; this reward cannot, but it needs the truth.
    """

    columns = ("hr",)

    def __init__(self, tokenizer: VQModel, measure: str = "lpips", batch: int = 32):
        if measure not in ("lpips", "ssim"):
            raise ValueError(f"no reference measure {measure!r}; choose lpips or ssim")
        self.tokenizer, self.measure, self.batch = tokenizer, measure, batch
        self.__name__ = "reference_reward" if measure == "lpips" else f"reference_{measure}_reward"

    @torch.no_grad()
    def __call__(self, completions: Sequence, hr: Sequence | None = None, **_) -> list[float]:
        true = [hr_image(v, i) for i, v in enumerate(_column("hr", hr, len(completions)))]
        device = self.tokenizer.quantize.weight.device
        like = (
            experts.create("ssim", device)
            if self.measure == "ssim"
            else lambda x, y: 1 - perceptual.distance(x, y)
        )
        out = [0.0] * len(completions)
        for index, images in _final_images(completions, self.tokenizer, self.batch):
            fits = [k for k, i in enumerate(index) if images[k].shape == true[i].shape]
            if fits:
                wanted = torch.stack([true[index[k]] for k in fits]).to(images.device)
                for k, value in zip(
                    fits,
                    like(images[fits].clamp(0, 1), wanted).flatten().clamp(0, 1).tolist(),
                    strict=True,
                ):
                    out[index[k]] = value
        return out


def weighted_sum(
    rewards: Sequence[Reward], weights: Sequence[float] | None = None, name: str = "weighted_sum"
) -> Reward:
    """One reward from several: Σ wᵢ·rᵢ with weights divided by their sum, so that the result stays
    in [0, 1] (None: equal).

    ValueError if weights do not fit the rewards, are negative or not finite, or are all 0. (GRPO
    divides by the group's spread, so a common factor hardly matters to it.)
    """
    weights = [1.0] * len(rewards) if weights is None else [float(w) for w in weights]
    if (
        len(weights) != len(rewards)
        or not all(0 <= w < float("inf") for w in weights)
        or not sum(weights)
    ):
        raise ValueError(
            f"weighted_sum needs for each of {len(rewards)} rewards a finite weight of at least "
            f"0, not all 0; got {weights}"
        )
    total = sum(weights)

    def reward(completions: Sequence, **columns) -> list[float]:
        scores = [r(completions=completions, **columns) for r in rewards]
        return [
            min(1.0, sum(w * s for w, s in zip(weights, row, strict=True)) / total)
            for row in zip(*scores, strict=True)
        ]

    reward.__name__, reward.columns = name, _columns(*rewards)
    return reward


def gated(reward: Reward, gate: Reward = format_reward) -> Reward:
    """The reward where the gate gives 1, and 0 elsewhere: with the default gate, a chain out of
    form earns nothing."""

    def closed_unless_open(completions: Sequence, **columns) -> list[float]:
        scores, opened = (r(completions=completions, **columns) for r in (reward, gate))
        return [s if g == 1 else 0.0 for s, g in zip(scores, opened, strict=True)]

    closed_unless_open.__name__, closed_unless_open.columns = (
        f"gated_{reward.__name__}",
        _columns(reward, gate),
    )
    return closed_unless_open


def guarded(reward: Reward) -> Reward:
    """The same reward for a trainer, which would pass over NaN in silence: it must give one float
    in [0, 1] a completion.

    Raises ValueError with one sentence that names the reward and keeps the sample (shortened) if
    the reward raises, returns None, NaN, infinity or a value outside [0, 1], or a wrong number of
    values. Out-of-memory errors pass unchanged.
    """
    name = getattr(reward, "__name__", type(reward).__name__)

    def error(what: str, completions: Sequence, i: int = 0) -> ValueError:
        return ValueError(
            f"reward {name} {what}, on sample {i}: "
            f"{_short(completions[i] if len(completions) else '')}"
        )

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
            raise error(
                f"returned {_short(repr(scores), 80)} instead of {len(completions)} values",
                completions,
            )
        for i, s in enumerate(scores):
            if (
                not isinstance(s, int | float | np.number) or not 0 <= s <= 1
            ):  # NaN fails the comparison
                raise error(f"returned {s!r}, which is not a number in [0, 1]", completions, i)
        return [float(s) for s in scores]

    checked.__name__, checked.__doc__ = name, reward.__doc__
    return checked


def _culprit(reward: Reward, completions: Sequence, columns: dict) -> int:
    """The first sample on which the reward raises alone; 0 if there is none."""
    rows = {
        k
        for k, v in columns.items()
        if hasattr(v, "__len__") and not isinstance(v, str | Mapping) and len(v) == len(completions)
    }
    for i in range(len(completions)):
        try:
            reward(
                completions=completions[i : i + 1],
                **{k: v[i : i + 1] if k in rows else v for k, v in columns.items()},
            )
        except Exception:
            return i
    return 0
