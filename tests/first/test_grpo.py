import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, TrainerState

from realsr_r1.first import grpo, policy, rewards, vlcot
from realsr_r1.first.__main__ import main
from realsr_r1.first.grpo import GrpoSettings

ROOT = Path(__file__).parents[2]
SMALL = {"prompts": 2, "group": 4, "micro_batch": 4, "save_steps": 100}


def code_share(completions, **_):
    """Planted reward: share of code 7 among all image codes."""
    out = []
    for text in completions:
        codes = [w for w in text.split() if w.startswith("<c")]
        out.append(codes.count("<c7>") / max(1, len(codes)))
    return out


def variety(completions, **_):
    """A reward on the text alone: share of different words in the rough understanding."""
    words = [
        t.split("<rough_understand>")[1].split("</rough_understand>")[0].split()
        for t in completions
    ]
    return [len(set(w)) / 6 for w in words]


def constant(completions, **_):
    return [0.5] * len(completions)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    config = policy.PolicyConfig(
        hidden=32, layers=2, heads=2, mlp=64, codes=64, lr_codes=32, sizes=(2, 3, 4), max_words=6
    )
    path = tmp_path_factory.mktemp("sft") / "policy"
    policy.save(policy.build(config, seed=3), path)
    return path


@pytest.fixture(scope="module")
def dataset(tiny, words):
    return grpo.prompts(range(500_000, 500_016), tiny[1], words)


def weights_of(path):
    return {k: v for k, v in policy.load(path).state_dict().items()}


def rows(path):
    with path.with_suffix(".csv").open() as f:
        return list(csv.DictReader(f))


@pytest.fixture
def trainer(folder, dataset, tmp_path):
    return grpo.make_trainer(
        folder, dataset, [code_share], tmp_path / "p", GrpoSettings(**SMALL), device="cpu"
    )


@pytest.fixture
def rollout(trainer, dataset):
    prompts = [p for p in dataset["prompt"][:2] for _ in range(4)]
    return trainer.rollout_func(prompts, trainer)


def batch_of(rollout):
    n = max(map(len, rollout["completion_ids"]))

    def pad(rows, value=0):
        return torch.tensor([list(r) + [value] * (n - len(r)) for r in rows])

    mask = pad([[1] * len(r) for r in rollout["completion_ids"]])
    return (
        torch.tensor(rollout["prompt_ids"]),
        pad(rollout["completion_ids"]),
        mask,
        pad(rollout["env_mask"]),
        pad(rollout["logprobs"], 0.0),
    )


def test_prompts_carry_what_the_rewards_need(dataset, words):
    assert set(dataset.column_names) == {"prompt", "degradation", "tags", "hr"}
    row = dataset[0]
    assert len(words.encode(row["prompt"])) == 17 * 17 + 5 and row["prompt"].endswith(vlcot.CHAIN)
    assert len(row["degradation"].split(",")) == 5 and len(row["tags"]) == 2


def test_sampling_logprobs_are_the_trainers(trainer, rollout):
    prompt, completion, mask, _, sampled = batch_of(rollout)
    with torch.no_grad():
        seen = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompt, completion], 1),
            torch.cat([torch.ones_like(prompt), mask], 1),
            completion.shape[1],
        )[0]
    assert ((seen - sampled).abs() * mask).max() < 1e-4  # hence a first-step ratio of 1 within 1e-4
    assert (sampled * mask).min() < -1


def test_a_group_reads_its_prompt_once_and_differs_in_its_chains(rollout):
    prompt, completion, *_ = batch_of(rollout)
    assert len({tuple(p) for p in prompt.tolist()}) == 2 and prompt.shape[0] == 8
    assert len({tuple(c) for c in completion.tolist()}) == 8


def test_only_free_words_carry_gradient(trainer, rollout, monkeypatch):
    prompt, completion, mask, free, sampled = batch_of(rollout)
    logps = sampled.clone().requires_grad_()
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: (logps, torch.zeros_like(sampled), None),
    )
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": mask,
        "tool_mask": free,
        "advantages": torch.linspace(-1.3, 1, 8),
        "ref_per_token_logps": sampled - 0.1,
        "num_items_in_batch": torch.tensor(1),
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs).backward()
    assert (logps.grad[free == 0] == 0).all() and (logps.grad[free == 1] != 0).all()
    grammar = policy.grammar_of(trainer.model)
    assert torch.equal(free.bool(), ~grammar.forced_mask(completion) & mask.bool())
    assert (
        0.2 < float((1 - free[mask == 1].float()).mean()) < 0.9
    )  # the layout is a real share of a chain


def test_every_parameter_moves_and_the_first_loss_is_zero(folder, dataset, tmp_path):
    before = weights_of(folder)
    grpo.train_grpo(
        folder,
        dataset,
        [code_share],
        tmp_path / "p",
        GrpoSettings(steps=2, lr=1e-2, beta=0.0, **SMALL),
        device="cpu",
    )
    log = rows(tmp_path / "p")
    # On-policy the ratio is 1, so the loss is the mean advantage, and that is 0 in every group. Its
    # gradient is not.
    assert abs(float(log[0]["loss"])) < 1e-5 and float(log[0]["grad_norm"]) > 1e-3
    after = weights_of(tmp_path / "p")
    still = [k for k in before if torch.equal(before[k], after[k])]
    assert not still


def test_a_planted_reward_is_learned(folder, dataset, tmp_path):
    settings = GrpoSettings(
        **SMALL | {"steps": 14, "lr": 1e-2, "beta": 0.0, "group": 8, "micro_batch": 8}
    )
    grpo.train_grpo(folder, dataset, [code_share], tmp_path / "p", settings, device="cpu")
    reward = [float(r["reward"]) for r in rows(tmp_path / "p") if r.get("reward")]
    assert len(reward) == 14 and sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.05


def test_groups_without_spread_teach_nothing(folder, dataset, tmp_path):
    grpo.train_grpo(
        folder,
        dataset,
        [constant],
        tmp_path / "p",
        GrpoSettings(steps=1, lr=1e-2, beta=0.0, **SMALL),
        device="cpu",
    )
    log, before, after = rows(tmp_path / "p")[0], weights_of(folder), weights_of(tmp_path / "p")
    assert (
        float(log["grad_norm"]) == 0
        and float(log["zero_spread/constant"]) == 1
        and float(log["frac_reward_zero_std"]) == 1
    )
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_greedy_text_kills_rewards_on_text(folder, dataset, tmp_path):
    """Defect 1 of the released code: top-k 1 on text makes all chains of a group say the same until
    the first image."""
    spread = {}
    for greedy in (True, False):
        out = tmp_path / str(greedy)
        settings = GrpoSettings(steps=1, greedy_text=greedy, **SMALL)
        grpo.train_grpo(folder, dataset, [variety, code_share], out, settings, device="cpu")
        spread[greedy] = rows(out)[0]
    assert (
        float(spread[True]["zero_spread/variety"]) == 1
        and float(spread[False]["zero_spread/variety"]) < 1
    )
    assert float(spread[True]["zero_spread/code_share"]) < 1  # the images are sampled in both


def test_kl_is_zero_at_first_and_then_not(folder, dataset, tmp_path):
    grpo.train_grpo(
        folder,
        dataset,
        [code_share],
        tmp_path / "p",
        GrpoSettings(steps=2, lr=1e-2, beta=0.1, **SMALL),
        device="cpu",
    )
    log = rows(tmp_path / "p")
    assert float(log[0]["kl"]) == pytest.approx(0, abs=1e-6) and float(log[1]["kl"]) > 1e-5


def test_same_seed_same_run_and_a_killed_run_resumes(folder, dataset, tmp_path):
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def run(name, seed=0, callbacks=()):
        settings = GrpoSettings(**SMALL | {"steps": 4, "lr": 1e-2, "save_steps": 2, "seed": seed})
        grpo.train_grpo(
            folder, dataset, [code_share], tmp_path / name, settings, callbacks, device="cpu"
        )
        return weights_of(tmp_path / name)

    whole = run("a")
    assert all(torch.equal(v, whole[k]) for k, v in run("b").items())
    other = run("c", seed=1)
    assert any(not torch.equal(v, whole[k]) for k, v in other.items())
    with pytest.raises(KeyboardInterrupt):
        run("d", callbacks=[Kill()])
    resumed = run("d")
    assert all(torch.allclose(v, whole[k], atol=2e-3) for k, v in resumed.items())
    assert [r["step"] for r in rows(tmp_path / "d") if r.get("reward")] == ["1", "2", "3", "4"]


def test_bad_settings_columns_and_rewards_get_one_sentence(folder, dataset, tmp_path):
    with pytest.raises(ValueError, match="do not divide into micro-batches of 3"):
        GrpoSettings(prompts=2, group=4, micro_batch=3)
    with pytest.raises(ValueError, match="no spread to learn from"):
        GrpoSettings(group=1)

    def needs_depth(completions, depth, **_):
        return [0.0] * len(completions)

    def broken(completions, **_):
        raise KeyError("oops")

    def short(completions, **_):
        return [0.0]

    def nan(completions, **_):
        return [float("nan")] * len(completions)

    with pytest.raises(ValueError, match="needs_depth needs the column 'depth'"):
        grpo.make_trainer(
            folder, dataset, [needs_depth], tmp_path / "p", GrpoSettings(**SMALL), device="cpu"
        )
    ours = {
        "tags": rewards.understanding_reward,
        "degradation": rewards.gated(constant, rewards.degradation_reward),
        "hr": rewards.ReferenceReward(None),
    }
    for column, reward in ours.items():  # noticed before anything is sampled
        with pytest.raises(ValueError, match=f"needs the column '{column}'"):
            grpo.make_trainer(
                folder,
                dataset.remove_columns(column),
                [reward],
                tmp_path / "p",
                GrpoSettings(**SMALL),
                device="cpu",
            )
    for reward in (broken, short, nan):
        with pytest.raises(ValueError, match=reward.__name__):
            grpo.train_grpo(
                folder,
                dataset,
                [reward],
                tmp_path / reward.__name__,
                GrpoSettings(steps=1, **SMALL),
                device="cpu",
            )
    with pytest.raises(FileNotFoundError, match="are missing"):
        grpo.train_grpo(
            tmp_path / "absent",
            dataset,
            [constant],
            tmp_path / "p",
            GrpoSettings(**SMALL),
            device="cpu",
        )


def test_rewards_by_name_train_together(tiny, folder, dataset, tmp_path):
    functions, weights = grpo.named_rewards(
        [*grpo.PAPER_REWARDS, "reference=0.5"], tiny[0], lambda x: x.mean((1, 2, 3))
    )
    assert weights == (1, 1, 1, 1, 0.5)
    grpo.train_grpo(
        folder,
        dataset,
        functions,
        tmp_path / "p",
        GrpoSettings(steps=1, weights=weights, **SMALL),
        device="cpu",
    )
    log = rows(tmp_path / "p")[0]
    assert (
        float(log["rewards/format_reward/mean"]) == 1
        and float(log["zero_spread/format_reward"]) == 1
    )
    assert (
        0 < float(log["rewards/generation_reward/mean"]) < 1
        and float(log["zero_spread/generation_reward"]) < 1
    )
    assert 0 < float(log["seconds/rewards"]) < float(log["seconds/step"])
    with pytest.raises(ValueError, match="no reward 'beauty'"):
        grpo.named_rewards(["beauty"], tiny[0])


def test_a_run_is_not_continued_with_other_settings_and_a_finished_one_stays(
    folder, dataset, tmp_path
):
    def run(reward=code_share, **changes):
        settings = GrpoSettings(**SMALL | {"steps": 1, "lr": 1e-2} | changes)
        return grpo.train_grpo(folder, dataset, [reward], tmp_path / "p", settings, device="cpu")

    def broken(completions, **_):
        raise KeyError("oops")

    with pytest.raises(ValueError, match="broken"):
        run(broken, lr=0.5)
    run()  # that one left no checkpoint, so its settings do not bind
    first = weights_of(tmp_path / "p")
    with pytest.raises(
        ValueError,
        match=r"p-checkpoints are of another run \(lr 0.01 there, 0.1 here, seed 0 there, 7 here\)",
    ):
        run(lr=0.1, seed=7)
    with pytest.raises(ValueError, match=r"another run .*code_share.*constant"):
        run(constant)
    run()  # finished: nothing happens
    assert (
        all(torch.equal(v, first[k]) for k, v in weights_of(tmp_path / "p").items())
        and len(rows(tmp_path / "p")) == 2
    )
    (tmp_path / "p" / "nano.json").unlink()  # as after a kill while the policy was saved
    run(steps=1)
    assert (tmp_path / "p" / "nano.json").exists()
    run(steps=3)  # goes on
    assert any(not torch.equal(v, first[k]) for k, v in weights_of(tmp_path / "p").items())
    assert [r["step"] for r in rows(tmp_path / "p") if r.get("reward")][-1] == "3"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
    ],
)
@pytest.mark.parametrize(
    ("place", "knob"),
    [("sampling", "lower prompts, group or words"), ("gradient", "lower micro_batch")],
)
def test_out_of_memory_names_the_knob(folder, dataset, tmp_path, monkeypatch, place, knob, error):
    def full(*_a, **_k):
        raise error

    monkeypatch.setattr(
        *((policy, "sample") if place == "sampling" else (grpo.GRPOTrainer, "compute_loss")), full
    )
    with pytest.raises(RuntimeError, match=f"memory ran out in GRPO's {place}: {knob}"):
        grpo.train_grpo(
            folder,
            dataset,
            [constant],
            tmp_path / "p",
            GrpoSettings(steps=1, **SMALL),
            device="cpu",
        )


def test_the_sheet_shows_one_fixed_group_at_the_start_and_at_the_end(
    tiny, folder, dataset, tmp_path
):
    settings = GrpoSettings(steps=2, lr=0.1, sheet_steps=100, **SMALL)
    sheet = grpo.GroupSheet(tmp_path / "s.png", tiny[1], tiny[0], settings)
    lm = policy.build(tiny[2].nano, seed=1).eval()
    row = sheet._row(lm)
    assert row.shape == (3, 128, 6 * 128) and torch.equal(
        row, sheet._row(lm)
    )  # LR, HR and a group of four
    assert not torch.equal(row, sheet._row(policy.build(tiny[2].nano, seed=2).eval()))
    state = TrainerState(global_step=0, is_world_process_zero=True)
    sheet.on_step_begin(None, state, None, lm.train())
    assert lm.training  # as it was
    state.global_step = 2
    sheet.on_step_begin(None, state, None, lm)
    sheet.on_train_end(None, state, None, lm)
    assert sorted(p.name for p in tmp_path.glob("s_*.png")) == ["s_0000.png", "s_0002.png"]
    assert (tmp_path / "s_0000.png").read_bytes() == (tmp_path / "s_0002.png").read_bytes()


def test_command_line_starts_from_the_shipped_weights_and_restore_takes_what_it_writes(
    tmp_path, capsys
):
    out = str(tmp_path / "run")
    few = [
        "--steps",
        "1",
        "--prompts",
        "1",
        "--group",
        "2",
        "--micro-batch",
        "2",
        "--rewards",
        "degradation",
        "understanding=2",
    ]
    go = ["train", "grpo", "--out", out, "--words", "40", "--device", "cpu", *few]
    assert main([*go, "--name", "policy-a"]) == 0, capsys.readouterr().err
    assert main([*go, "--start", "policy-a", "--blend", "0.5", "--name", "policy-b"]) == 0, (
        capsys.readouterr().err
    )
    assert (
        main([*go, "--name", "policy-a", "--beta", "0.3"]) == 2
        and "of another run (beta 0.02 there, 0.3 here)" in capsys.readouterr().err
    )
    Image.new("RGB", (32, 32), "green").save(tmp_path / "x.png")
    restore = [
        "restore",
        str(tmp_path / "x.png"),
        "-o",
        str(tmp_path / "y.png"),
        "--device",
        "cpu",
        "--weights",
        out,
        "--policy",
    ]
    assert main([*restore, "policy-b"]) == 0, capsys.readouterr().err
    assert Image.open(tmp_path / "y.png").size == (128, 128)
    assert (
        main([*restore, "policy-c"]) == 2 and "are missing in policy-c/" in capsys.readouterr().err
    )


def test_a_narrow_reward_is_heard_beside_a_wide_one_when_each_is_normalised_first(
    folder, dataset, tmp_path
):
    def wide(completions, **_):
        return [float(i % 2) for i in range(len(completions))]

    def narrow(completions, **_):
        return [1e-2 * (i % 4 >= 2) for i in range(len(completions))]

    def advantages(aggregation):
        settings = GrpoSettings(steps=1, aggregation=aggregation, **SMALL)
        trainer = grpo.make_trainer(
            folder, dataset, [wide, narrow], tmp_path / aggregation, settings, device="cpu"
        )
        kept = {}
        inner = trainer._compute_loss

        def look(model, inputs):
            kept.setdefault("a", []).append(inputs["advantages"].clone())
            return inner(model, inputs)

        trainer._compute_loss = look
        trainer.train()
        size = torch.cat(kept["a"]).abs()
        return float(size.min() / size.max())

    # Of a group's four sums 0, 1, 0.01 and 1.01 the narrow reward hardly moves any; with equal
    # spreads two of them cancel.
    assert advantages("sum_then_normalize") > 0.9
    assert advantages("normalize_then_sum") < 0.1
