"""The trainings on a tiny scale: they run, resume, and learn from what they say they do."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from realsr_r1 import photographs
from realsr_r1.pretraining import recipes, stages
from realsr_r1.pretraining.loop import FitConfig
from realsr_r1.pretraining.muon import MuonAdamW, orthogonalize
from realsr_r1.pretraining.recipes import Machine, PolicyLoss, Replay, Run, TokenizerLoss


def test_fine_texture_is_cut_without_scaling_half_of_the_time(data):
    """Alternate black and white pixels survive a cut at their own size, and nothing else."""
    lattice = np.indices((300, 400)).sum(0) % 2 * 255
    image = Image.fromarray(lattice.astype(np.uint8)).convert("RGB")
    fine, rng = recipes.FinePairs(data.photos), np.random.default_rng(0)
    cuts = [np.asarray(fine.cut(image, rng)[0]) for _ in range(60)]
    assert {cut.shape for cut in cuts} == {(128, 128, 3)}
    whole = [set(np.unique(cut)) == {0, 255} and cut.std() > 127 for cut in cuts]
    assert 15 < sum(whole) < 45
    small = image.resize((100, 90))
    assert np.asarray(fine.cut(small, rng)[0]).shape == (128, 128, 3)


def test_replay_uses_each_sample_about_as_often_as_it_should():
    made = []

    def fresh():
        while True:
            made.append(len(made))
            yield {"x": torch.full((4,), made[-1])}

    source = Replay(fresh(), size=8, reuse=4, capacity=100)
    seen = torch.cat([next(source)["x"] for _ in range(50)])
    assert len(made) == pytest.approx(400 / (4 * 4), abs=1)
    assert seen.unique().numel() > 0.8 * len(made)


def test_replay_keeps_the_newest_of_a_full_store():
    source = Replay(iter([{"x": torch.full((4,), i)} for i in range(9)]), 4, 1, capacity=8)
    for _ in range(9):
        last = next(source)["x"]
    assert last.min() >= 7


def test_matrices_of_one_shape_are_made_orthogonal_together():
    g = torch.Generator().manual_seed(0)
    m = torch.randn(3, 6, 10, generator=g)
    together = orthogonalize(m)
    for one, alone in zip(together, m, strict=True):
        torch.testing.assert_close(one, orthogonalize(alone))
        assert torch.linalg.svdvals(one).min() > 0.3


def test_muon_moves_matrices_and_embeddings_of_a_policy(tiny):
    _, policy = tiny()
    before = {k: v.clone() for k, v in policy.named_parameters()}
    optimizer = MuonAdamW(policy, lr=1e-2)
    ids = torch.tensor([policy.vocabulary.prompt])
    policy(ids, torch.rand(1, 3, 32, 32)).logits.square().mean().backward()
    optimizer.step()
    moved = {k for k, v in policy.named_parameters() if not torch.equal(v, before[k])}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"} <= moved


def test_the_policy_trains_on_codes_of_its_own_and_goes_on_after_a_kill(data, tmp_path, tiny):
    vq, policy = tiny()
    loss = PolicyLoss(own_from=0.0, own=1.0, reuse=2)
    fit = FitConfig(minutes=60, steps=4, lr=1e-2, warmup=1, log_every=2, checkpoint_minutes=0)
    recipes.train_policy(policy, vq, data, Run(tmp_path, Machine(batch=2), fit), loss)
    assert (tmp_path / "log.csv").read_text(encoding="utf-8").count("\n") == 3
    last = tmp_path / "checkpoint.pt"
    last.write_bytes(last.read_bytes()[:-5000])  # the disk was full: the one before is whole
    more = FitConfig(minutes=60, steps=7, lr=1e-2, warmup=1, log_every=2, checkpoint_minutes=0)
    recipes.train_policy(tiny()[1], vq, data, Run(tmp_path, Machine(batch=2), more), loss)
    assert (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()[-1].startswith("7,")


def test_a_training_goes_on_with_new_items_and_its_own_settings(data, tmp_path, tiny):
    class Noting(photographs.Pairs):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    loss = TokenizerLoss(adversary=0)
    for steps in (2, 3):
        seen = []
        fit = FitConfig(steps=steps, lr=1e-3, warmup=1, checkpoint_minutes=0)
        pairs = Noting(data.photos, labels=False)
        recipes.train_tokenizer(tiny()[0], pairs, Run(tmp_path, Machine(batch=2), fit), loss)
    assert seen == [4, 5]
    other = FitConfig(steps=4, lr=2e-3, warmup=1)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.001, now 0.002\)"):
        recipes.train_tokenizer(tiny()[0], data, Run(tmp_path, Machine(batch=2), other), loss)


def test_the_decoder_learns_and_the_codes_keep_their_meaning(data, tmp_path, tiny):
    vq, policy = tiny()
    book = vq.codebook.weight.clone()
    first = next(vq.encoder.parameters()).clone()
    last = vq.decoder.out[1].weight.clone()
    fit = FitConfig(minutes=60, steps=2, lr=1e-3, warmup=1)
    machine = Machine(batch=2, draws=2)
    made = recipes.train_decoder(vq, policy, data, Run(tmp_path, machine, fit))
    assert torch.equal(made.codebook.weight, book)
    assert torch.equal(next(made.encoder.parameters()), first)
    assert not torch.equal(vq.decoder.out[1].weight, last)


def test_an_ending_has_its_own_file_until_the_decoder_changes(tmp_path, tiny):
    vq, _ = tiny()
    vq.decoder.clean = vq.decoder.new_ending()
    weights = tmp_path / "tokenizer"
    for stage in ("ending", "policy", "decoder"):
        (tmp_path / stage).mkdir()
    stages.finish(tmp_path / "ending", vq, weights, stages.Settings())
    kept = load_file(weights / "clean.safetensors")
    assert {k.split(".")[1] for k in kept} == {"clean"} and len(list(weights.iterdir())) == 1
    stages.finish(tmp_path / "policy", tiny()[1], tmp_path / "policy-sft", stages.Settings())
    assert (weights / "clean.safetensors").exists()
    stages.finish(tmp_path / "decoder", tiny()[0], weights, stages.Settings())
    assert [f.name for f in weights.glob("*.safetensors")] == ["model.safetensors"]


def test_what_builds_on_a_stage_that_is_trained_anew_begins_anew(tmp_path, monkeypatch, capsys):
    """Else a policy would go on with codes that mean something else now."""
    done = []

    def stage(what, s):
        done.append(what)
        (s.out / what).mkdir(exist_ok=True)
        if what == stops:
            (s.out / what / "checkpoint.pt").touch()
            raise KeyboardInterrupt
        kept = json.dumps(asdict(s), default=str)
        (s.out / what / "settings.json").write_text(kept, encoding="utf-8")

    monkeypatch.setattr(stages, "_stage", stage)
    monkeypatch.setattr(stages.peers, "missing", {"absent": "no weights"}.get)
    settings, stops = stages.Settings(out=tmp_path, minutes=10), "policy"
    with pytest.raises(KeyboardInterrupt):
        stages.run("all", settings)
    assert done == ["tokenizer", "policy"]
    done, stops = [], ""
    stages.run("all", replace(settings, workers=2))
    assert done == ["policy", "decoder", "ending"]
    assert (tmp_path / "policy" / "checkpoint.pt").exists()  # it went on from there
    done = []
    stages.run("all", replace(settings, minutes=20))
    assert done == [*stages.SHARES] and not list(tmp_path.rglob("checkpoint.pt"))
    for kept in tmp_path.rglob("settings.json"):
        kept.unlink()
    done = []
    stages.run("all", replace(settings, teacher="absent"))
    assert done == ["tokenizer", "policy", "decoder"]
    assert "without its teacher: no weights" in capsys.readouterr().out
