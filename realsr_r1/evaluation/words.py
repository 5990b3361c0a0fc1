"""Do a policy's first words get righter? Degradation and understanding rewards on held-out
photographs, in the mode people use (greedy) and at temperature 1, beside what sampling alone gives:
a lower temperature, and the best of eight. The control is the same greedy words against *another*
photograph's truth: what is earned there is earned without looking.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from realsr_r1 import rewards
from realsr_r1.common import generator
from realsr_r1.evaluation.nano import SEVERITIES, clusters_of, held_out
from realsr_r1.grpo import WORDS
from realsr_r1.photographs import Photograph
from realsr_r1.policy import ChainPolicy
from realsr_r1.sampling import Sampling, sample
from realsr_r1.stats import clustered
from realsr_r1.vlcot import render

TRIES = 8
MODES = {
    "greedy": Sampling(),
    "temperature 0.5": replace(Sampling.rollout(TRIES), temperature=0.5),
    "temperature 1": Sampling.rollout(TRIES),
}
NAMES = ("degradation", "understanding")
SHUFFLED = "another photo's truth"
LOOKS = "greedy, own minus another's"  # what is earned by looking


@dataclass(frozen=True)
class Words:
    """Rewards of one policy: by mode and reward an array (photographs × severities, tries)."""

    scores: dict[tuple[str, str], np.ndarray]
    clusters: list[str]

    def of(self, mode: str, name: str) -> np.ndarray:
        """One number a photo; "best of 8" is of temperature 1."""
        if mode == f"best of {TRIES}":
            return self.scores["temperature 1", name].max(1)
        if mode == LOOKS:
            return self.of("greedy", name) - self.of(SHUFFLED, name)
        return self.scores[mode, name].mean(1)


def _said(
    policy: ChainPolicy, items: list[dict], sampling: Sampling, seed: int, batch: int
) -> list[str]:
    """The first words for each item, `num_generations` adjacent."""
    grammar, texts = policy.grammar(WORDS), []
    for first in range(0, len(items), batch):
        lr = torch.stack([x["lr"] for x in items[first : first + batch]]).float() / 255
        g = generator(seed, first)
        texts += [render(c, WORDS) for c in sample(policy, lr, sampling, g, grammar).chains]
    return texts


def _scored(said: list[str], items: list[dict], mode: str) -> dict[tuple[str, str], np.ndarray]:
    """Both rewards of texts against the truth of items."""
    n = len(said) // len(items)
    columns = {k: [x[k] for x in items for _ in range(n)] for k in ("degradation", "tags")}
    found = {
        "degradation": rewards.degradation_reward(said, columns["degradation"]),
        "understanding": rewards.understanding_reward(said, columns["tags"]),
    }
    return {(mode, k): np.array(v).reshape(-1, n) for k, v in found.items()}


def measure(policy: ChainPolicy, photos: list[Photograph], seed: int = 0, batch: int = 64) -> Words:
    """Sample the first words for each photograph at each severity, and score them. ValueError for
    a single photograph: its control is another's truth."""
    if len(photos) < 2:
        raise ValueError("one photograph has no other's truth: take two or more (-n)")
    items, clusters = [], []
    for severity in SEVERITIES:
        items += held_out(photos, severity, seed, labels=True)
        clusters += clusters_of(photos)
    scores, away = {}, len(items) // 2  # items that far apart show other photographs
    for mode, sampling in MODES.items():
        said = _said(policy, items, sampling, seed, batch)
        scores |= _scored(said, items, mode)
        if sampling.greedy_text:
            scores |= _scored(said, items[away:] + items[:away], SHUFFLED)
    return Words(scores, clusters)


def table(found: dict[str, Words]) -> str:
    """Markdown: each policy's rewards by mode; from the second on the gain over the first."""
    first = next(iter(found.values()))
    modes = [*MODES, f"best of {TRIES}", SHUFFLED, LOOKS]
    out = [f"| | {' | '.join(modes)} |", "|---|" + "---|" * len(modes)]
    for name in NAMES:
        for policy, words in found.items():
            cells = [f"{words.of(m, name).mean():.3f}" for m in modes]
            out.append(f"| {name}, {policy} | {' | '.join(cells)} |")
            if words is not first:
                gains = [words.of(m, name) - first.of(m, name) for m in modes]
                cells = [str(clustered(g, words.clusters)) for g in gains]
                out.append(f"| its gain | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"
