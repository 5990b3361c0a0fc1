"""Variants of the rewards that the lessons and the ablations compare with the paper's four."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realsr_r1 import degradation as labels_of
from realsr_r1 import perceptual, photographs
from realsr_r1.objective import EPSILON, group_advantages
from realsr_r1.rewards import (
    SYNONYMS,
    Reward,
    column,
    final_images,
    format_reward,
    labels,
    needs,
    rough,
    short,
    words,
)
from realsr_r1.tokenizer import VQModel


def _columns(*rewards: Reward) -> tuple[str, ...]:
    return tuple(dict.fromkeys(c for r in rewards for c in getattr(r, "columns", ())))


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
    for said, true in labels(completions, degradation):
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
    """Words that count as naming a thing: those that a tag can hold."""
    nouns = (*photographs.SUBJECTS, *photographs.EXTRAS, *photographs.BACKGROUNDS)
    return frozenset(SYNONYMS.get(w, w) for noun in nouns for w in noun.split())


@needs("tags")
def understanding_f1_reward(
    completions: Sequence, tags: Sequence[Sequence[str]] | None = None, **_
) -> list[float]:
    """F1 of the things named in the rough text against the tags: 2 · hits / (things named + tags);
    listing all does not pay.

    Named are the tags that are hit, and every other word of the text, each once, but for
    FUNCTION_WORDS and what only describes in our captions (kinds, details, colors, sizes: free of
    charge). In free text an adjective that our captions do not know is charged as a thing. Where
    nothing is hit, or there are no tags, 0. Column and errors as in `understanding_reward`.
    """
    out, free = [], FUNCTION_WORDS | (frozenset(photographs.vocabulary()) - tag_nouns())
    for text, names in rough(completions, tags):
        said, wanted = words(text), {words(t) for t in names}
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
    pairs = [(text.lower(), {t.lower() for t in names}) for text, names in rough(completions, tags)]
    return [sum(t in text for t in wanted) / max(1, len(wanted)) for text, wanted in pairs]


def gated(reward: Reward, gate: Reward = format_reward) -> Reward:
    """The reward where the gate gives 1, and 0 elsewhere: with the default gate, a chain out of
    form earns nothing."""

    def closed_unless_open(completions: Sequence, **columns) -> list[float]:
        scores, opened = (r(completions=completions, **columns) for r in (reward, gate))
        return [s if g == 1 else 0.0 for s, g in zip(scores, opened, strict=True)]

    closed_unless_open.__name__ = f"gated_{reward.__name__}"
    closed_unless_open.columns = _columns(reward, gate)
    return closed_unless_open


class ReferenceReward:
    """Likeness of the decoded final image to the true HR photo, 1 - LPIPS clipped to [0, 1]; 0
    without a readable final image of its size.

    The column `hr` holds pixels (3, h, w): integers 0-255 or floats 0-1. A no-reference expert can
    be pleased by a pretty picture of something else; this reward cannot, but it needs the truth."""

    columns = ("hr",)

    def __init__(self, tokenizer: VQModel):
        self.tokenizer, self.__name__ = tokenizer, "reference_reward"

    @torch.no_grad()
    def __call__(self, completions: Sequence, hr: Sequence | None = None, **_) -> list[float]:
        true = [pixels(v, i) for i, v in enumerate(column("hr", hr, len(completions)))]
        out = [0.0] * len(completions)
        for index, made in final_images(completions, self.tokenizer):
            fit = [k for k, i in enumerate(index) if made[k].shape == true[i].shape]
            if fit:
                truth = torch.stack([true[index[k]] for k in fit]).to(made.device)
                likeness = 1 - perceptual.distance(made[fit].clamp(0, 1), truth)
                for k, x in zip(fit, likeness.clamp(0, 1).tolist(), strict=True):
                    out[index[k]] = x
        return out


def pixels(value: Any, sample: int = 0) -> Tensor:
    """An entry of the column `hr` → (3, h, w) in [0, 1]; ValueError naming the
    sample if malformed."""
    try:
        x = torch.as_tensor(np.asarray(value))
        top = 1 if x.is_floating_point() else 255
        if x.ndim == 3 and len(x) == 3 and 0 <= x.min() <= x.max() <= top:
            return x.float() / top
    except (ValueError, TypeError, RuntimeError):
        pass  # ragged lists, words, None
    raise ValueError(
        f"column 'hr', sample {sample}: expected pixels (3, h, w), got {short(value, 80)}"
    )


def combined_advantages(
    rewards: Tensor, weights: Tensor, group: int, normalize_first: bool = False
) -> Tensor:
    """Advantages (n,) of several rewards (n, k) with weights (k,).

    GRPO sums the rewards and then normalizes, so a reward with a wide spread drowns a narrow one;
    `normalize_first` normalizes each reward by itself (GDPO, arXiv 2601.05242)."""
    if not normalize_first:
        return group_advantages(rewards @ weights, group)
    each = torch.stack([group_advantages(r, group) for r in rewards.unbind(1)], 1) @ weights
    return (each - each.mean()) / (each.std() + EPSILON)
