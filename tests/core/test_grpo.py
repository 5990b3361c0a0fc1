"""GRPO on the second form: one distribution, credit by part, and TRL's loss is the formula."""

import pandas as pd
import pytest
import torch
from datasets import Array3D
from transformers.trainer_callback import TrainerState

from realsr_r1 import grpo, photographs
from realsr_r1.grpo import ChainGRPOTrainer, GrpoSettings, part_advantages
from realsr_r1.objective import group_advantages, grpo_loss
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.rewards import degradation_reward, format_reward, understanding_reward
from realsr_r1.sampling import Sampling, logprobs_of, sample
from realsr_r1.vlcot import PAD

REWARDS = [format_reward, degradation_reward, understanding_reward]


def tiny() -> ChainPolicy:
    torch.manual_seed(0)
    shape = {"codes": 64, "hidden_size": 32, "layers": 2, "heads": 2, "mlp": 48, "eye_width": 16}
    return ChainPolicy(PolicyConfig(eye_blocks=1, **shape))


@pytest.fixture(scope="module")
def rows():
    return grpo.prompts(photographs.load("train"), 8, seed=4)


def test_prompts_hold_what_the_rewards_need(rows):
    assert set(rows.column_names) == {"prompt", "degradation", "tags", "lr", "hr"}
    assert len(rows) == 8 and len({str(r) for r in rows["lr"]}) == 8


def test_pictures_of_prompts_are_arrays(rows):
    """Not lists of lists, whose conversion takes longer than a step of GRPO."""
    for name, side in (("lr", 32), ("hr", 128)):
        assert rows.features[name] == Array3D((3, side, side), "uint8")
    item = photographs.Pairs(photographs.load("train"), seed=4)[2]
    assert (rows.with_format("numpy")[2]["hr"] == item["hr"].numpy()).all()


def test_advantages_by_part_by_hand():
    """Two rewards, of which the first is decided at token 1: later tokens do not hear of it."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    weights = torch.ones(2)
    decided = [torch.full((4,), 1), torch.full((4,), 3)]
    a = part_advantages(rewards, weights, decided, 4)
    assert a.shape == (4, 4)
    both = group_advantages(rewards @ weights, 4)
    late = group_advantages(rewards[:, 1], 4)
    torch.testing.assert_close(a[:, :2], both[:, None].expand(-1, 2))
    torch.testing.assert_close(a[:, 2:], late[:, None].expand(-1, 2))
    assert a[0, 0] > 0 > a[0, 3]  # its words were good, its picture was not


def test_the_trainer_gives_credit_until_a_part_is_closed(rows, tmp_path):
    """The degradation alone is rewarded: tokens after its end hear nothing."""

    def degradation_reward(completions, **_) -> list[float]:  # by its name
        return [i / 4 for i in range(len(completions))]

    settings, policy = GrpoSettings(prompts=1, group=4, micro_batch=4), tiny()
    trainer = ChainGRPOTrainer(policy, rows, [degradation_reward], tmp_path, settings, "cpu")
    batch = trainer._generate_and_score_completions([rows[0]] * 4)
    ids, credit = batch["completion_ids"], batch["advantages"]
    assert credit.shape == ids.shape and (credit[:, 0] != 0).all()
    closed = ids == policy.vocabulary.ids["</degradation>"]
    for place, given in zip(closed.int().argmax(1).tolist(), credit, strict=True):
        assert 0 < place < ids.shape[1] - 1 and not given[place + 1 :].any()
        assert (given[: place + 1] == given[0]).all()


def test_the_trainers_loss_is_the_formula(rows, tmp_path):
    settings = GrpoSettings(prompts=1, group=4, micro_batch=4, beta=0.3)
    policy = tiny()
    trainer = ChainGRPOTrainer(policy, rows, REWARDS, tmp_path, settings, "cpu")
    batch = trainer._generate_and_score_completions([rows[0]] * 4)
    with torch.no_grad():  # move the policy off the reference
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    trainer.current_gradient_accumulation_steps = 1
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    loss = trainer._compute_loss(policy, batch)
    ids, lr, grammar = batch["completion_ids"], batch["pixel_values"], policy.grammar()
    logp = logprobs_of(policy, lr, ids, grammar)
    with torch.no_grad():
        reference = logprobs_of(trainer.ref_model, lr, ids, grammar)
    mask = batch["completion_mask"] * batch["tool_mask"]
    want = grpo_loss(logp, logp.detach(), reference, batch["advantages"], mask, beta=0.3)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-4)
    assert want.abs() > 1e-4


def test_rollouts_and_loss_are_one_distribution(rows, tmp_path):
    """At the first step the KL is 0 and the ratio 1, on every token, forced ones included."""
    settings = GrpoSettings(prompts=1, group=4, micro_batch=4)
    policy = tiny()
    trainer = ChainGRPOTrainer(policy, rows, REWARDS, tmp_path, settings, "cpu")
    batch = trainer._generate_and_score_completions([rows[1]] * 4)
    ids, keep = batch["completion_ids"], batch["completion_ids"] != policy.vocabulary.ids[PAD]
    again = logprobs_of(policy, batch["pixel_values"], ids, policy.grammar())
    torch.testing.assert_close(batch["ref_per_token_logps"][keep], again[keep], atol=1e-5, rtol=0)
    forced = policy.grammar().forced[policy.grammar().states(ids)]
    assert (batch["tool_mask"][forced & keep] == 0).all()
    assert (batch["tool_mask"][~forced & keep] == 1).all()


def test_dropout_of_the_cold_start_is_off(rows, tmp_path):
    """In training mode the loss sees the probabilities that were sampled from."""
    torch.manual_seed(0)
    config = tiny().config
    config.dropout = 0.3
    settings = GrpoSettings(prompts=1, group=4, micro_batch=4)
    trainer = ChainGRPOTrainer(ChainPolicy(config), rows, REWARDS, tmp_path, settings, "cpu")
    policy = trainer.policy
    lr = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drawn = sample(policy.eval(), lr, Sampling.rollout(), torch.Generator().manual_seed(0))
    again = logprobs_of(policy.train(), lr, drawn.ids, policy.grammar())
    torch.testing.assert_close(again, drawn.logprobs, atol=1e-4, rtol=0)


def test_the_words_alone_are_learnt_without_images(rows, tmp_path):
    settings = GrpoSettings(steps=2, prompts=1, group=4, micro_batch=4, parts=grpo.WORDS)
    grpo.train_grpo(tiny(), rows, REWARDS[1:], tmp_path, settings, "cpu")
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["completions/mean_length"].dropna().max() < 60


@pytest.mark.slow
def test_a_simple_reward_is_learnt(rows, tmp_path):
    """Naming tulips early: from chance to often, in a few steps on a random policy."""

    def tulips(completions, **_):
        return [min(1.0, c.count("tulip") / 3) for c in completions]

    settings = GrpoSettings(
        steps=10, prompts=2, group=8, micro_batch=16, lr=2e-2, beta=0.0, save_steps=5
    )
    rows = rows.select([0, 1] * 10)
    grpo.train_grpo(tiny(), rows, [tulips], tmp_path / "run", settings, "cpu")
    log = pd.read_csv(tmp_path / "run" / "log.csv")["reward"].dropna()
    assert log.iloc[-2:].mean() > log.iloc[:2].mean() + 0.2, log.tolist()
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(rows, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(grpo, "sample", lambda *a: drawn.append(1) or sample(*a))
    for steps in (1, 2):
        settings = GrpoSettings(steps=steps, prompts=1, group=4, micro_batch=4, save_steps=1)
        grpo.train_grpo(tiny(), rows, REWARDS, tmp_path, settings, "cpu")
        assert len(drawn) == steps  # the second run drew for its second step alone
    log = pd.read_csv(tmp_path / "log.csv")
    assert log["reward"].notna().sum() == 2 and int(log["step"].max()) == 2


def test_without_credit_by_part_every_token_has_the_advantage_of_its_chain(rows, tmp_path):
    settings = GrpoSettings(prompts=1, group=4, micro_batch=4, by_part=False)
    trainer = ChainGRPOTrainer(tiny(), rows, REWARDS, tmp_path, settings, "cpu")
    whole = trainer._generate_and_score_completions([rows[0]] * 4)["advantages"]
    want = group_advantages(trainer.rewards.sum(1), 4)
    torch.testing.assert_close(whole, want, atol=1e-3, rtol=0)


def test_one_process_trains_on_the_first_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(grpo, "device_of", torch.device)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1"):
        grpo.arguments(tmp_path, GrpoSettings(), "cuda:1", 9)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path, capsys):
    (tmp_path / "checkpoint-tmp").mkdir()
    for step in (9, 10):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        TrainerState(global_step=step).save_to_json(str(place / "trainer_state.json"))
    assert grpo.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    path = tmp_path / "checkpoint-10" / "trainer_state.json"
    path.write_bytes(path.read_bytes()[:-10])
    assert grpo.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert "checkpoint-10 was cut short" in capsys.readouterr().out
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    assert grpo.last_checkpoint(tmp_path) is None


def test_errors_come_before_anything_is_sampled(rows, tmp_path):
    with pytest.raises(ValueError, match="needs the column 'tags'"):
        grpo.train_grpo(tiny(), rows.remove_columns("tags"), REWARDS, tmp_path, device="cpu")
    with pytest.raises(ValueError, match="take 2 or more"):
        GrpoSettings(group=1)
    with pytest.raises(ValueError, match="micro-batches of 5"):
        GrpoSettings(micro_batch=5)
