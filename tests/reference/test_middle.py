import csv
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from realsr_r1.first import __main__, grpo, policy, sft, vlcot
from realsr_r1.first.grpo import GrpoSettings
from realsr_r1.planning import cost
from realsr_r1.reference import qwen as middle

SENTENCE = (
    "a bird on grass , rough image of a photo , the light blur and heavy noise in a small brown "
    "bird , end of image"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny random Qwen3 with grouped queries in the hub's format, and a byte-level tokenizer of
    its own."""
    folder = tmp_path_factory.mktemp("hub") / "qwen"
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner.train_from_iterator(
        [SENTENCE] * 4,
        trainers.BpeTrainer(vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="Ġthe").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tiny):
    return policy.PolicyConfig(sizes=(2, 3, 4), max_words=4)


@pytest.fixture(scope="module", params=(True, False), ids=("extended", "own words"))
def model(request, source, tiny, small):
    return middle.extend(*middle.pretrained(source), *tiny[:2], like=small, keep=request.param)


@pytest.fixture(scope="module")
def folder(source, tiny, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("middle") / "policy"
    policy.save(middle.extend(*middle.pretrained(source), *tiny[:2], like=small), out)
    return out


@pytest.fixture(scope="module")
def table(pairs, tiny, folder):
    return sft.chains(pairs, tiny[0], tiny[1], policy.load(folder).vocabulary)


def test_our_words_come_behind_the_pretrained_ones_and_known_words_keep_their_rows(
    source, tiny, small
):
    model, tokenizer = middle.pretrained(source)
    old = model.get_input_embeddings().weight.detach().clone()
    model = middle.extend(model, tokenizer, *tiny[:2], like=small)
    v, rows = model.vocabulary, model.get_input_embeddings().weight
    assert model.config.vocab_size == len(v) == len(set(v.words)) == len(rows) and v.base == 400
    assert torch.equal(rows[:400], old)
    bird = tokenizer.encode(" bird")
    assert len(bird) == 1 and v.ids["bird"] == bird[0] and "bird" not in v.words[400:]
    assert v.ids["<c0>"] > v.ids["<l0>"] > v.ids["<degradation>"] >= 400 and v.words[-1] == "<c63>"
    assert model.get_output_embeddings().weight is rows or torch.equal(
        model.get_output_embeddings().weight, rows
    )


def test_new_rows_lie_where_pretrained_rows_lie(model, source, tiny):
    v, rows = model.vocabulary, model.get_input_embeddings().weight.detach()
    old = middle.pretrained(source)[0].get_input_embeddings().weight.detach()
    new = rows[v.base :]
    assert (new.mean(0) - old.mean(0)).norm() < old.std(0).norm()
    codes = rows[v.first_code :]
    assert (
        0.5
        < float((codes - old.mean(0)).norm(dim=1).mean() / (old - old.mean(0)).norm(dim=1).mean())
        < 2
    )
    assert len(codes.unique(dim=0)) == len(codes)
    # Codes that look alike start alike.
    book = torch.nn.functional.normalize(tiny[0].quantize.weight, dim=1)
    near, start = torch.cdist(book, book).flatten(), torch.cdist(codes, codes).flatten()
    assert float(torch.corrcoef(torch.stack([near, start]))[0, 1]) > 0.5


def test_own_words_alone_start_from_their_pretrained_rows(source, tiny, small):
    model, tokenizer = middle.pretrained(source)
    old = model.get_input_embeddings().weight.detach().clone()
    model = middle.extend(model, tokenizer, *tiny[:2], like=small, keep=False)
    v = model.vocabulary
    assert v.words == vlcot.Vocabulary(64, 32).words and model.config.vocab_size == len(v)
    assert torch.allclose(
        model.get_input_embeddings().weight[v.ids["bird"]], old[tokenizer.encode(" bird")[0]]
    )


def test_text_and_ids_agree_and_padding_is_silent(model):
    v = model.vocabulary
    text = "<rough_understand> a bird on grass </rough_understand> <image> <c3> <row> </image>"
    ids = v.encode(text)
    assert v.decode([*ids, v.ids[vlcot.EOS], v.ids[vlcot.PAD]]) == text
    assert v.tokenizer(text)["input_ids"] == ids and v.tokenizer.decode(ids) == text


def test_samples_are_well_formed_and_saving_keeps_them(model, tmp_path):
    prompts = model.vocabulary.prompts(torch.zeros(2, 3, 4, dtype=torch.long))
    drawn = policy.sample(
        model, prompts, policy.Sampling.rollout(), torch.Generator().manual_seed(1)
    )
    assert all(vlcot.well_formed(model.vocabulary.decode(row)) for row in drawn.ids)
    policy.save(model, tmp_path / "p")
    again = policy.load(tmp_path / "p")
    assert again.vocabulary.words == model.vocabulary.words and again.nano == model.nano
    twice = policy.sample(
        again, prompts, policy.Sampling.rollout(), torch.Generator().manual_seed(1)
    )
    assert (
        drawn.ids[:, :8] == twice.ids[:, :8]
    ).float().mean() > 0.9  # half precision may turn a close draw


def test_chains_carry_ids_beyond_16_bits(pairs, tiny):
    v = vlcot.Vocabulary(64, 32, base=151_936, known={"bird": 11958})
    row = sft.chains(pairs, tiny[0], tiny[1], v)[0]
    text = v.decode(row["labels"][row["labels"] != -100].tolist())
    assert (
        vlcot.well_formed(text) and row["input_ids"].max() > 2**15 and (row["input_ids"] >= 0).all()
    )
    whole = sft.chains(pairs, tiny[0], tiny[1], v)
    ids, labels = np.stack(whole["input_ids"]), np.stack(whole["labels"])
    # Padding is out of the loss, the end is in it.
    assert ((labels == v.ids[vlcot.EOS]).sum(1) == 1).all() and (
        labels[ids == v.ids[vlcot.PAD]] == -100
    ).all()


def weights(path):
    return policy.load(path).state_dict()


def test_lora_trains_adapters_and_our_rows_and_leaves_pretrained_rows(
    folder, table, tiny, tmp_path
):
    v = policy.load(folder).vocabulary
    how = middle.scale(v, rank=4)
    sft.train_sft(
        table,
        table.select(range(4)),
        tmp_path / "p",
        *tiny[:2],
        batch=2,
        lr=1e-2,
        device="cpu",
        max_steps=2,
        init=folder,
        scale=how,
    )
    before, after = weights(folder), weights(tmp_path / "p")
    assert before.keys() == after.keys()  # merged: a policy like any other
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert all(k in moved for k in before if k.split(".")[-2] in middle.ADAPTED)
    assert not any("norm" in k for k in moved)
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1)
    assert not rows[: v.base].any() and rows[v.base :].float().mean() > 0.9


def test_all_weights_can_be_trained_with_accumulation_and_checkpointing(
    folder, table, tiny, tmp_path
):
    """Two micro-batches of two with checkpointing do what a batch of four does (up to the weighting
    of texts of other lengths)."""
    found = []
    for name, batch, how in (
        ("one", 4, sft.Scale(optimizer="sgd")),
        ("two", 2, sft.Scale(optimizer="sgd", accumulate=2, checkpointing=True)),
    ):
        out = tmp_path / name
        sft.train_sft(
            table,
            None,
            out,
            *tiny[:2],
            batch=batch,
            lr=0.5,
            device="cpu",
            max_steps=1,
            init=folder,
            scale=how,
        )
        found.append(weights(out))
    before, (one, two) = weights(folder), found
    moved = max(float((one[k] - before[k]).abs().max()) for k in one)
    assert moved > 1e-2 and max(float((one[k] - two[k]).abs().max()) for k in one) < 0.1 * moved


def code_share(completions, **_):
    return [[w for w in t.split() if w.startswith("<c")].count("<c7>") / 29 for t in completions]


@pytest.fixture(scope="module")
def prompts(folder, tiny):
    return grpo.prompts(range(500_000, 500_004), tiny[1], policy.load(folder).vocabulary)


@pytest.mark.parametrize("full", (False, True), ids=("lora", "full"))
def test_grpo_improves_it_with_the_kl_on(folder, prompts, tmp_path, full):
    settings = GrpoSettings(
        steps=2, prompts=2, group=4, micro_batch=4, lr=1e-2, beta=0.1, save_steps=100
    )
    how = (
        sft.Scale(checkpointing=True)
        if full
        else middle.scale(policy.load(folder).vocabulary, rank=4)
    )
    grpo.train_grpo(
        folder, prompts, [code_share], tmp_path / "p", settings, device="cpu", scale=how
    )
    with (tmp_path / "p.csv").open() as f:
        log = [r for r in csv.DictReader(f) if r.get("reward")]
    # With adapters the reference is the same model, adapters switched off: at first they agree,
    # then not.
    assert float(log[0]["kl"]) == pytest.approx(0, abs=1e-6) and float(log[1]["kl"]) > 1e-5
    before, after = weights(folder), weights(tmp_path / "p")
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1)
    assert rows[400:].any() and bool(rows[:400].any()) == full


def test_lora_and_checkpointing_sample_what_the_loss_sees(folder, prompts, tmp_path):
    """With adapters and rows that differ from where they start: the loss must see the rows in the
    head, too."""
    how = sft.Scale(middle.lora(policy.load(folder).vocabulary, 4), checkpointing=True)
    settings = GrpoSettings(
        steps=1, prompts=1, group=4, micro_batch=4, lr=1e-1, beta=0.0, save_steps=100
    )
    trainer = grpo.make_trainer(
        folder, prompts, [code_share], tmp_path / "q", settings, device="cpu", scale=how
    )
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if p.requires_grad:
                p.add_(
                    0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    trainer.model.train()
    out = trainer.rollout_func(prompts["prompt"][:1] * 4, trainer)
    n = max(map(len, out["completion_ids"]))
    completion = torch.tensor([c + [0] * (n - len(c)) for c in out["completion_ids"]])
    mask = torch.tensor([[1] * len(c) + [0] * (n - len(c)) for c in out["completion_ids"]])
    prompt = torch.tensor(out["prompt_ids"])
    with torch.no_grad():
        seen = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompt, completion], 1),
            torch.cat([torch.ones_like(prompt), mask], 1),
            n,
        )[0]
    sampled = torch.tensor([p + [0.0] * (n - len(p)) for p in out["logprobs"]])
    assert ((seen - sampled).abs() * mask).max() < 1e-3


def test_what_cannot_be_loaded_is_said_in_one_sentence(source, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no model .*nowhere: give a folder"):
        middle.pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no model no-such/model: give a folder"):
        middle.pretrained("no-such/model")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"is a llama model: the middle size takes a Qwen3"):
        middle.pretrained(tmp_path / "llama")
    cut = shutil.copytree(source, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="incomplete, damaged"):
        middle.pretrained(cut)
    kept = load_file(source / "model.safetensors")
    kept.pop("model.layers.1.mlp.up_proj.weight")
    save_file(kept, cut / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights, the first is model.layers.1.mlp.up_proj.weight"
    ):
        middle.pretrained(cut)
    (cut / "config.json").write_text(
        (source / "config.json")
        .read_text()
        .replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ValueError, match=r"config.json is damaged or of a class"):
        middle.pretrained(cut)
    monkeypatch.setattr(cost, "free_bytes", lambda device: 1000.0)
    with pytest.raises(RuntimeError, match=r"loading qwen needs about .* free"):
        middle.pretrained(source)


def test_starting_twice_keeps_what_is_there(source, tiny, tmp_path):
    out = middle.start(source, tmp_path / "s", *tiny[:2])
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert (
        middle.start(tmp_path / "gone", out, *tiny[:2])
        .joinpath("model.safetensors")
        .stat()
        .st_mtime_ns
        == stamp
    )


def test_the_published_size_fits_16_gb_by_the_calculators_count():
    t4 = cost.CARDS[0]
    shape = cost.qwen3(151_936 + 2_400)
    run = {"prompt": 294, "completion": 480, "batch": middle.SFT["batch"], "checkpointing": True}
    assert cost.memory(shape, cost.Run("sft", precision="mixed", **run)).peak < 0.92 * t4.bytes
    lora = {"lora": 16, "new_rows": 2_400, "precision": "bfloat16"}
    one = cost.memory(shape, cost.Run("sft", **run, **lora)).peak
    two = cost.memory(
        shape, cost.Run("grpo", **run | {"batch": 4}, **lora, prompts=2, accumulate=4)
    ).peak
    assert one < 0.92 * t4.bytes and two < 0.92 * t4.bytes


def test_the_plan_is_made_before_anything_is_loaded(folder, monkeypatch):
    how = middle.prepare(folder, "grpo", device="cpu")
    assert (
        how.lora is not None
        and how.dtype == torch.float32
        and middle.prepare(folder, "sft", True, "cpu").lora is None
    )
    need = middle.plan(folder, "grpo", how)
    assert need.peak > 4 * sum(p.numel() for p in policy.load(folder).parameters())
    assert (
        middle.plan(folder, "sft", how, batch=8).peak
        > middle.plan(folder, "sft", how, batch=2).peak
    )
    monkeypatch.setattr(cost, "free_bytes", lambda device: 1000.0)
    with pytest.raises(RuntimeError, match="sft of LoRA adapters with 4 chains a pass needs about"):
        middle.prepare(folder, "sft", device="cpu")
    with pytest.raises(FileNotFoundError, match="no policy in none/: train it first"):
        middle.config_of(folder / "none")


def test_the_commands_train_it(source, tmp_path, capsys):
    """SFT and GRPO of the middle size from the command line, with the shipped
    tokenizer and reader."""
    common = [
        "--size",
        "middle",
        "--out",
        str(tmp_path),
        "--data",
        str(tmp_path / "data"),
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    sizes = ["--pairs", "6", "--batch", "2", "--base", str(source)]
    assert __main__.main(["train", "sft", *common, *sizes, "--own-words"]) == 0, (
        capsys.readouterr().err
    )
    assert policy.load(tmp_path / "policy-sft").nano.base == 0
    few = [
        "--prompts",
        "2",
        "--group",
        "2",
        "--micro-batch",
        "2",
        "--rewards",
        "degradation",
        "--words",
        "24",
    ]
    assert __main__.main(["train", "grpo", *common, *few]) == 0, capsys.readouterr().err
    assert policy.load(tmp_path / "policy-grpo").nano == policy.load(tmp_path / "policy-sft").nano
    assert (
        __main__.main(["train", "tokenizer", *common]) == 2
        and "has no middle size" in capsys.readouterr().err
    )
    assert (
        __main__.main(["train", "grpo", *common, "--out", str(tmp_path / "none")]) == 2
        and "no policy in policy-sft/" in capsys.readouterr().err
    )
