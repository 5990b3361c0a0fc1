"""VLCoT-GRPO: the policy learns from groups of its own chains, with TRL's GRPOTrainer as it is.

Ours is what TRL leaves open: the rollouts (whole chains, sampled in batches under the layout
grammar at temperature 1, a group reading its prompt once), which words count (those that the
grammar forced carry no choice and stay out of the loss), the rewards, and what is written down.
Differences to the released code, see PAPER.md's defects: text is sampled, not greedy, and at
temperature 1 without guidance or top-k (the loss sees the bare softmax, sampling the same one
restricted to the grammar: the probability between them is logged as `outside_grammar`); the KL to
the SFT policy is on; every reward's spread is logged.

Advantage, clipping and KL are TRL's: A = (r - mean of the group) / (standard deviation of the group
+ 1e-4); the KL is the k3 estimate, which TRL multiplies by the ratio (`use_bias_correction_kl`).
"""

import inspect
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from realsr_r1 import images as photos
from realsr_r1.common import device_of
from realsr_r1.first import degradation, policy, rewards, scenes, vlcot
from realsr_r1.first.policy import Sampling
from realsr_r1.first.reader import LRReader
from realsr_r1.first.sft import CsvLog, Scale, sharded, whole_model
from realsr_r1.first.tokenizer import VQModel

os.environ.setdefault(
    "TRL_EXPERIMENTAL_SILENCE", "1"
)  # rollout_func may change in TRL; our range of versions is tested
# prompts of reinforcement learning: train split, compositions that cold start has not seen
FIRST_SEED = 500_000


@dataclass(frozen=True)
class GrpoSettings:
    """One run. A step samples `prompts` groups of `group` chains, then takes one step on all of
    them, `micro_batch` at a time."""

    steps: int = 20
    prompts: int = 4
    group: int = 8
    micro_batch: int = 8
    lr: float = 2e-4
    beta: float = 0.02  # weight of the KL to the SFT policy; the released code has none
    epsilon: float = 0.2  # clipping of the ratio
    loss_type: str = "grpo"  # or any other that TRL knows: dapo, dr_grpo, …
    scale_rewards: str = "group"  # "none" leaves out the division by the group's standard deviation
    # "normalize_then_sum" (GDPO, arXiv 2601.05242) divides each reward by its own spread first, so
    # that a wide one does not drown a narrow one; "sum_then_normalize" is GRPO.
    aggregation: str = "sum_then_normalize"
    iterations: int = 1  # passes over each batch of rollouts
    weights: tuple[float, ...] | None = None  # of the rewards; None: all 1, as in the released code
    words: int | None = (
        # sample only the first words of each chain: rewards on the first texts need no more, and it
        # is far cheaper
        None
    )
    greedy_text: bool = False  # True: as in the released code; kills the rewards on text
    save_steps: int = 5
    sheet_steps: int = 10
    seed: int = 0

    def __post_init__(self):
        total = self.prompts * self.group
        if self.group < 2:
            raise ValueError(
                f"a group of {self.group} has no spread to learn from: set group to 2 or more"
            )
        if total % self.micro_batch:
            raise ValueError(
                f"{self.prompts} prompts x {self.group} completions = {total} do not divide "
                f"into micro-batches of {self.micro_batch}: change one of the three"
            )


def prompts(
    seeds: Iterable[int],
    reader: LRReader,
    vocabulary: vlcot.Vocabulary,
    split: str = "train",
    preset: str = "nano",
    batch: int = 32,
) -> Dataset:
    """Fresh collages as prompts: columns `prompt` (words), `degradation` (the five labels in
    words), `tags`, `hr` (seed and split, from which the true photo can be made again)."""
    rows, seeds = [], list(seeds)
    for at in range(0, len(seeds), batch):
        data = scenes.pairs(seeds[at : at + batch], split, preset)
        ids = vocabulary.prompts(reader.encode(data.lr.float() / 255).cpu())
        for seed, words, scene, labels in zip(
            seeds[at : at + batch], ids.tolist(), data.scenes, data.labels, strict=True
        ):
            rows.append(
                {
                    "prompt": vocabulary.decode(words),
                    "degradation": degradation.to_words(labels),
                    "tags": list(scene.tags),
                    "hr": {"seed": seed, "split": split},
                }
            )
    return Dataset.from_list(rows)


PAPER_REWARDS = ("format", "degradation", "understanding", "generation")


def named_rewards(
    names: Iterable[str], tokenizer: VQModel, expert: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[Callable], tuple[float, ...]]:
    """Rewards and their weights from words such as "generation" or "generation=2"; the first four
    are the paper's."""
    found = {
        "format": rewards.format_reward,
        "degradation": rewards.degradation_reward,
        "understanding": rewards.understanding_reward,
        "generation": rewards.GenerationReward(expert, tokenizer),
        "partial_format": rewards.partial_format_reward,
        "degradation_distance": rewards.degradation_distance_reward,
        "understanding_f1": rewards.understanding_f1_reward,
        "reference": rewards.ReferenceReward(tokenizer),
        "reference_ssim": rewards.ReferenceReward(tokenizer, "ssim"),
    }
    chosen, weights = [], []
    for word in names:
        name, _, weight = word.partition("=")
        if name not in found:
            raise ValueError(f"no reward {name!r}; choose from {', '.join(found)}")
        chosen.append(found[name])
        weights.append(float(weight or 1))
    return chosen, tuple(weights)


@dataclass
class Clock:
    """Where the time of a step goes, in seconds, and what the rollouts measured
    since the last log."""

    seconds: dict[str, float] = field(
        default_factory=lambda: {"sampling": 0.0, "rewards": 0.0, "step": 0.0}
    )
    outside: list[float] = field(
        default_factory=list
    )  # probability that bare sampling would have left the grammar, per free word
    started: float = 0.0


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turn any kind of running out of memory into one RuntimeError that says at what, and which
    knob to turn."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        known = isinstance(e, (torch.OutOfMemoryError, MemoryError)) or re.search(
            "out of memory|allocate memory", str(e)
        )  # MPS, CPU
        if not known:
            raise
        raise RuntimeError(f"memory ran out in GRPO's {what}") from e


@contextmanager
def sampler_of(trainer: GRPOTrainer) -> Iterator[torch.nn.Module]:
    """The policy ready to sample: evaluation mode (checkpointing layers drop the cache in training
    mode), and where its weights are sharded all of them on each device, so that processes may
    sample chains of different lengths."""
    with unwrap_model_for_generation(
        trainer.model_wrapped, trainer.accelerator
    ) as model:  # gathers ZeRO-3's
        units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(training)
            for unit in units:
                unit.set_reshard_after_forward(
                    trainer.accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False
                )
                unit.reshard()


class Rollouts:
    """TRL's `rollout_func`: prompts (each repeated for its group) → completions under the grammar,
    log-probabilities of the bare softmax, which the loss uses, and `env_mask`, 0 where the grammar
    left no choice.

    TRL's vLLM modes (server, colocate) cannot take its place, so no setting offers them: with a
    rollout_func TRL only copies the weights to vLLM and leaves the sampling to the function; TRL's
    own vLLM sampling returns no `env_mask`, and of the grammar it could at most take a regular
    expression. For Chameleon, vLLM masks the logits of all image codes, as transformers does, so
    that class cannot draw a picture there at all.
    """

    def __init__(self, settings: GrpoSettings, clock: Clock | None = None):
        self.settings, self.clock = settings, clock or Clock()

    @torch.no_grad()
    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        started, accelerator = time.time(), trainer.accelerator
        v, grammar = trainer.model.vocabulary, policy.grammar_of(trainer.model)
        groups = [(text, len(list(same))) for text, same in itertools.groupby(prompts)]
        copies = groups[0][1] if len({n for _, n in groups}) == 1 else 1
        unique = [text for text, _ in groups] if copies > 1 else prompts
        ids = [v.encode(text) for text in unique]
        # One stream of noise for all processes, so that two draw what one would.
        generator = torch.Generator().manual_seed(
            self.settings.seed * 1_000_003 + trainer.state.global_step
        )
        how = Sampling(greedy_text=self.settings.greedy_text, entropy_top_k=False)
        rows = (accelerator.process_index * len(prompts), accelerator.num_processes * len(prompts))
        with (
            enough_memory(
                "sampling: lower prompts, group or words (all chains of a step are sampled "
                "together)"
            ),
            sampler_of(trainer) as model,
        ):
            drawn = policy.sample(
                model,
                torch.tensor(ids),
                how,
                generator,
                grammar,
                copies=copies,
                rows=rows,
                max_new=self.settings.words,
            )
        words = drawn.ids.cpu()
        length = (words != v.ids[vlcot.PAD]).sum(1).tolist()
        free = ~grammar.forced_mask(drawn.ids).cpu() & (words != v.ids[vlcot.PAD])
        self.clock.outside.append(float(1 - (drawn.bare - drawn.logprobs).cpu()[free].exp().mean()))
        self.clock.seconds["sampling"] += time.time() - started
        return {
            "prompt_ids": [row for row in ids for _ in range(copies)],
            "completion_ids": [w[:n] for w, n in zip(words.tolist(), length, strict=True)],
            "logprobs": [p[:n] for p, n in zip(drawn.bare.tolist(), length, strict=True)],
            "env_mask": [m[:n] for m, n in zip(free.int().tolist(), length, strict=True)],
        }


class Measured:
    """A reward that is checked (`rewards.guarded`), timed, and whose share of groups without any
    spread is logged."""

    def __init__(self, reward: Callable, group: int, clock: Clock):
        self.reward, self.group, self.clock = rewards.guarded(reward), group, clock
        self.__name__ = reward.__name__

    def __call__(self, completions, log_metric: Callable | None = None, **columns) -> list[float]:
        started = time.time()
        values = self.reward(completions, **columns)
        self.clock.seconds["rewards"] += time.time() - started
        if log_metric and len(values) % self.group == 0:
            groups = torch.tensor(values).view(-1, self.group)
            log_metric(f"zero_spread/{self.__name__}", float((groups.std(1) < 1e-6).float().mean()))
        return values


class StepLog(TrainerCallback):
    """Adds the clock's readings to every logged row: seconds a step and their parts, probability
    outside the grammar."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **_):
        self.clock.started = time.time()

    def on_step_end(self, args, state, control, **_):
        self.clock.seconds["step"] += time.time() - self.clock.started

    def on_log(self, args, state, control, logs=None, **_):
        if logs is not None and "reward" in logs:
            logs |= {f"seconds/{k}": round(v, 2) for k, v in self.clock.seconds.items()}
            logs["outside_grammar"] = sum(self.clock.outside) / max(1, len(self.clock.outside))
            self.clock.seconds, self.clock.outside = dict.fromkeys(self.clock.seconds, 0.0), []


class GroupSheet(TrainerCallback):
    """Keeps a contact sheet of one fixed group: a row of its final images (plain decode) each time,
    LR and HR in front."""

    def __init__(
        self,
        path: Path,
        reader: LRReader,
        tokenizer: VQModel,
        settings: GrpoSettings,
        seed: int = 1_000_003,
    ):
        self.path, self.settings, self.tokenizer = path, settings, tokenizer
        pair = scenes.pairs([seed], "val")
        self.lr, self.hr = pair.lr.float() / 255, pair.hr.float() / 255
        self.codes, self.rows = reader.encode(self.lr), []

    @torch.no_grad()
    def _row(self, model) -> Tensor:
        """(3, h, 10·h) of LR, HR and up to eight final images."""
        how = Sampling(greedy_text=self.settings.greedy_text, entropy_top_k=False)
        prompts = model.vocabulary.prompts(self.codes)
        ids = policy.sample(
            model,
            prompts,
            how,
            torch.Generator().manual_seed(0),
            copies=min(8, self.settings.group),
        ).ids.cpu()
        chains = [vlcot.parse(model.vocabulary.decode(row)) for row in ids]
        codes = torch.stack([c.final_image for c in chains])
        images = self.tokenizer.decode(codes.to(next(self.tokenizer.parameters()).device)).cpu()
        lr = torch.nn.functional.interpolate(self.lr, size=self.hr.shape[-1], mode="nearest")
        return torch.cat([*lr, *self.hr, *images], -1)

    def _save(self, model, state) -> None:
        # One process alone cannot run a model whose weights are spread over several.
        if state.is_world_process_zero and not sharded():
            model = getattr(model, "module", model)
            training = model.training
            photos.to_image(self._row(model.eval())).save(
                self.path.with_name(f"{self.path.stem}_{state.global_step:04d}.png")
            )
            model.train(training)

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step % self.settings.sheet_steps == 0:
            self._save(model, state)

    def on_train_end(self, args, state, control, model=None, **_):
        self._save(model, state)


def check_columns(dataset: Dataset, functions: Iterable[Callable]) -> None:
    """Raise ValueError naming the first column that a reward needs (`columns` of ours, a parameter
    without a default of others) and the dataset lacks: before anything is sampled."""
    given = {"prompts", "completions", "completion_ids", *dataset.column_names}
    for reward in functions:
        named = [
            p
            for p in inspect.signature(reward).parameters.values()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        for name in (
            *getattr(reward, "columns", ()),
            *(p.name for p in named if p.default is p.empty),
        ):
            if name not in given:
                raise ValueError(
                    f"reward {reward.__name__} needs the column {name!r}, the dataset has "
                    f"{', '.join(dataset.column_names)}: add it"
                )


def make_trainer(
    sft: str | Path,
    dataset: Dataset,
    reward_functions: list[Callable],
    out: Path,
    settings: GrpoSettings = GrpoSettings(),
    callbacks: Iterable[TrainerCallback] = (),
    device: str | None = None,
    scale: Scale = Scale(),
) -> GRPOTrainer:
    """TRL's GRPOTrainer on the policy in folder `sft`. Logs go to `out`.csv, checkpoints to
    `out`-checkpoints. `scale` makes larger models fit (its `accumulate` has no say here:
    `micro_batch` decides)."""
    check_columns(dataset, reward_functions)
    dev, clock = device_of(device), Clock()
    model = policy.load(sft, dtype=scale.dtype)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    total = settings.prompts * settings.group
    if total % (world * settings.micro_batch):
        raise ValueError(
            f"{total} completions a step do not divide among {world} processes in micro-batches "
            f"of {settings.micro_batch}"
        )
    args = GRPOConfig(
        output_dir=str(out.with_name(f"{out.name}-checkpoints")),
        max_steps=settings.steps,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=total // (world * settings.micro_batch),
        num_generations=settings.group,
        num_iterations=settings.iterations,
        beta=settings.beta,
        epsilon=settings.epsilon,
        loss_type=settings.loss_type,
        scale_rewards=settings.scale_rewards,
        multi_objective_aggregation=settings.aggregation,
        reward_weights=list(settings.weights) if settings.weights else None,
        temperature=1.0,
        max_completion_length=policy.grammar_of(model).max_length,
        mask_truncated_completions=False,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
        shuffle_dataset=False,
        bf16=False,  # sampling and loss must see the same log-probabilities
        use_cpu=dev.type == "cpu",
        logging_steps=1,
        save_steps=settings.save_steps,
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=False,
        average_tokens_across_devices=False,
        **scale.arguments,
    )
    trainer = GRPOTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        peft_config=scale.lora,
        processing_class=model.vocabulary.tokenizer,
        rollout_func=Rollouts(settings, clock),
        reward_funcs=[Measured(r, settings.group, clock) for r in reward_functions],
        callbacks=[StepLog(clock), CsvLog(out.with_suffix(".csv")), *callbacks],
    )
    output = trainer.model.get_output_embeddings()
    if scale.lora is not None and not hasattr(output, "bias"):
        output.bias = (
            None  # TRL's fused head asks for it; PEFT's wrapper of trained rows does not have it
        )
    return trainer


FREE = ("steps", "save_steps", "sheet_steps")  # settings that may change when a run goes on


def claim(out: Path, sft: Path, reward_functions: list[Callable], settings: GrpoSettings) -> None:
    """Note beside the checkpoints what their run is. Raises ValueError where they are of a run with
    other settings."""
    path = out.with_name(f"{out.name}-checkpoints") / "run.json"
    run = {"start": sft.name, "rewards": [r.__name__ for r in reward_functions]}
    run = json.loads(
        json.dumps(run | {k: v for k, v in asdict(settings).items() if k not in FREE})
    )  # as it will be read
    if path.exists() and checkpoints(out):
        kept = json.loads(path.read_text())
        if other := [
            f"{k} {kept[k]} there, {run.get(k)} here" for k in kept if kept[k] != run.get(k)
        ]:
            raise ValueError(
                f"{path.parent.name} are of another run ({', '.join(other)}): give this one "
                f"another name, or remove them"
            )
    elif int(os.environ.get("RANK", "0")) == 0:
        path.parent.mkdir(
            exist_ok=True
        )  # nothing was trained there yet, so whatever was noted does not bind
        part = path.with_suffix(".part")
        part.write_text(json.dumps(run, indent=1))
        part.replace(path)


def checkpoints(out: Path) -> list[int]:
    """The steps of the checkpoints of the run in `out`, in order."""
    return sorted(
        int(p.name.rpartition("-")[2])
        for p in out.with_name(f"{out.name}-checkpoints").glob("checkpoint-*")
    )


def train_grpo(
    sft: str | Path,
    dataset: Dataset,
    reward_functions: list[Callable],
    out: str | Path,
    settings: GrpoSettings = GrpoSettings(),
    callbacks: Iterable[TrainerCallback] = (),
    device: str | None = None,
    scale: Scale = Scale(),
) -> GRPOTrainer:
    """Improve the policy in the folder `sft` and save it to the folder `out`, which `restore`
    takes.

    The same call after a kill resumes from the last checkpoint (at most `save_steps` steps are
    lost), with more `steps` it goes on, and a finished run stays as it is. Raises RuntimeError with
    one sentence if memory runs out, ValueError for settings, columns or rewards that do not fit, or
    differ from those of the run that is there.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(sft, dataset, reward_functions, out, settings, callbacks, device, scale)
    claim(out, Path(sft), reward_functions, settings)
    model, done = trainer.model, checkpoints(out)
    config, vocabulary = model.nano, model.vocabulary
    if (
        done and done[-1] >= settings.steps and (out / "nano.json").exists()
    ):  # written after the weights
        print(f"{out.name}: its {done[-1]} steps are done; for more, give more steps", flush=True)
        return trainer
    with enough_memory("gradient: lower micro_batch (same result, slower)"):
        trainer.train(resume_from_checkpoint=bool(done) or None)
    trained = whole_model(trainer)
    if trained is not None:
        trained.nano, trained.vocabulary = config, vocabulary
        policy.save(trained, out)
    return trainer
