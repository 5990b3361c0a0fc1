"""VLCoT-GRPO: the policy learns from groups of its own chains, with TRL's GRPOTrainer (unforked).

Ours is what TRL leaves open. Rollouts: whole chains under the layout grammar at temperature 1. One
distribution: that grammar masks the logits in the loss, the KL and the entropy, too. Credit by
part: a reward acts on the tokens that it can depend on. The formulas are in `objective`.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Array3D, Dataset, Features, List, Value
from torch import Tensor
from transformers import GenerationConfig, TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer

from realsr_r1.common import check_number, device_of
from realsr_r1.objective import group_advantages
from realsr_r1.photographs import Pairs, Photograph
from realsr_r1.policy import ChainPolicy
from realsr_r1.rewards import guarded
from realsr_r1.sampling import Sampling, grammar_logprobs, sample
from realsr_r1.vlcot import PAD, TAGS

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func may change; we pin TRL
# The part of a chain at whose end a reward is decided; the others need the whole chain.
DECIDED = {"degradation_reward": "degradation", "understanding_reward": "rough_understand"}
# The first words alone: sampled in a twentieth of a chain's time, enough for these two rewards.
WORDS = tuple(DECIDED.values())


@dataclass(frozen=True)
class GrpoSettings:
    """One run. A step samples `prompts` groups of `group` chains and takes one step on them all."""

    steps: int = 40
    prompts: int = 4
    group: int = 8
    micro_batch: int = 8  # chains in one backward pass
    lr: float = 2e-4
    beta: float = 0.02  # weight of the KL to the start; the released code has none
    epsilon: float = 0.2  # clipping of the ratio
    loss_type: str = "grpo"  # or another that TRL knows: dapo, dr_grpo, …
    weights: tuple[float, ...] | None = None  # of the rewards; None: all 1, as released
    parts: tuple[str, ...] = TAGS  # of the chain that are written; see WORDS
    by_part: bool = True  # credit by part; False: every reward on every token
    save_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "group", "micro_batch", "save_steps"):
            check_number(name, getattr(self, name), 1)
        for name in ("lr", "beta"):
            check_number(name, getattr(self, name), 0.0)
        check_number("epsilon", self.epsilon, 0.001, 0.999)
        for i, weight in enumerate(self.weights or ()):
            check_number(f"the weight of reward {i + 1}", weight, 0.0)
        total = self.prompts * self.group
        if self.group < 2:
            raise ValueError(f"a group of {self.group} has no spread to learn from: take 2 or more")
        if total % self.micro_batch:
            raise ValueError(
                f"{self.prompts} prompts x {self.group} chains do not divide into micro-batches of "
                f"{self.micro_batch}: change one of the three"
            )


def prompts(photos: list[Photograph], n: int, preset: str = "nano", seed: int = 0) -> Dataset:
    """Rows for the trainer: lr (3, 32, 32) uint8, and for the rewards degradation, tags, hr."""
    data, rows = Pairs(photos, preset, seed=seed), []
    for item in (data[i] for i in range(n)):
        row = {"prompt": "<restore>", "degradation": item["degradation"], "tags": item["tags"]}
        rows.append(row | {k: item[k].numpy() for k in ("lr", "hr")})
    # As arrays: lists of lists of numbers would take longer to read than a step does.
    pictures = {k: Array3D(rows[0][k].shape, "uint8") for k in ("lr", "hr")}
    words = {"prompt": Value("string"), "degradation": Value("string")}
    features = Features(**words, **pictures, tags=List(Value("string")))
    return Dataset.from_list(rows, features=features)


def part_advantages(rewards: Tensor, weights: Tensor, decided: list[Tensor], group: int) -> Tensor:
    """Advantage of every token (n, t), from the rewards (n, k), weighted (k,), that are still open
    when it is written. `decided`: for each reward the last place (n,) that it depends on. The
    `group` chains of a prompt are adjacent."""
    length = int(torch.stack(decided).max()) + 1
    place = torch.arange(length, device=rewards.device)
    open_ = torch.stack([place[None] <= d[:, None] for d in decided], 2)  # (n, t, k)
    out = torch.zeros(len(rewards), length, device=rewards.device)
    for pattern in open_.flatten(0, 1).unique(dim=0):
        if not pattern.any():
            continue
        some = group_advantages(rewards @ (weights * pattern), group)
        out = torch.where((open_ == pattern).all(2), some[:, None], out)
    return out


def without_dropout(policy: ChainPolicy) -> ChainPolicy:
    """The same policy, whose loss now sees the probabilities that it samples from."""
    policy.drop.p = 0.0
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return policy


class ChainGRPOTrainer(GRPOTrainer):
    """TRL's trainer with the LR photo beside the tokens and the grammar on the logits; see
    `train_grpo` for what it takes."""

    def __init__(
        self,
        policy: ChainPolicy,
        dataset: Dataset,
        rewards: list[Callable],
        out: Path,
        settings: GrpoSettings,
        device: str | None = None,
    ):
        check_columns(dataset, rewards)
        out.mkdir(parents=True, exist_ok=True)
        policy = without_dropout(policy)
        start = copy.deepcopy(policy) if settings.beta else None  # before TRL changes its methods
        policy.generation_config = GenerationConfig()  # TRL sets its own sampler up; it is not used
        self.out, self.settings, self.lr, self.rewards = out, settings, None, None
        super().__init__(
            model=policy,
            args=arguments(out, settings, device, policy.grammar(settings.parts).max_length),
            train_dataset=dataset.with_format("numpy", ["lr", "hr"], output_all_columns=True),
            processing_class=policy.vocabulary.tokenizer,
            reward_funcs=[guarded(r) for r in rewards],
            rollout_func=self._rollouts,
            callbacks=[CsvLog(out / "log.csv")],
        )
        self.policy = self.accelerator.unwrap_model(self.model)
        self.grammar = self.policy.grammar(settings.parts).to(self.accelerator.device)
        if start is not None:
            self.beta, self.ref_model = settings.beta, self.reference(start)

    def reference(self, policy: ChainPolicy) -> ChainPolicy:
        """The start, from which the KL is measured, where it is used."""
        return policy.to(self.accelerator.device).eval().requires_grad_(False)

    def whole(self) -> ChainPolicy:
        """The policy with all of its weights, in the main process."""
        return self.policy

    @torch.no_grad()
    def _rollouts(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's `rollout_func`: chains for the photos in `self.lr`, `group` for each of them."""
        group, vocabulary = self.settings.group, self.policy.vocabulary
        seed = self.settings.seed * 1_000_003 + self.state.global_step
        lr, how, training = self.lr[::group], Sampling.rollout(group), self.policy.training
        # A photo's chains are the same, whichever process draws them.
        first = seed * 10_007 + self.accelerator.process_index * len(lr)
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(lr))]
        self.policy.eval()
        drawn = sample(self.policy, lr, how, generators, self.grammar)
        self.policy.train(training)
        length = (drawn.ids != vocabulary.ids[PAD]).sum(1).tolist()
        free = ~self.grammar.forced[self.grammar.states(drawn.ids)]  # forced tokens teach nothing
        parts = {"completion_ids": drawn.ids, "logprobs": drawn.logprobs, "env_mask": free.int()}
        out = {
            k: [r[:n] for r, n in zip(x.tolist(), length, strict=True)] for k, x in parts.items()
        }
        return out | {"prompt_ids": [vocabulary.prompt for _ in prompts]}

    def _calculate_rewards(self, *args) -> Tensor:
        self.rewards = super()._calculate_rewards(*args)
        return self.rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """TRL's batch, with the photos beside it and the advantages by part."""
        lr = torch.stack([torch.as_tensor(x["lr"]) for x in inputs]).to(self.accelerator.device)
        self.lr = lr.float() / 255
        out = super()._generate_and_score_completions(inputs)
        out["pixel_values"], self.lr = self.lr, None
        if self.settings.by_part:
            ids = out["completion_ids"]
            here = self.accelerator.process_index * len(ids)  # TRL gathers all processes' rewards
            decided = [self._decided(ids, name) for name in self.reward_func_names]
            found = part_advantages(
                self.rewards[here : here + len(ids)],
                self.reward_weights.to(ids.device),
                decided,
                self.settings.group,
            )
            rest = ids.shape[1] - found.shape[1]  # after the last reward is decided: nothing
            out["advantages"] = F.pad(found, (0, rest))
        return out

    def _decided(self, ids: Tensor, reward: str) -> Tensor:
        """Place (n,) of the last token that a reward depends on."""
        last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        if reward not in DECIDED:
            return last
        closed = ids == self.policy.vocabulary.ids[f"</{DECIDED[reward]}>"]
        return torch.where(closed.any(1), closed.int().argmax(1), last)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **more,
    ):
        """Under the grammar, as `sampling.sample` draws: the one method that must differ."""
        pixels, logps, entropies = more.get("pixel_values", self.lr), [], []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            ids, n = input_ids[rows], logits_to_keep
            logp = grammar_logprobs(model, pixels[rows], ids, n, self.grammar)
            logps.append(logp.gather(-1, ids[:, -n:, None])[..., 0])
            if compute_entropy:
                entropies.append(-(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1).detach())
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None


class CsvLog(TrainerCallback):
    """Every logged row in one CSV file; a run that goes on goes on with it."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            pd.DataFrame(state.log_history).to_csv(self.path, index=False)


def arguments(out: Path, settings: GrpoSettings, device: str | None, length: int) -> GRPOConfig:
    """TRL's configuration of a run."""
    s, processes = settings, int(os.environ.get("WORLD_SIZE", "1"))
    if s.prompts % processes or s.prompts // processes * s.group % s.micro_batch:
        raise ValueError(
            f"{s.prompts} prompts x {s.group} chains in micro-batches of {s.micro_batch} cannot be "
            f"shared by {processes} processes: each takes whole groups and whole micro-batches"
        )
    where = device_of(device)
    if where.index:
        raise ValueError(f"leave --device out and set CUDA_VISIBLE_DEVICES={where.index}")
    return GRPOConfig(
        output_dir=str(out / "checkpoints"),
        max_steps=s.steps,
        learning_rate=s.lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=s.micro_batch,
        gradient_accumulation_steps=s.prompts // processes * s.group // s.micro_batch,
        num_generations=s.group,
        beta=0.0,  # ours is set afterwards: TRL would load the reference by its own classes
        epsilon=s.epsilon,
        loss_type=s.loss_type,
        reward_weights=list(s.weights) if s.weights else None,
        max_completion_length=length,
        temperature=1.0,
        seed=s.seed,
        data_seed=s.seed,
        shuffle_dataset=False,
        bf16=False,  # sampling and loss must see the same log-probabilities
        gradient_checkpointing=False,
        use_cpu=where.type == "cpu",
        logging_steps=1,
        save_steps=s.save_steps,
        save_total_limit=2,
        report_to=[],
        remove_unused_columns=False,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )


def check_columns(dataset: Dataset, rewards: list[Callable]) -> None:
    """Raise ValueError naming the first column that a reward needs and the dataset lacks."""
    for reward in rewards:
        for column in getattr(reward, "columns", ()):
            if column not in dataset.column_names:
                raise ValueError(f"reward {reward.__name__} needs the column {column!r}: add it")


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in a folder that was saved to its end: with its state, written last."""
    found = folder.glob("checkpoint-[0-9]*")
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
            return str(path)
        except (OSError, ValueError):
            print(f"{path.name} was cut short while it was saved: passed over", flush=True)
    return None


def train_grpo(
    policy: ChainPolicy,
    dataset: Dataset,
    rewards: list[Callable],
    out: str | Path,
    settings: GrpoSettings = GrpoSettings(),
    device: str | None = None,
) -> ChainPolicy:
    """Improve a policy; its weights go to `out`, the log to `out`/log.csv.

    Args:
        policy: where to start; it is also the reference of the KL, and is trained in place.
        dataset: of `prompts`, with the columns that the rewards need.
        out: a folder. A killed run goes on from its last checkpoint there.
        device: cpu, cuda or mps; None takes the best there is.
    Raises ValueError, in one sentence, for a missing column or a reward that misbehaves."""
    return finish(ChainGRPOTrainer(policy, dataset, rewards, Path(out), settings, device))


def finish(trainer: ChainGRPOTrainer) -> ChainPolicy:
    """Train to the end, from the last checkpoint on; the main process saves the policy."""
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.out / "checkpoints"))
    trained = trainer.whole().cpu().half()
    if trainer.accelerator.is_main_process:
        trained.save_pretrained(trainer.out)
    trainer.accelerator.wait_for_everyone()
    return trained.float().eval()
