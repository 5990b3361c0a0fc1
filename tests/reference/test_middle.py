"""A pretrained Qwen3 becomes a chain policy."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from realsr_r1 import vlcot
from realsr_r1.cli import main
from realsr_r1.pipeline import RealSR
from realsr_r1.planning import cost
from realsr_r1.reference import qwen
from realsr_r1.sampling import Sampling

SENTENCE = "a bird on grass , rough image of a photo , light blur and heavy noise , end of image"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny random Qwen3 with grouped queries in the hub's format, and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "qwen"
    inner, byte = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    inner.pre_tokenizer, inner.decoder = byte(add_prefix_space=False), decoders.ByteLevel()
    learn = trainers.BpeTrainer(vocab_size=340, initial_alphabet=byte.alphabet())
    inner.train_from_iterator([SENTENCE] * 4, learn)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="Ġthe").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=400, **shape, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> RealSR:
    return RealSR.from_pretrained("nano", "cpu")


@pytest.fixture(scope="module")
def policy(source, model):
    return qwen.start(source, model.tokenizer)


def test_the_body_is_the_pretrained_one(policy, source):
    old = qwen.pretrained(source)[0]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        ours, theirs = (m(inputs_embeds=x).last_hidden_state for m in (policy.model, old.model))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_words_start_as_the_mean_of_their_pieces(policy, source):
    old, words = qwen.pretrained(source)
    rows, v = policy.get_input_embeddings().weight.detach(), policy.vocabulary
    bird = words.encode(" bird", add_special_tokens=False)
    assert len(bird) == 1  # a word that it has keeps its row
    table = old.get_input_embeddings().weight.detach()
    assert torch.allclose(rows[v.ids["bird"]], table[bird[0]], atol=1e-6)
    pieces = words.encode(" tulip", add_special_tokens=False)
    away = (rows[v.ids["tulip"]] - table[pieces].mean(0)).norm()
    assert len(pieces) > 1 and away < 0.5 * table.std(0).norm()


def test_codes_that_look_alike_start_alike(policy, model):
    rows = policy.get_input_embeddings().weight.detach()[policy.vocabulary.first_code :]
    book = torch.nn.functional.normalize(model.tokenizer.codebook.weight.detach(), dim=1)
    some = torch.arange(0, len(book), 8)
    away, alike = torch.cdist(rows[some], rows[some]), book[some] @ book[some].T
    pair = torch.triu_indices(len(some), len(some), 1)
    found = torch.corrcoef(torch.stack([away[*pair], -alike[*pair]]))[0, 1]
    assert found > 0.5 and len(rows.unique(dim=0)) == len(rows)


def test_it_draws_learns_and_is_saved_like_any_other(policy, model, tmp_path, source):
    mixed = RealSR(model.tokenizer, policy)
    lr = torch.rand(1, 3, 32, 32)
    drawn = mixed.sample(lr, Sampling.rollout(), torch.Generator().manual_seed(0))
    assert vlcot.well_formed(policy.vocabulary.decode(drawn.ids[0]))
    folder = tmp_path / "middle"
    assert main(f"middle {folder} --source {source}".split()) == 0
    assert main(f"middle {folder} --source {source}".split()) == 2  # trained ones, perhaps
    command = f"train policy --init {folder} --out {folder} --steps 1 --batch 2 --device cpu"
    assert main(command.split()) == 0
    again = RealSR.from_pretrained(folder, "cpu")
    assert again.policy.config.kv_heads == 2
    assert again.sample(lr, Sampling(), torch.Generator().manual_seed(0)).chains[0].complete


def test_what_cannot_be_had_is_one_sentence(source, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no model nowhere/at-all: give a folder"):
        qwen.pretrained("nowhere/at-all")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="is a llama model: the middle size takes a Qwen3"):
        qwen.pretrained(tmp_path / "llama")
    cut = tmp_path / "cut"
    shutil.copytree(source, cut)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="incomplete, damaged or do not fit together"):
        qwen.pretrained(cut)
    monkeypatch.setattr(cost, "free_bytes", lambda device: 10.0)
    with pytest.raises(RuntimeError, match="loading qwen needs about"):
        qwen.pretrained(source)
