import dataclasses
import json
import re
import subprocess
import sys

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from realsr_r1.cli import main
from realsr_r1.grammar import MAX_WORDS
from realsr_r1.photographs import ASSETS
from realsr_r1.planning import budget, cost
from realsr_r1.planning.cost import GB, Run, Shape, memory
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.pretraining.muon import MuonAdamW

VOCABULARY = PolicyConfig().vocab_size


def test_chain_totals_are_the_grammars():
    """With the most words a text may have, the count is the grammar's length."""
    policy = ChainPolicy(PolicyConfig(hidden_size=16, layers=1, heads=1, mlp=16))
    prompt, completion = cost.chain_tokens(words=MAX_WORDS)
    assert completion == policy.grammar().max_length
    assert prompt == len(policy.vocabulary.prompt)


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": 300,
}


@pytest.mark.parametrize(
    "config",
    (
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
        Qwen3Config(**SMALL, num_key_value_heads=4, head_dim=12, tie_word_embeddings=False),
        LlamaConfig(**SMALL, num_key_value_heads=2),
        Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    ids=("grouped queries", "untied", "llama", "Qwen3-0.6B"),
)
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        shape = Shape.of(config)
        assert shape.parameters == model.num_parameters()
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    assert shape.lora(8) == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)


def test_parameters_of_chameleon_and_of_the_named_shapes():
    config = ChameleonConfig(vocab_size=73_728, vocabulary_map={"<image>": 8711})
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(config)
    assert Shape.of(config) == cost.chameleon()
    assert cost.chameleon().parameters == sum(
        p.numel() for n, p in model.named_parameters() if "vqmodel" not in n
    )
    assert cost.qwen3().parameters == 596_049_920  # the published 0.6 B
    body = ChainPolicy(PolicyConfig()).model
    assert cost.nano().parameters == body.num_parameters()
    for other in (GPT2Config(), Qwen3MoeConfig()):  # its experts are no such matrices
        with pytest.raises(ValueError, match=f"{other.model_type} model is not counted here"):
            Shape.of(other)


def kept_bytes(shape: Shape, precision: str, lora: int = 0, tokens: int = 64) -> float:
    """What autograd really keeps for the layers' backward pass, weights left out."""
    model = budget.model_of(shape).model
    model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    if lora:
        how = peft.LoraConfig(r=lora, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
        model = peft.get_peft_model(model, how).get_base_model()
        model.enable_input_require_grads()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, alive = {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"),
    ):
        model(torch.randint(0, 300, (1, tokens)), use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize(
    "precision, lora",
    (("float32", 0), ("bfloat16", 0), ("mixed", 0), ("float32", 4), ("bfloat16", 4)),
)
@pytest.mark.parametrize("heads, kv", ((4, 4), (6, 2)))
def test_activations_of_a_layer_are_what_autograd_keeps(precision, lora, heads, kv):
    shape = Shape(64, 2, heads, kv, 16, 96, VOCABULARY, True, 32)
    one = kept_bytes(dataclasses.replace(shape, layers=3), precision, lora) - kept_bytes(
        shape, precision, lora
    )
    cast = (
        2 * shape.linear if precision == "mixed" else 0
    )  # autocast keeps bfloat16 copies of the weights
    assert (
        one
        == 64 * cost.layer_activations(shape, Run("sft", 0, 64, precision=precision, lora=lora))
        + cast
    )


def test_memory_by_hand():
    shape = Shape(8, 2, 2, 1, 4, 16, 100, True, 8)
    # 2 layers of 2·8·(8 + 4) + 3·8·16 = 576 weights, 16 + 8 norm weights; 8 of the last norm; a
    # table of 800.
    p = 2 * (576 + 24) + 8 + 800
    assert shape.parameters == p
    need = memory(shape, Run("sft", 3, 5, 2))
    assert need.parts["weights"] == 4 * p and need.parts["optimizer"] == 8 * p
    assert need.moments["update"]["gradients"] == 4 * p
    assert need.parts["head"] == 2 * 6 * 100 * 16
    layer = 24 * 8 + 16 * 8 + 16 * 4 + 16 * 16 + 4 * (2 + 4 + 1)
    assert need.parts["activations"] == 16 * (2 * layer + 12 * 8)
    assert need.peak == sum(need.parts.values()) and need.when == "loss"
    rl = memory(shape, Run("grpo", 3, 5, 2, 1, 1, 4))
    assert (
        rl.parts["reference"] == 4 * p and rl.moments["sampling"]["cache"] == 4 * 8 * 2 * 2 * 4 * 4
    )


def test_states_of_the_optimizers():
    shape = Shape(8, 2, 2, 1, 4, 16, 100, True, 8)
    p, table = shape.parameters, 800
    for optimizer, elements in (("adamw", 2 * p), ("muon", p + table), ("sgd", 0)):
        run = Run("sft", 3, 5, precision="bfloat16", optimizer=optimizer)
        assert memory(shape, run).parts["optimizer"] == 2 * elements
        run = dataclasses.replace(run, sharded=True)  # float32, and the weights once more
        assert memory(shape, run).parts["optimizer"] == 4 * (p + elements)


def test_muons_states_are_those_of_our_optimizer():
    policy = ChainPolicy(PolicyConfig(codes=64, hidden_size=32, layers=2, heads=2, mlp=48))
    optimizer = MuonAdamW(policy.model.train(), lr=1e-3)
    for p in policy.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = sum(
        x.numel()
        for s in optimizer.state_dict()["state"].values()
        for x in s.values()
        if torch.is_tensor(x) and x.numel() > 1
    )
    shape, run = Shape.of(policy.config.body), Run("sft", optimizer="muon")
    counted = cost.optimizer_states(shape, run, shape.parameters) / 4
    assert kept == pytest.approx(counted, rel=0.02)  # norms have two moments, too


def test_each_way_to_save_memory_saves_it():
    shape, run = cost.qwen3(), Run("sft", 294, 480, 8, precision="mixed")
    peak = lambda r: memory(shape, r).peak  # noqa: E731
    assert peak(dataclasses.replace(run, checkpointing=True)) < 0.75 * peak(run)
    assert (
        peak(dataclasses.replace(run, optimizer="sgd"))
        < peak(dataclasses.replace(run, optimizer="adamw8bit"))
        < peak(run)
    )
    assert peak(dataclasses.replace(run, precision="bfloat16", lora=16)) < 0.8 * peak(run)
    whole = Run("sft", 294, 480, 1, precision="bfloat16", checkpointing=True, sharded=True)
    peaks = [
        memory(cost.chameleon(), dataclasses.replace(whole, devices=n)).peak for n in (1, 4, 8)
    ]
    assert peaks[0] > 3 * peaks[1] > 3 * peaks[2] > 0
    off = memory(cost.chameleon(), dataclasses.replace(whole, devices=8, offload=True))
    assert off.peak < peaks[2] and off.host == pytest.approx(14 * cost.chameleon().parameters)
    # Eight devices hold one copy between them, plus what each gathers.
    parts = memory(cost.chameleon(), dataclasses.replace(whole, devices=8)).moments["update"]
    assert 8 * parts["weights"] == 2 * cost.chameleon().parameters
    # A larger group costs cache, not activations.
    small, large = (memory(shape, Run("grpo", group=n, precision="bfloat16")) for n in (4, 16))
    assert large.moments["sampling"]["cache"] == 4 * small.moments["sampling"]["cache"]
    assert large.moments["loss"]["activations"] == small.moments["loss"]["activations"]


def test_settings_that_make_no_sense_get_one_sentence():
    with pytest.raises(ValueError, match="precision one of float32, mixed, bfloat16"):
        Run(precision="float8")
    with pytest.raises(ValueError, match="LoRA is counted with float32 or bfloat16"):
        Run(precision="mixed", lora=4)
    with pytest.raises(ValueError, match="offload belongs to ZeRO-3"):
        Run(offload=True)


def test_operations_are_two_a_weight_and_token():
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(64, 2, 4, 4, 16, 96, VOCABULARY, True, 32)
    model = AutoModelForCausalLM.from_config(budget.model_of(shape).config.body)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 300, (2, 48)))
    found = counter.get_total_flops()
    # Eager attention computes what the causal mask then hides: twice ours.
    attention = 2 * 48 * shape.layers * 2 * shape.q * 48
    assert found == pytest.approx(cost.forward_flops(shape, 2, 48, 48) + attention, rel=0.01)


def test_seconds_follow_operations_and_bytes():
    card = cost.Card("ideal", 80e9, 100e12, 1e12)
    shape, run = cost.qwen3(), Run("sft", 294, 480, 4)
    one = cost.seconds(shape, run, card, utilization=0.5)["passes"]
    assert one == pytest.approx(3 * cost.forward_flops(shape, 4, 774, 480) / 50e12)
    assert cost.seconds(shape, dataclasses.replace(run, checkpointing=True), card, 0.5)[
        "passes"
    ] == pytest.approx(one * 4 / 3)
    # A sampled word reads all weights: with a slow memory that is what it costs.
    slow = cost.Card("slow", 80e9, 100e12, 1e9)
    sampling = cost.seconds(shape, Run("grpo", 294, 480, group=2), slow, bandwidth=1.0)["sampling"]
    assert sampling == pytest.approx(
        480 * (4 * shape.parameters + cost.cache(shape, Run("grpo", 294, 480, group=2)) / 2) / 1e9,
        rel=0.01,
    )


def test_storage_and_recipe():
    photos = 95_000 * budget.PNG * 512**2 / 1e9
    assert f"photos {photos:.1f} GB, tokens 4.2 GB, captions 0.1 GB" in budget.recipe()
    rows = {
        r.split(" | ")[0].strip("| "): r.split(" | ")
        for r in budget.recipe(1000, 10, price=2.0).splitlines()
        if r.startswith("| ")
    }
    assert rows["cold start"][1] == "2,000" and rows["VLCoT-GRPO"][1] == "100"
    twice = budget.recipe(190_000, 500).splitlines()[2].split(" | ")
    once = budget.recipe(95_000, 500).splitlines()[2].split(" | ")
    assert float(twice[2]) == pytest.approx(2 * float(once[2]), abs=1.5)


def test_the_table_of_what_fits_follows_the_cards():
    lines = budget.fit_table().splitlines()
    assert [c.strip() for c in lines[0].strip("|").split("|")][1:] == [
        "T4",
        "L4",
        "A100-40",
        "A100-80",
        "8×H100",
    ]
    assert len(lines) == 2 + len(budget.plans())
    for line in lines[2:]:
        cells = [c.strip() for c in line.strip("|").split("|")][1:]
        for cell, card in zip(cells, cost.CARDS, strict=True):
            fits, gb = re.match(r"(yes|no), ([\d.]+)", cell).groups()
            if abs(float(gb) * GB - 0.92 * card.bytes) > 0.1 * GB:
                assert (fits == "yes") == (float(gb) * GB < 0.92 * card.bytes)
        verdicts = [c.startswith("yes") for c in cells]
        assert verdicts == sorted(verdicts)  # what fits a card fits every larger one


def test_the_command(capsys, tmp_path):
    assert main("cost middle --phase sft --batch 2 --price 1".split()) == 0
    said = capsys.readouterr().out
    assert "443 M parameters" in said and "65 + 437 tokens" in said and "money" in said
    assert main(["cost", "--table", "-o", str(tmp_path / "cost.md")]) == 0
    assert "## The paper's recipe" in (tmp_path / "cost.md").read_text(encoding="utf-8")
    Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16).save_pretrained(tmp_path / "mine")
    assert main(["cost", str(tmp_path / "mine")]) == 0
    assert main(["cost", str(ASSETS / "nano" / "policy-sft")]) == 0
    capsys.readouterr()
    sizes = []
    for more in ("", "--accumulate 4", "--accumulate 1"):
        assert main(f"cost middle --prompts 2 --group 8 --batch 4 {more}".split()) == 0
        sizes.append(capsys.readouterr().out)
    assert sizes[0] == sizes[1] != sizes[2]  # as the trainer does it: all chains in a step
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "many"}')
    wrong_policy = tmp_path / "policy"
    wrong_policy.mkdir()
    (wrong_policy / "config.json").write_text('{"model_type": "realsr_chain", "heads": 0}')
    for wrong, sentence in (
        (["cost", str(broken)], "config.json is damaged or of a class"),
        (["cost", str(wrong_policy)], "config.json is damaged or of a class"),
        (["cost", "--table", "-o", str(tmp_path)], "is a folder"),
        (["cost", "nowhere"], "no model nowhere"),
        (["cost", "--offload"], "offload belongs to ZeRO-3"),
    ):
        assert main(wrong) == 2 and sentence in capsys.readouterr().err


def test_too_little_memory_is_said_before_anything_is_loaded(monkeypatch):
    cost.require(1.0, torch.device("cpu"), "a byte")
    monkeypatch.setattr(cost, "free_bytes", lambda device: 2.0 * GB)
    with pytest.raises(
        RuntimeError, match=r"SFT needs about 5.0 GB and cpu has 2.0 GB free: lower batch"
    ):
        cost.require(5.0 * GB, torch.device("cpu"), "SFT")


@pytest.mark.skipif(
    sys.platform != "linux" and not torch.cuda.is_available(),
    reason="peak memory is read on Linux or CUDA",
)
def test_measured_peak_of_the_real_trainer_is_near_the_count():
    """Each training in a process of its own; 60 MB are for what the count leaves out."""
    shape = dataclasses.replace(cost.nano(), layers=2)
    for run in (
        Run("sft", batch=8, optimizer="muon", average=True),
        Run("grpo", 65, 454, 4, 2, 2, 4, fused=False),
    ):
        found, count = budget.measure(shape, run), memory(shape, run).peak
        assert 0.7 * count - 60e6 < found["peak"] < 1.3 * count + 60e6 and found["seconds"] > 0


def test_a_measurement_that_fails_says_why_and_costs_no_other_row(monkeypatch):
    broken, said = (
        dataclasses.replace(cost.nano(), heads=0),
        "  File x\nZeroDivisionError: integer modulo by zero\n  0%|  | 0/2",
    )
    for text, sentence in (
        (said, "ZeroDivisionError: integer modulo by zero$"),
        ("Loading", "it was killed, probably for want of memory"),
    ):
        monkeypatch.setattr(
            budget.subprocess,
            "run",
            lambda *a, text_=text, **k: subprocess.CompletedProcess(a, 1, "", text_),
        )
        with pytest.raises(RuntimeError, match=f"measuring failed: {sentence}"):
            budget.measure(broken, Run())
    run = Run("sft", 100, 100, precision="mixed")

    def measure(shape, run, device):
        if not shape.heads:
            raise RuntimeError("measuring failed: oops")
        return {"peak": 2 * memory(shape, run).peak, "seconds": 4.0}

    monkeypatch.setattr(budget, "measure", measure)
    rows = budget.measured_table({"bad": (broken, run), "good": (cost.nano(), run)}).splitlines()[
        2:
    ]
    assert "measuring failed: oops" in rows[0] and rows[1].endswith("| 0.50 | 50 |")


def test_a_reward_with_spread_and_orders_as_json():
    assert budget.spread(["a a b", "a b c d"]) == [2 / 3, 1.0]
    run = Run("grpo", fused=False)
    assert Run(**json.loads(json.dumps(dataclasses.asdict(run)))) == run
