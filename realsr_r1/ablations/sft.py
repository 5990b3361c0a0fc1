"""Ablations of the chain itself: its layout, its text, and how it is sampled.

    python -m realsr_r1.first ablate sft        layouts that lack parts, each fine-tuned from
      policy-sft for the same number of steps
    python -m realsr_r1.first ablate text       what the text is worth: the policy's own, the true
      one, another scene's
    python -m realsr_r1.first ablate sampling   temperature, top-k, guidance, greedy or sampled

The last two train nothing. All measure the guided restoration of the same held-out scenes; runs of
one seed share their noise.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from realsr_r1 import perceptual
from realsr_r1.ablations.grpo import Bench, Store, chosen, each
from realsr_r1.first import degradation, experts, policy, rewards, scenes, sft, vlcot
from realsr_r1.first.policy import Sampling
from realsr_r1.first.restore import Models, decode_final
from realsr_r1.first.vlcot import IMAGE_TAGS, TAGS, TEXT_TAGS, LayoutGrammar

LAYOUTS = {
    "chain": TAGS,
    "no-text": IMAGE_TAGS,
    "no-images": (*TEXT_TAGS, "final_image"),
    "steps-2": (
        "degradation",
        "middle_understand",
        "middle_image",
        "final_understand",
        "final_image",
    ),
    "steps-1": ("degradation", "final_understand", "final_image"),
    "direct": ("final_image",),
}
# Which parts are told, and whose: "true" is the scene's own, "wrong" another scene's.
TEXTS = {
    "own": ("true", ()),
    "true": ("true", TEXT_TAGS),
    "true-degradation": ("true", TEXT_TAGS[:1]),
    "true-captions": ("true", TEXT_TAGS[1:]),
    "wrong": ("wrong", TEXT_TAGS),
    "wrong-captions": ("wrong", TEXT_TAGS[1:]),
}
SAMPLINGS = {
    "default": Sampling(),
    "temperature-0.5": Sampling(temperature=0.5),
    "temperature-0.8": Sampling(temperature=0.8),
    "temperature-1.2": Sampling(temperature=1.2),
    "no-top-k": Sampling(entropy_top_k=False),
    "guidance-0.8": Sampling(guidance=0.8),
    "guidance-1.5": Sampling(guidance=1.5),
    "sampled-text": Sampling(greedy_text=False),
    "greedy-images": Sampling(image_greedy=True),
}
# training scenes of the layouts: the train split, compositions that cold start has not seen
FIRST_SEED = 400_000


@dataclass(frozen=True)
class SftBudget:
    """What a layout may use: each chain is seen once, so `steps` × `batch` chains. All layouts see
    the same scenes."""

    steps: int = 100
    batch: int = 8
    lr: float = 2e-3


class ToldGrammar(LayoutGrammar):
    """The layout grammar with some of the text told: where a part is told, its words are forced,
    each row its own.

    Every row of the batch has its own states, a copy of the layout's; told words are states in
    which one word is possible.
    """

    def __init__(self, base: LayoutGrammar, told: list[dict[str, str]]):
        """`told`: for each row the parts that are told, {tag: text}. Raises ValueError for a text
        too long for its part."""
        self.vocabulary, self.tags, self.rows = base.vocabulary, base.tags, len(told)
        ids, size = base.vocabulary.ids, len(base.kind)
        masks, kinds = [*base.masks.cpu()], {}
        for name in ("kind", "forced", "is_image", "only_word", "closing"):
            setattr(self, name, getattr(base, name).cpu().repeat(len(told)))
        shift = torch.arange(len(told)).repeat_interleave(size) * size
        self.after, self.target = (
            getattr(base, name).cpu().repeat(len(told)) + shift for name in ("after", "target")
        )
        for row, parts in enumerate(told):
            for tag, text in parts.items():
                first = row * size + 1 + int((base.only_word.cpu() == ids[f"<{tag}>"]).nonzero()[0])
                words = [*base.vocabulary.encode(text.replace(",", " ,")), ids[f"</{tag}>"]]
                room = (
                    int((base.only_word.cpu() == ids[f"</{tag}>"]).nonzero()[0])
                    + row * size
                    - first
                )
                if len(words) - 1 > room:
                    raise ValueError(
                        f"the text told for {tag} has {len(words) - 1} words, its part holds "
                        f"{room}: shorten it"
                    )
                for state, word in enumerate(words, first):
                    if word not in kinds:
                        kinds[word] = len(masks)
                        masks.append(
                            torch.zeros_like(masks[0]).index_fill(0, torch.tensor(word), True)
                        )
                    self.kind[state], self.forced[state], self.only_word[state] = (
                        kinds[word],
                        True,
                        word,
                    )
        self.masks = torch.stack(masks)
        for table in (self.after, self.target):  # all rows share the state after the end
            table[table % size == size - 1] = size - 1
        self.final = self.max_length = size - 1
        self.first = torch.arange(len(told)) * size
        self.to(base.kind.device)

    def start(self, batch: int) -> Tensor:
        """The states (batch,) before the first word; `batch` is the number of rows
        that were told."""
        if batch != self.rows:
            raise ValueError(
                f"texts are told to {self.rows} rows, the batch has {batch}: make a grammar of "
                f"its own for each batch"
            )
        return self.first.to(self.kind.device)


def texts_of(data: scenes.Pairs, i: int) -> dict[str, str]:
    """The true text of each text part of scene i."""
    return dict(
        zip(
            TEXT_TAGS, (degradation.to_words(data.labels[i]), *data.scenes[i].captions), strict=True
        )
    )


@torch.no_grad()
def measure(
    models: Models,
    data: scenes.Pairs,
    how: Sampling = Sampling(),
    seed: int = 0,
    tags: tuple[str, ...] = TAGS,
    direct: bool = False,
    told: list[dict[str, str]] | None = None,
    batch: int = 32,
) -> dict[str, list[float]]:
    """One chain of this layout for each pair → LPIPS, PSNR (dB, RGB) and FSIM of the guided
    restoration, and, where the layout has the part, the share of degradation labels right
    ("degradation") and of tags named ("understanding")."""
    v, structure, out = models.policy.vocabulary, experts.create("fsim"), {}
    base = policy.grammar_of(models.policy, tags=tags)
    for at in tqdm(range(0, len(data), batch), desc="chains", mininterval=10):
        hr, lr = (t[at : at + batch].float() / 255 for t in (data.hr, data.lr))
        prompts = v.prompts(models.reader.encode(lr), vlcot.DIRECT if direct else vlcot.CHAIN)
        grammar = ToldGrammar(base, told[at : at + batch]) if told and any(told) else base
        ids = policy.sample(
            models.policy,
            prompts,
            how,
            torch.Generator().manual_seed(seed * 1_000_003 + at),
            grammar,
        ).ids
        texts = [v.decode(row) for row in ids.cpu()]
        codes = torch.stack([vlcot.parse(t).final_image for t in texts])
        y = decode_final(models, codes, lr)
        row = {
            "LPIPS": perceptual.distance(y, hr).tolist(),
            "PSNR": perceptual.psnr(y, hr).tolist(),
            "FSIM": structure(y, hr).flatten().tolist(),
        }
        if "degradation" in tags:
            row["degradation"] = rewards.degradation_reward(
                texts, [degradation.to_words(la) for la in data.labels[at : at + batch]]
            )
        if "rough_understand" in tags:
            row["understanding"] = rewards.understanding_reward(
                texts, [s.tags for s in data.scenes[at : at + batch]]
            )
        for name, values in row.items():
            out.setdefault(name, []).extend(values)
    return out


def train_layout(name: str, seed: int, budget: SftBudget, bench: Bench, out: Path) -> Models:
    """Fine-tune policy-sft on chains of this layout, or take the policy that is in `out` already;
    the log goes to `out`.csv."""
    try:
        return replace(bench.models, policy=policy.load(out, bench.models.device))
    except (FileNotFoundError, ValueError):
        pass  # not trained yet, or cut short while it was saved
    n, first = budget.steps * budget.batch, FIRST_SEED + 20_000 * seed
    data, m = scenes.pairs(range(first, first + n), "train"), bench.models
    table = sft.chains(
        data, m.tokenizer, m.reader, m.policy.vocabulary, name == "direct", tags=LAYOUTS[name]
    )
    options = {
        "batch": budget.batch,
        "lr": budget.lr,
        "max_steps": budget.steps,
        "seed": seed,
        "device": bench.device,
    }
    sft.train_sft(
        table, None, out, m.tokenizer, m.reader, init=bench.weights / "policy-sft", **options
    )
    return replace(bench.models, policy=policy.load(out, bench.models.device))


def run_sft(
    bench: Bench,
    out: Path,
    what: Iterable[str] | None = None,
    seeds: Iterable[int] = (0, 1, 2),
    budget: SftBudget = SftBudget(),
) -> None:
    """Fine-tune and measure the layouts (None: all of LAYOUTS). The chain is trained on like the
    others, so all start alike."""
    names, store = chosen(what, LAYOUTS), Store(out, "sft")

    def run(name: str, seed: int) -> dict[str, list[float]]:
        store.claim(
            name,
            seed,
            {
                "tags": list(LAYOUTS[name]),
                "seed": seed,
                "weights": bench.scoring["weights"],
                **vars(budget),
            },
        )
        models = train_layout(name, seed, budget, bench, store.path(name, seed))
        return measure(models, bench.data, Sampling(), 0, LAYOUTS[name], name == "direct")

    each(store, names, seeds, bench.scoring, run)


def told_texts(name: str, data: scenes.Pairs) -> list[dict[str, str]]:
    """What variant `name` of TEXTS tells each scene: {tag: text}. "wrong" takes the next scene's
    texts."""
    whose, tags = TEXTS[name]
    shift = 1 if whose == "wrong" else 0
    rows = [texts_of(data, (i + shift) % len(data)) for i in range(len(data))]
    return [{t: row[t] for t in tags} for row in rows]


def run_inference(
    question: str,
    bench: Bench,
    out: Path,
    what: Iterable[str] | None = None,
    seeds: Iterable[int] = (0, 1, 2),
) -> None:
    """Measure policy-sft with each variant of "text" or "sampling" (None: all); seeds are of the
    sampling noise."""
    known = {"text": TEXTS, "sampling": SAMPLINGS}[question]
    names, store = chosen(what, known), Store(out, question)

    def run(name: str, seed: int) -> dict[str, list[float]]:
        if question == "text":
            return measure(
                bench.models, bench.data, Sampling(), seed, told=told_texts(name, bench.data)
            )
        return measure(bench.models, bench.data, SAMPLINGS[name], seed)

    each(store, names, seeds, bench.scoring, run)
