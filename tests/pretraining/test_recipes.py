"""The trainings on a tiny scale: they run, resume, and learn from what they say they do."""

import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from realsr_r1 import photographs
from realsr_r1.grpo import GrpoSettings
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining import recipes, stages
from realsr_r1.pretraining.loop import Fit, FitConfig, forget
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


@pytest.mark.parametrize("reuse", [1, 4])
def test_replay_uses_each_sample_as_often_as_it_should(reuse):
    torch.manual_seed(0)
    numbers = [torch.arange(10) + 10 * i for i in range(200)]
    source = Replay(iter([{"x": n, "y": -n} for n in numbers]), size=8, reuse=reuse, ahead=2)
    found = [next(source) for _ in range(reuse * 100)]
    assert all(torch.equal(f["x"], -f["y"]) for f in found)
    batches = [f["x"] for f in found]
    assert all(len(x.unique()) == 8 for x in batches)  # no sample twice in a batch
    used = torch.cat(batches).bincount()
    assert (used[:700] == reuse).all()  # of the last ones some uses are still to come
    assert len(used) < 850


def test_the_uses_of_a_sample_lie_apart():
    fresh = iter([{"x": torch.arange(8) + 8 * i} for i in range(200)])
    source = Replay(fresh, size=8, reuse=4)
    steps = torch.stack([next(source)["x"] for _ in range(100)])
    place = (steps == 80).nonzero()[:, 0]
    assert place[-1] - place[0] >= 4


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
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["extra"]["usage"]["usage"]
    assert (kept < 0.98).any()  # three steps of codes that nobody used: 0.99³, not 0.99
    other = FitConfig(steps=4, lr=2e-3, warmup=1)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.001, now 0.002\)"):
        recipes.train_tokenizer(tiny()[0], data, Run(tmp_path, Machine(batch=2), other), loss)


def test_a_log_has_every_step_once_after_a_kill(tmp_path):
    model = torch.nn.Linear(1, 1)

    def fit(steps: int) -> Fit:
        how = FitConfig(steps=steps, lr=1e-3, warmup=1, log_every=2, checkpoint_minutes=0)
        return Fit(model, torch.optim.SGD(model.parameters(), lr=1e-3), tmp_path, how)

    def loss_of(step: int, done: float):
        if step == killed:
            raise KeyboardInterrupt
        return model(torch.ones(1, 1)).square().sum(), {}

    killed = 5
    with pytest.raises(KeyboardInterrupt):
        fit(8).run(loss_of)
    (tmp_path / "checkpoint.before.pt").replace(tmp_path / "checkpoint.pt")  # of step 4
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"step": 3}, tmp_path / "checkpoint.pt")
    killed = -1
    fit(8).run(loss_of)
    assert pd.read_csv(tmp_path / "log.csv")["step"].tolist() == [2, 5, 7, 8]  # the last, too


def test_a_killed_run_gives_the_weights_of_an_undisturbed_one(tmp_path):
    def run(name: str, stop: int) -> torch.nn.Module:
        def loss_of(step: int, done: float):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return model(x).square().mean(), {}

        torch.manual_seed(0 if stop != -2 else 1)  # whoever goes on has begun with other weights
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        how = FitConfig(steps=8, lr=1e-2, warmup=2, ema=0.9, checkpoint_minutes=0)
        return Fit(model, optimizer, tmp_path / name, how).run(loss_of)

    whole = run("whole", -1)
    with pytest.raises(KeyboardInterrupt):
        run("killed", 5)
    again = run("killed", -2)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_seed_reaches_the_decoder(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(recipes, "train_decoder", lambda *_: drawn.append(torch.rand(1)))
    monkeypatch.setattr(stages.Preview, "decoder", lambda *_: None)
    model = SimpleNamespace(tokenizer=None, policy=None)
    for seed in (3, 3, 4):
        torch.rand(5)  # whatever came before
        stages._decoder(stages.Settings(out=tmp_path, seed=seed), model, "decoder")
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_second_training_in_the_same_place_is_refused_and_changes_nothing(tmp_path, monkeypatch):
    s = stages.Settings(out=tmp_path)
    (tmp_path / "policy-sft").mkdir()
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "checkpoint.pt").touch()

    def train(what, settings, home):
        done.append(what)
        with pytest.raises(ValueError, match="another run is at work"):
            stages.run("tokenizer", replace(s, batch=4))

    done = []
    monkeypatch.setattr(stages, "_train", train)
    stages.run("tokenizer", s)
    stages.run("tokenizer", s)  # the first has ended
    assert done == ["tokenizer", "tokenizer"]
    assert (tmp_path / "policy-sft").exists() and (tmp_path / "decoder/checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("what", "wrong", "said"),
    [
        ("tokenizer", {"photographs": "none"}, "none of the annotated photographs"),
        ("policy", {"photographs": "none"}, "none of the annotated photographs"),
        ("tokenizer", {"vgg": "none"}, "check --vgg"),
        ("ending", {}, "nobody"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_put_aside(what, wrong, said, tmp_path):
    for name in ("tokenizer", "policy-sft", "policy-grpo"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer" / "model.safetensors").touch()
    settings = stages.Settings(out=tmp_path, teacher="nobody")
    wrong = {k: str(tmp_path / v) for k, v in wrong.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        stages._stage(what, replace(settings, **wrong))
    assert (tmp_path / "policy-grpo").exists() and not [*tmp_path.glob("*.before")]


def test_a_stopped_stage_goes_on_with_its_own_settings_alone(tmp_path):
    s = stages.Settings(out=tmp_path, batch=8, minutes=5)
    stages._begin("policy", s)
    stages._begin("policy", replace(s, batch=4))  # there is nothing yet to go on with
    (tmp_path / "policy" / "checkpoint.pt").touch()
    stages._begin("policy", replace(s, batch=4, minutes=10, device="cpu", workers=2))
    (tmp_path / "policy-grpo").mkdir()
    for other in ({"batch": 8}, {"batch": 4, "init": tmp_path / "other"}):
        with pytest.raises(ValueError, match="holds a run of other settings"):
            stages._begin("policy", replace(s, **other))
    assert (tmp_path / "policy-grpo").exists()  # nothing was put aside
    forget(tmp_path / "policy")
    assert not [*(tmp_path / "policy").iterdir()]


def test_a_lost_loss_is_neither_kept_nor_returned(tmp_path):
    model = torch.nn.Linear(1, 1)
    for minutes in (0.0, 60.0):  # at a checkpoint; at the end
        how = FitConfig(steps=3, lr=1e-3, warmup=1, checkpoint_minutes=minutes)
        fit = Fit(model, torch.optim.SGD(model.parameters(), lr=1e-3), tmp_path / str(minutes), how)
        with pytest.raises(RuntimeError, match="is lost at step"):
            fit.run(lambda *_: (model(torch.ones(1, 1)).sum() * torch.nan, {}))
        assert not [*fit.out.glob("*.pt")]


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


def test_weights_of_two_trainings_are_not_mixed(tmp_path, tiny):
    """A policy that learns the codes of one tokenizer is of no use beside another."""
    for name, shift in (("a", 0.0), ("b", 0.5)):
        vq, policy = tiny()
        with torch.no_grad():
            vq.codebook.weight.add_(shift)
        RealSR(vq, policy).save_pretrained(tmp_path / name)
    a, b, c = (tmp_path / x for x in "abc")
    stages.bring(a, a, "tokenizer", "policy-sft")
    stages.bring(a, c, "tokenizer")
    stages.bring(a, c, "tokenizer")  # a run that goes on
    stages.bring(a, b, "policy-sft")  # the same there
    settings = stages.Settings(init=a, out=b, device="cpu", teacher="bicubic")
    for stage in ("policy", "decoder", "ending"):
        with pytest.raises(ValueError, match=r"b holds another tokenizer than .*a: choose"):
            stages.run(stage, settings)
    with pytest.raises(ValueError, match="holds another tokenizer"):
        stages.reinforce(str(a), None, ["format"], b, GrpoSettings(), "cpu")
    (c / "tokenizer" / "clean.safetensors").touch()
    with pytest.raises(ValueError, match="holds another tokenizer"):
        stages.bring(a, c, "tokenizer")


def test_a_policy_is_trained_from_scratch_on_a_tokenizer_alone(tmp_path, tiny, monkeypatch):
    vq, policy = tiny()
    RealSR(vq, policy).save_pretrained(tmp_path)
    begun = []
    monkeypatch.setattr(stages, "finish", lambda *a: None)
    monkeypatch.setattr(stages, "_policy", lambda s, tokenizer, start: begun.append(start))
    for out in ("one", "two"):
        stages.run("policy", stages.Settings(init=tmp_path, out=tmp_path / out, device="cpu"))
        shutil.rmtree(tmp_path / "policy-sft", ignore_errors=True)
    assert begun[0] is not None and begun[1] is None


def test_what_builds_on_a_stage_that_is_trained_anew_begins_anew(tmp_path, monkeypatch, capsys):
    """Else a policy would go on with codes that mean something else now."""
    done = []

    def stage(what, s):
        done.append(what)
        stages.outdate(what, s.out)
        (s.out / what).mkdir(exist_ok=True)
        if what == stops:
            (s.out / what / "checkpoint.pt").touch()
            raise KeyboardInterrupt
        kept = json.dumps(asdict(s), default=str)
        (s.out / what / "settings.json").write_text(kept, encoding="utf-8")

    monkeypatch.setattr(stages, "_stage", stage)
    monkeypatch.setattr(stages.peers, "missing", {"absent": "no weights"}.get)
    settings, stops = stages.Settings(out=tmp_path, minutes=10), "policy"
    for name in ("policy-sft", "policy-grpo"):  # of the tokenizer before
        (tmp_path / name).mkdir()
    with pytest.raises(KeyboardInterrupt):
        stages.run("all", settings)
    assert done == ["tokenizer", "policy"]
    put_aside = {p.name for p in tmp_path.glob("policy-*")}
    assert put_aside == {"policy-sft.before", "policy-grpo.before"}
    done, stops = [], ""
    stages.run("all", replace(settings, workers=2))
    assert done == ["policy", "decoder", "ending"]
    assert (tmp_path / "policy" / "checkpoint.pt").exists()  # it went on from there
    done, stops = [], "tokenizer"  # killed again: the policy that was made is of another tokenizer
    with pytest.raises(KeyboardInterrupt):
        stages.run("all", replace(settings, minutes=20))
    assert not (tmp_path / "policy" / "settings.json").exists()
    assert not (tmp_path / "policy" / "checkpoint.pt").exists()
    (tmp_path / "tokenizer" / "checkpoint.pt").unlink()
    done, stops = [], ""
    stages.run("all", replace(settings, minutes=20))
    assert done == [*stages.SHARES] and not list(tmp_path.rglob("checkpoint.pt"))
    for kept in tmp_path.rglob("settings.json"):
        kept.unlink()
    done = []
    stages.run("all", replace(settings, teacher="absent"))
    assert done == ["tokenizer", "policy", "decoder"]
    assert "without its teacher: no weights" in capsys.readouterr().out
