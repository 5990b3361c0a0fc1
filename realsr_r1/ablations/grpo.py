"""Ablations of the reinforcement learning: what each reward, the KL, the group's size and sampled
text are worth, and how rewards are gamed.

    python -m realsr_r1.first ablate grpo     each variant trained from policy-sft with an equal
      budget, a run for each seed
    python -m realsr_r1.first ablate hack     rewards trained until they are gamed, the remedies,
      and what held-out measures do meanwhile

A run is a folder entry `QUESTION/VARIANT_SEED`: its settings, its log, the policy, and the scores
of every held-out scene. All runs are scored on the same scenes with the same noise, so every
difference is paired. A finished run is skipped, a killed one resumes, and the same command may run
several times at once: each run is locked by the process that does it.
"""

import csv
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import TrainerCallback

from realsr_r1 import perceptual
from realsr_r1.common import device_of
from realsr_r1.evaluation import policies as compare
from realsr_r1.evaluation.benchmark import fingerprint
from realsr_r1.first import degradation, experts, grpo, policy, rewards, scenes, sft, vlcot
from realsr_r1.first.grpo import PAPER_REWARDS, GrpoSettings
from realsr_r1.first.policy import Sampling
from realsr_r1.first.restore import Models, decode_final, load_models
from realsr_r1.first.weights import WEIGHTS


@dataclass(frozen=True)
class Budget:
    """What one run of a question may use. The number of chains a step is `prompts` × `group` in
    every variant."""

    steps: int
    prompts: int
    group: int = 8
    lr: float = 2e-4
    beta: float = 0.02  # weight of the KL where it is on
    # sampled of each chain in text-only rollouts: the degradation and a rough text of up to 24
    # words
    words: int = 40


@dataclass(frozen=True)
class Variant:
    """One way to train: the rewards, a gate on their sum, and what differs from the budget's
    settings."""

    rewards: tuple[str, ...] = PAPER_REWARDS
    gate: Callable | None = None
    changes: Mapping = field(default_factory=dict)
    text_only: bool = False
    lists: bool = False  # start from `talkative` instead of policy-sft


@rewards.needs("degradation")
def reading_gate(completions, degradation, **_) -> list[float]:
    """1 if at least four of the five degradation labels are right, otherwise 0. (The format gate
    cannot close under the grammar.)"""
    return [float(r >= 0.8) for r in rewards.degradation_reward(completions, degradation)]


def caption_gate(completions, **_) -> list[float]:
    """1 if the rough text has the length of a true rough caption ("a bird on grass": four words),
    otherwise 0."""
    return [
        float(len((vlcot.parse(rewards.text_of(c)).rough_understand or "").split()) == 4)
        for c in completions
    ]


GRPO = {
    "all": Variant(),
    **{
        f"no-{name}": Variant(tuple(r for r in PAPER_REWARDS if r != name))
        for name in PAPER_REWARDS
    },
    "no-kl": Variant(changes={"beta": 0.0}),
    **{f"group-{n}": Variant(changes={"group": n}) for n in (2, 4, 16)},
    "greedy-text": Variant(changes={"greedy_text": True}),
}
OFF = {"beta": 0.0}
# Recall alone is about the first text only, so these sample nothing but the texts before the first
# image; their gate asks for the form of a caption. policy-sft says four words in 99% of chains, so
# a group never sees that a list would pay (runs from it, and from it at a higher temperature, lost
# reward); these start from a policy that has learnt to list, too.
TEXT = {"text_only": True, "lists": True}
HACK = {
    "generation": Variant(("generation",), changes=OFF),
    "generation-kl": Variant(("generation",)),
    "generation-gate": Variant(("generation",), reading_gate, OFF),
    "mix": Variant(changes=OFF),
    "recall": Variant(("understanding",), changes=OFF, **TEXT),
    "recall-kl": Variant(("understanding",), **TEXT),
    "recall-gate": Variant(("understanding",), caption_gate, OFF, **TEXT),
    "f1": Variant(("understanding_f1",), changes=OFF, **TEXT),
}
BUDGETS = {"grpo": Budget(5, 4, lr=6e-4), "hack": Budget(16, 2, lr=1e-3, beta=0.1)}
# Text-only runs are far cheaper a chain, so many times more steps and prompts; and few words
# decide, so a lower rate.
TEXT_BUDGET = {"steps": 1.875, "prompts": 4, "lr": 0.2}


def settings_of(variant: Variant, budget: Budget, seed: int) -> GrpoSettings:
    """The run's settings: the budget's, but for what the variant changes; chains a step stay the
    same whatever the group.

    Raises ValueError where the chains of a step do not divide into groups of the variant's size.
    """
    steps, prompts, lr = budget.steps, budget.prompts, budget.lr
    if variant.text_only:
        steps, prompts, lr = (
            round(steps * TEXT_BUDGET["steps"]),
            prompts * TEXT_BUDGET["prompts"],
            lr * TEXT_BUDGET["lr"],
        )
    chains, group = prompts * budget.group, variant.changes.get("group", budget.group)
    if chains % group:
        raise ValueError(
            f"{chains} chains a step do not divide into groups of {group}: change --prompts or "
            f"--group"
        )
    micro = next(n for n in (16 if variant.text_only else 8, 4, 2, 1) if chains % n == 0)
    options = {
        "steps": steps,
        "prompts": chains // group,
        "group": group,
        "micro_batch": micro,
        "lr": lr,
        "beta": budget.beta,
        "save_steps": 4,
        "seed": seed,
    }
    return GrpoSettings(
        **options | dict(variant.changes) | ({"words": budget.words} if variant.text_only else {})
    )


def write(path: Path, text: str) -> None:
    """Write a file at once, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


@dataclass
class Store:
    """The folder `out` of a question's runs: for each `variant`_`seed` the settings, a lock and the
    scores by scene."""

    out: Path
    question: str

    def path(self, variant: str, seed: int, ending: str = "") -> Path:
        return self.out / self.question / f"{variant}_{seed}{ending}"

    def scores(self, variant: str, seed: int) -> dict | None:
        """{"scoring": what was measured on, "scores": {measure: a value for each scene}}, or None
        if the run is not finished."""
        path = self.path(variant, seed, ".scores.json")
        return json.loads(path.read_text()) if path.exists() else None

    def claim(self, variant: str, seed: int, settings: dict) -> None:
        """Keep the run's settings. Raises ValueError if the folder holds this run
        with other ones."""
        path, settings = (
            self.path(variant, seed, ".settings.json"),
            json.loads(json.dumps(settings)),
        )
        # A run of an earlier version lacks settings that came later; these two were as they are by
        # default.
        kept = (
            settings | {"gate": None, "lists": False} | json.loads(path.read_text())
            if path.exists()
            else settings
        )
        if what := [
            f"{k} {kept[k]} there, {settings[k]} here" for k in settings if kept[k] != settings[k]
        ]:
            raise ValueError(
                f"{self.question}/{variant}_{seed} was begun with other settings "
                f"({', '.join(what)}): use them, or another --out"
            )
        write(path, json.dumps(settings, indent=1))

    @contextmanager
    def turn(self, variant: str, seed: int) -> Iterator[bool]:
        """True for the one process that may do this run now, False for the others."""
        path = self.path(variant, seed, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def finish(
        self, variant: str, seed: int, scoring: dict, scores: dict[str, list[float]]
    ) -> None:
        """Keep the scores, and write the question's CSV anew: a row of means for each run that is
        finished."""
        write(
            self.path(variant, seed, ".scores.json"),
            json.dumps({"scoring": scoring, "scores": scores}),
        )
        rows = []
        for path in sorted((self.out / self.question).glob("*.scores.json")):
            name, _, number = path.name.removesuffix(".scores.json").rpartition("_")
            kept = json.loads(path.read_text())["scores"]
            means = {k: round(sum(v) / len(v), 6) for k, v in kept.items()}
            rows.append(
                {
                    "question": self.question,
                    "variant": name,
                    "seed": number,
                    "scenes": len(next(iter(kept.values()))),
                    **means,
                }
            )
        names = list(dict.fromkeys(k for r in rows for k in r))
        lines = [",".join(names), *(",".join(str(r.get(n, "")) for n in names) for r in rows)]
        write(self.out / f"{self.question}.csv", "\n".join([*lines, ""]))


@dataclass
class Bench:
    """What every run needs: shipped models, held-out scenes, the expert that is the reward, and the
    folder of the weights.

    The policy is on `device`; the rest stays on the CPU, where rewards and measures are computed.
    """

    models: Models
    data: scenes.Pairs
    expert: Callable[[Tensor], Tensor]
    weights: Path = WEIGHTS
    split: str = "test"
    device: str | None = None

    @staticmethod
    def load(
        n: int = 96,
        split: str = "test",
        weights: Path = WEIGHTS,
        data: Path | None = None,
        device: str | None = None,
    ) -> "Bench":
        models = load_models("cpu", weights)
        models.policy.to(device_of(device))
        expert = experts.load_expert("nano", path=weights / "expert.safetensors")
        return Bench(
            models, scenes.cached_pairs(n, split, cache=data), expert, weights, split, device
        )

    @property
    def scoring(self) -> dict:
        """What scores depend on besides the run."""
        files = [
            self.weights / f"{n}.safetensors" for n in ("tokenizer", "reader", "guided", "expert")
        ]
        return {
            "n": len(self.data),
            "split": self.split,
            "weights": fingerprint(self.weights / "policy-sft", *files),
        }


def chosen(what: Iterable[str] | None, known: Mapping) -> list[str]:
    """The variants asked for (None: all). Raises ValueError for an unknown name."""
    names = list(what or known)
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"no variant {unknown[0]!r}; choose from {', '.join(known)}")
    return names


def each(
    store: Store,
    names: Iterable[str],
    seeds: Iterable[int],
    scoring: dict,
    run: Callable[[str, int], dict],
) -> None:
    """Do what is left of the runs, seed by seed, so that an early stop leaves whole seeds:
    `run(variant, seed)` → scores by scene."""
    for seed in seeds:
        for name in names:
            with store.turn(name, seed) as mine:
                done = store.scores(name, seed) if mine else None
                # What an earlier version did not note is taken as the same.
                if not mine or (
                    done and all(done["scoring"].get(k, v) == v for k, v in scoring.items())
                ):
                    print(
                        f"{store.question}/{name}_{seed}: "
                        f"{'done before' if mine else 'another process is at it'}",
                        flush=True,
                    )
                    continue
                started = time.time()
                store.finish(name, seed, scoring, run(name, seed))
                print(
                    f"{store.question}/{name}_{seed}: {(time.time() - started) / 60:.1f} min",
                    flush=True,
                )


def train(
    variant: Variant,
    settings: GrpoSettings,
    bench: Bench,
    out: Path,
    callbacks: Iterable[TrainerCallback] = (),
) -> Models:
    """Train policy-sft in this way, or take the policy that is in `out` already; the log goes to
    `out`.csv."""
    try:
        return replace(bench.models, policy=policy.load(out, bench.models.device))
    except (FileNotFoundError, ValueError):
        pass  # not trained yet, or cut short while it was saved
    functions, weights = grpo.named_rewards(variant.rewards, bench.models.tokenizer, bench.expert)
    if variant.gate:
        functions = [rewards.gated(f, variant.gate) for f in functions]
    first = (
        grpo.FIRST_SEED + 100_000 * settings.seed
    )  # the same prompts in every variant, as far as they go
    dataset = grpo.prompts(
        range(first, first + settings.steps * settings.prompts),
        bench.models.reader,
        bench.models.policy.vocabulary,
    )
    start = (
        talkative(bench, out.parent / "talkative")
        if variant.lists
        else bench.weights / "policy-sft"
    )
    grpo.train_grpo(
        start, dataset, functions, out, replace(settings, weights=weights), callbacks, bench.device
    )
    shutil.rmtree(out.with_name(f"{out.name}-checkpoints"), ignore_errors=True)
    return replace(bench.models, policy=policy.load(out, bench.models.device))


class Listed(scenes.Scene):
    """A scene of which the rough caption is a list: its two tags among six other things, in any
    order."""

    @property
    def captions(self) -> tuple[str, str, str]:
        rng = random.Random(f"{self.category} {self.background} {self.horizontal} {self.vertical}")
        things = [*self.tags, *rng.sample(sorted(rewards.tag_nouns() - set(self.tags)), 6)]
        return " ".join(rng.sample(things, len(things))), *super().captions[1:]


def talkative(bench: Bench, out: Path, steps: int = 60, batch: int = 8, every: int = 3) -> Path:
    """The folder `out` with policy-sft after `steps` steps on chains of which every third says a
    list for a rough caption."""
    m, first = bench.models, 300_000  # compositions that nothing else is trained on
    if not (out / "nano.json").exists():
        data = scenes.pairs(range(first, first + steps * batch), "train")
        data.scenes = [
            Listed(**vars(s)) if i % every == 0 else s for i, s in enumerate(data.scenes)
        ]
        table = sft.chains(data, m.tokenizer, m.reader, m.policy.vocabulary)
        options = {"batch": batch, "lr": 1e-3, "max_steps": steps, "device": bench.device}
        sft.train_sft(
            table, None, out, m.tokenizer, m.reader, init=bench.weights / "policy-sft", **options
        )
    return out


def score(models: Models, bench: Bench) -> dict[str, list[float]]:
    """`compare.score_policy` with the noise that all runs share."""
    return compare.score_policy(models, bench.data, bench.expert, Sampling.rollout(), seed=0)


def run_grpo(
    question: str,
    bench: Bench,
    out: Path,
    what: Iterable[str] | None = None,
    seeds: Iterable[int] = (0, 1, 2),
    budget: Budget | None = None,
    probe: int = 32,
) -> None:
    """Train and score the variants of "grpo" or "hack" (None: all), and policy-sft once as their
    common baseline.

    "hack" also measures five times on `probe` validation scenes (`VARIANT_SEED.curve.csv`) and,
    where the reward is on pictures, keeps those of a fixed group (`VARIANT_SEED_STEP.png`).
    """
    known, budget, store = (
        {"grpo": GRPO, "hack": HACK}[question],
        budget or BUDGETS[question],
        Store(out, question),
    )
    names, seeds = chosen(what, known), list(seeds)
    plans = {
        (name, seed): settings_of(known[name], budget, seed) for name in names for seed in seeds
    }  # bad ones stop here
    each(store, ["policy-sft"], [0], bench.scoring, lambda *_: score(bench.models, bench))
    held = (
        scenes.pairs(range(scenes.FIRST_SEED["val"], scenes.FIRST_SEED["val"] + probe), "val")
        if question == "hack"
        else None
    )
    both = {"nano": bench.expert, "piqe": experts.load_expert("piqe")} if question == "hack" else {}

    def run(name: str, seed: int) -> dict[str, list[float]]:
        settings, at = plans[name, seed], store.path(name, seed)
        described = {k: v for k, v in vars(settings).items() if k not in ("weights", "save_steps")}
        v = known[name]
        special = {
            "gate": v.gate and v.gate.__name__,
            "lists": v.lists,
            "weights": bench.scoring["weights"],
        }
        store.claim(name, seed, {"rewards": list(v.rewards), **special, **described})
        callbacks = []
        if held is not None:
            every = max(1, settings.steps // 4)
            callbacks.append(
                Curve(at.with_name(f"{at.name}.curve.csv"), bench.models, held, both, every)
            )
        if held is not None and not known[name].text_only:
            shown = replace(settings, sheet_steps=2 * every)
            callbacks.append(
                grpo.GroupSheet(
                    at.with_name(f"{at.name}.png"),
                    bench.models.reader,
                    bench.models.tokenizer,
                    shown,
                )
            )
        return score(train(known[name], settings, bench, at, callbacks), bench)

    each(store, names, seeds, bench.scoring, run)


@torch.no_grad()
def gaming(
    models: Models,
    data: scenes.Pairs,
    both: dict[str, Callable[[Tensor], Tensor]],
    seed: int = 0,
    batch: int = 32,
) -> dict[str, float]:
    """Signs of gaming, means over `data`: what each expert says of the final image (plain decode,
    as the reward sees it), LPIPS and FSIM of the guided restoration, and of the rough text the
    share of tags named, F1, words, and things named."""
    v, structure, out = models.policy.vocabulary, experts.create("fsim"), {}
    for at in range(0, len(data), batch):
        hr, lr = (t[at : at + batch].float() / 255 for t in (data.hr, data.lr))
        prompts = v.prompts(models.reader.encode(lr))
        ids = policy.sample(
            models.policy, prompts, Sampling.rollout(), torch.Generator().manual_seed(seed + at)
        ).ids
        texts, tags = (
            [v.decode(row) for row in ids.cpu()],
            [s.tags for s in data.scenes[at : at + batch]],
        )
        chains = [vlcot.parse(t) for t in texts]
        rough = [(c.rough_understand or "").split() for c in chains]
        codes = torch.stack([c.final_image for c in chains])
        plain, restored = models.tokenizer.decode(codes), decode_final(models, codes, lr)
        row = {name: expert(plain).tolist() for name, expert in both.items()} | {
            "LPIPS": perceptual.distance(restored, hr).tolist(),
            "FSIM": structure(restored, hr).flatten().tolist(),
            "degradation": rewards.degradation_reward(
                texts, [degradation.to_words(la) for la in data.labels[at : at + batch]]
            ),
            "recall": rewards.understanding_reward(texts, tags),
            "f1": rewards.understanding_f1_reward(texts, tags),
            "words": [float(len(r)) for r in rough],
            "things": [float(len(set(r) & rewards.tag_nouns())) for r in rough],
        }
        for name, values in row.items():
            out.setdefault(name, []).extend(values)
    return {name: sum(values) / len(values) for name, values in out.items()}


class Curve(TrainerCallback):
    """Writes a row of `gaming` before the first step, every `every` steps, and at the end; a
    resumed run goes on with the file."""

    def __init__(
        self,
        path: Path,
        models: Models,
        data: scenes.Pairs,
        both: dict[str, Callable[[Tensor], Tensor]],
        every: int,
    ):
        self.path, self.models, self.data, self.both, self.every, self.rows = (
            path,
            models,
            data,
            both,
            every,
            {},
        )
        if path.exists():
            with path.open() as f:
                self.rows = {int(r["step"]): r for r in csv.DictReader(f)}

    def _measure(self, step: int, model) -> None:
        model = getattr(model, "module", model)
        self.rows = {
            s: r for s, r in self.rows.items() if s < step
        }  # after a resume the steps to come are new
        self.rows[step] = {
            "step": step,
            **gaming(replace(self.models, policy=model), self.data, self.both),
        }
        lines = [",".join(map(str, row.values())) for row in self.rows.values()]
        write(self.path, "\n".join([",".join(self.rows[step]), *lines, ""]))

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self._measure(state.global_step, model)

    def on_train_end(self, args, state, control, model=None, **_):
        if state.is_world_process_zero and state.global_step not in self.rows:
            self._measure(state.global_step, model)
