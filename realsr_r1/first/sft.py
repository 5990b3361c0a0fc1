"""Cold start: supervised fine-tuning on chains, with TRL's SFTTrainer as it is.

Chains are built in bulk (pairs → codes → token ids) and kept on disk. Labels are -100 on the
prompt, so the loss is on the completion only; words of the text weigh more than image codes,
because they are a small share of a chain. The `direct` variant (LR → final image, no chain) trains
on the same pairs for comparison.
"""

import csv
import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Qwen3ForCausalLM, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from realsr_r1.common import device_of, fast_bfloat16
from realsr_r1.first import degradation, policy, scenes
from realsr_r1.first.policy import PolicyConfig
from realsr_r1.first.reader import LRReader
from realsr_r1.first.tokenizer import VQModel
from realsr_r1.first.vlcot import (
    CHAIN,
    DIRECT,
    EOS,
    IMAGE_TAGS,
    PAD,
    TAGS,
    TEXT_TAGS,
    Chain,
    Vocabulary,
)
from realsr_r1.pretraining.muon import MuonAdamW


@torch.no_grad()
def encode_steps(
    tokenizer: VQModel, hr: Tensor, sizes: tuple[int, ...] = (4, 8, 16)
) -> list[Tensor]:
    """HR images (b, 3, s, s) in [0, 1] → codes of the three steps, coarse to fine: (b, n, n) for
    each n of `sizes`."""
    return [
        tokenizer.encode(
            hr
            if hr.shape[-1] == n * tokenizer.factor
            else F.interpolate(hr, size=n * tokenizer.factor, mode="area")
        )
        for n in sizes
    ]


def chain_of(scene: scenes.Scene, labels: dict[str, str], images: list[Tensor]) -> Chain:
    """The true chain of one scene: its labels in words, its three captions, the codes (h, w) of its
    three images."""
    rough, middle, final = scene.captions
    return Chain(
        degradation.to_words(labels), rough, images[0], middle, images[1], final, images[2]
    )


def layout(tags: tuple[str, ...] | None, direct: bool) -> tuple[str, ...]:
    """The parts of a chain that are learnt, in the order of TAGS: `tags`, or all seven, or (direct)
    the final image alone. Raises ValueError unless `tags` are parts of the chain in their order,
    with the final image."""
    tags = tuple(tags or (IMAGE_TAGS[-1:] if direct else TAGS))
    if tags != tuple(t for t in TAGS if t in tags) or IMAGE_TAGS[-1] not in tags:
        raise ValueError(
            f"a layout holds parts of the chain in their order ({', '.join(TAGS)}), the final "
            f"image among them; got {', '.join(tags)}"
        )
    return tags


@torch.no_grad()
def tokenise(
    data: scenes.Pairs,
    tokenizer: VQModel,
    reader: LRReader,
    vocabulary: Vocabulary,
    direct: bool = False,
    batch: int = 32,
    device: str | torch.device = "cpu",
    tags: tuple[str, ...] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs → token ids (n, length), padded on the right, and their prompt length repeated (n,).
    `tags`: see `layout`."""
    rows, tags, word = [], layout(tags, direct), vocabulary.ids
    for at in tqdm(
        range(0, len(data), batch), desc="chains", disable=len(data) < 1000, mininterval=5
    ):
        hr, lr = (t[at : at + batch].to(device).float() / 255 for t in (data.hr, data.lr))
        prompts = vocabulary.prompts(reader.encode(lr).cpu(), DIRECT if direct else CHAIN)
        images = dict(
            zip(
                IMAGE_TAGS,
                (vocabulary.image_ids(s.cpu()).tolist() for s in encode_steps(tokenizer, hr)),
                strict=True,
            )
        )
        for i, prompt in enumerate(prompts.tolist()):
            said = (degradation.to_words(data.labels[at + i]), *data.scenes[at + i].captions)
            texts = {
                t: vocabulary.encode(s.replace(",", " ,"))
                for t, s in zip(TEXT_TAGS, said, strict=True)
            }
            ids = list(prompt)
            for tag in tags:
                ids += [
                    word[f"<{tag}>"],
                    *(images[tag][i] if tag in IMAGE_TAGS else texts[tag]),
                    word[f"</{tag}>"],
                ]
            rows.append([*ids, word[EOS]])
    length = max(map(len, rows))
    out = np.full(
        (len(rows), length), word[PAD], dtype=np.int16 if len(vocabulary) < 2**15 else np.int32
    )
    for i, r in enumerate(rows):
        out[i, : len(r)] = r
    return out, np.full(len(rows), prompts.shape[1])


def chains(
    data: scenes.Pairs,
    tokenizer: VQModel,
    reader: LRReader,
    vocabulary: Vocabulary,
    direct: bool = False,
    cache: Path | None = None,
    device="cpu",
    tags: tuple[str, ...] | None = None,
) -> Dataset:
    """A `datasets` table with `input_ids` and `labels` (-100 on the prompt and the padding), cached
    on disk by content. `tags`: see `layout`."""
    path, tags = None, layout(tags, direct)
    if cache:
        digest = hashlib.sha256()
        for part in (
            tokenizer.quantize.weight,
            reader.vectors,
            data.hr[:: max(1, len(data) // 7)],
            data.lr[:: max(1, len(data) // 7)],
        ):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        digest.update("\n".join(vocabulary.words).encode())
        if tags not in (TAGS, IMAGE_TAGS[-1:]):
            digest.update("\n".join(tags).encode())
        path = (
            Path(cache)
            / f"chains_{'direct' if direct else 'chain'}_{len(data)}_{digest.hexdigest()[:12]}.npz"
        )
    if path and path.exists():
        saved = np.load(path)
        ids, prompt = saved["ids"], saved["prompt"]
    else:
        ids, prompt = tokenise(
            data, tokenizer, reader, vocabulary, direct, device=device, tags=tags
        )
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path.with_suffix(".part.npz"), ids=ids, prompt=prompt)
            path.with_suffix(".part.npz").replace(path)
    labels = ids.astype(np.int32)
    labels[np.arange(ids.shape[1])[None] < prompt[:, None]] = -100
    labels[ids == vocabulary.ids[PAD]] = -100
    return Dataset.from_dict({"input_ids": ids.astype(np.int32), "labels": labels}).with_format(
        "numpy"
    )


@torch.no_grad()
def drawn_codes(model, data: Dataset, batch: int = 16, seed: int = 0) -> Tensor:
    """For each chain of `data`, the codes (n, h, w) that the policy draws for the final image,
    given the true chain before it: at temperature 1 with the entropy top-k, in one forward pass a
    batch."""
    v, size, g = model.vocabulary, model.nano.sizes[-1], torch.Generator().manual_seed(seed)
    out = []
    for at in tqdm(
        range(0, len(data), batch), desc="drawn codes", disable=len(data) < 500, mininterval=5
    ):
        ids = torch.as_tensor(np.stack(data[at : at + batch]["input_ids"])).long().to(model.device)
        tag = torch.full((len(ids),), v.ids["<final_image>"], device=ids.device)
        first = (ids == tag[:, None]).int().argmax(
            1
        ) + 4  # after the tag, the start and the two sizes
        grid = torch.arange(size * (size + 1), device=ids.device)
        grid = grid[grid % (size + 1) < size]  # the last word of each row is its end
        where = first[:, None] + grid[None] - 1  # a word is predicted at the place before it
        hidden = model.model(ids).last_hidden_state.gather(
            1, where[..., None].expand(-1, -1, model.config.hidden_size)
        )
        table = model.get_output_embeddings().weight[v.first_code : v.first_code + v.codes]
        logits = (hidden @ table.T).float().flatten(0, 1)
        logits = policy.keep_top_k(logits, policy.entropy_k(logits))
        drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=g)
        out.append(drawn.view(len(ids), size, size))
    return torch.cat(out)


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    share: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor:
    """Mean cross-entropy of logits (n, v) against words (n,), each weighted by its entry in
    `weights` (v,); -100 is left out. `share` maps the sum of this batch's weights to the one that
    divides (of several processes: their mean)."""
    keep = target != -100
    w = weights.to(target.device)[target[keep]]
    return (
        F.cross_entropy(logits[keep].float(), target[keep], reduction="none") * w
    ).sum() / share(w.sum())


class ChainTrainer(SFTTrainer):
    """SFTTrainer with word weights in the loss. Only the loss is ours: the head runs on the
    completion alone (logits of the prompt are never needed), which TRL's `compute_loss_func` hook
    cannot do: it costs a second forward pass."""

    loss_is_scaled_for_ga = (
        False  # ours is the mean of each micro-batch, so accumulation must divide it
    )

    def __init__(self, *args, word_weights: Tensor, **options):
        super().__init__(*args, **options)
        self.word_weights = word_weights

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        first = int((labels != -100).any(0).int().argmax())
        labels = labels[:, first:]
        # Padding is on the right, where a causal model cannot see it, so no attention mask is
        # needed.
        outputs = model(
            input_ids=inputs["input_ids"], logits_to_keep=labels.shape[1] + 1, use_cache=False
        )
        loss = weighted_cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels.flatten(), self.word_weights, self._share
        )
        return (loss, outputs) if return_outputs else loss

    def _share(self, total: Tensor) -> Tensor:
        """Processes average their gradients; dividing by the mean of their sums makes that the
        gradient of one large batch."""
        return self.accelerator.reduce(total, "mean") if self.model.training else total


@dataclass(frozen=True)
class Scale:
    """What makes a larger model fit; the defaults are the nano policy's. `cost.memory` says how
    much each saves."""

    lora: LoraConfig | None = None  # None: all weights (see `middle.lora`)
    dtype: torch.dtype = torch.float32  # of the weights; bfloat16 halves frozen ones
    checkpointing: bool = (
        False  # keep only the layers' inputs, compute the rest again: a third more time
    )
    accumulate: int = 1  # micro-batches a step
    # SFT of all weights on plain devices; otherwise a name that transformers knows, or its default
    optimizer: str = "muon"

    def __post_init__(self):
        if self.lora is not None and sharded():
            raise ValueError(
                "PEFT's trained embedding rows cannot be sharded: train all weights (--full), "
                "or launch LoRA without FSDP and ZeRO-3 (configs/one_gpu.yaml)"
            )

    @property
    def muon(self) -> bool:
        """Muon needs whole matrices, and transformers makes optimizers itself where weights are
        sharded."""
        return self.optimizer == "muon" and self.lora is None and not sharded()

    @property
    def arguments(self) -> dict:
        """For TRL's configurations."""
        known = {} if self.optimizer == "muon" else {"optim": self.optimizer}
        return known | {"gradient_checkpointing": self.checkpointing}


def sharded() -> bool:
    """Whether accelerate runs this process with weights split over devices (FSDP, DeepSpeed
    ZeRO-3)."""
    return any(
        os.environ.get(f"ACCELERATE_USE_{x}", "false").lower() == "true"
        for x in ("FSDP", "DEEPSPEED")
    )


def first_process(device: str | None) -> AbstractContextManager:
    """A context in which the main process goes first and the others wait, so that what it prepares
    is made once and found."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext()
    return PartialState(cpu=device_of(device).type == "cpu").main_process_first()


def whole_model(trainer: Trainer) -> torch.nn.Module | None:
    """The trained model on the CPU, shards gathered and adapters merged; None in all but the main
    process. Every process must call it."""
    model, accelerator = trainer.model, trainer.accelerator
    if sharded():
        state = accelerator.get_state_dict(trainer.model_wrapped)
        if accelerator.is_main_process:
            model = Qwen3ForCausalLM(accelerator.unwrap_model(model).config)
            model.load_state_dict(state)
    if not accelerator.is_main_process:
        return None
    model = accelerator.unwrap_model(model).cpu()
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


class CsvLog(TrainerCallback):
    """Keeps every logged row of the trainer in one CSV file; an interrupted run goes on with the
    same file."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if path.exists():
            with path.open() as f:
                self.rows = list(csv.DictReader(f))

    def on_train_begin(self, args, state, control, **_):
        self.rows = [r for r in self.rows if int(r["step"]) <= state.global_step]

    def on_log(self, args, state, control, logs=None, **_):
        row = {
            "step": state.global_step,
            **{k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))},
        }
        self.rows.append(row)
        if not state.is_world_process_zero:
            return
        names = list(dict.fromkeys(k for r in self.rows for k in r))
        with self.path.open("w", newline="") as f:
            w = csv.DictWriter(f, names)
            w.writeheader()
            w.writerows(self.rows)


def validation_metrics(vocabulary: Vocabulary, text: Tensor):
    """`compute_metrics` on teacher-forced predictions: share of text words and of image codes
    predicted right."""

    def metrics(result) -> dict[str, float]:
        predicted = result.predictions[:, :-1]
        labels = result.label_ids[:, -predicted.shape[1] :]
        known = np.where(labels == -100, 0, labels)
        right = predicted == labels
        return {
            "text_accuracy": float(right[text.numpy()[known]].mean()),
            "code_accuracy": float(right[known >= vocabulary.first_code].mean()),
        }

    return metrics


def train_sft(
    train: Dataset,
    val: Dataset | None,
    out: Path,
    tokenizer: VQModel,
    reader: LRReader,
    config: PolicyConfig = PolicyConfig(),
    epochs: float = 1.0,
    batch: int = 8,
    lr: float = 4e-3,
    text_weight: float = 6.0,
    seed: int = 0,
    device: str | None = None,
    max_steps: int = -1,
    init: Path | None = None,
    scale: Scale = Scale(),
    callbacks: Iterable[TrainerCallback] = (),
) -> None:
    """Train a policy on chains, from scratch or from the policy in the folder `init`, and save it
    to the folder `out`, with the log beside it (`out`.csv).

    Checkpoints go to `out`-checkpoints every 200 steps; the same call after a kill resumes from the
    last one. bfloat16 is used where it is fast (`pretrain.fast_bfloat16`). `batch` is per process.
    `scale` makes larger models fit, and under `accelerate launch` several processes share the work:
    two with half the batch do what one does.
    """
    out, dev = Path(out), device_of(device)
    model = (
        policy.build(config, seed=seed) if init is None else policy.load(init, dtype=scale.dtype)
    )
    config = model.nano
    if init is None:
        policy.embed_codebooks(model, tokenizer, reader, seed)
    v = model.vocabulary
    text = torch.zeros(len(v), dtype=torch.bool)
    text[[v.ids[w] for w in v.text]] = True
    folder = out.parent / f"{out.name}-checkpoints"
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, max_steps // 10) if max_steps > 0 else 50,
        max_grad_norm=1.0,
        seed=seed,
        bf16=scale.dtype == torch.float32 and fast_bfloat16(dev),
        use_cpu=dev.type == "cpu",
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=20,
        save_steps=200,
        save_total_limit=1,
        report_to=[],
        eval_strategy="steps" if val is not None else "no",
        eval_steps=200,
        dataloader_num_workers=0,
        label_names=["labels"],
        average_tokens_across_devices=False,
        gradient_accumulation_steps=scale.accumulate,
        **scale.arguments,
    )
    optimizer = MuonAdamW(model.to(dev), lr=lr) if scale.muon else None
    trainer = ChainTrainer(
        optimizers=(optimizer, None),
        peft_config=scale.lora,
        word_weights=torch.where(text, text_weight, 1.0),
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=val,
        processing_class=v.tokenizer,
        callbacks=[CsvLog(out.with_suffix(".csv")), *callbacks],
        compute_metrics=validation_metrics(v, text) if val is not None else None,
        preprocess_logits_for_metrics=lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
    )
    resume = folder.is_dir() and any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume or None)
    trained = whole_model(trainer)
    if trained is not None:
        trained.nano, trained.vocabulary = config, v
        policy.save(trained, out)
