"""The second ending on a tiny scale: what it learns from, and that nothing else changes."""

import copy

import torch

from realsr_r1 import degradation
from realsr_r1.evaluation.nano import bicubic
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining import ending, stages
from realsr_r1.pretraining.loop import FitConfig
from realsr_r1.pretraining.recipes import Machine, Run


def test_only_the_second_ending_learns(data, tmp_path, tiny):
    vq, policy = tiny()
    codes, lr = torch.randint(64, (1, 16, 16)), torch.rand(1, 3, 32, 32)
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    plain, both = vq.decode(codes), vq.decode(codes, lr)
    fit = FitConfig(minutes=60, steps=2, lr=1e-2, warmup=1, ema=0.0)
    run = Run(tmp_path, Machine(batch=2, draws=2), fit)
    made = ending.train_ending(RealSR(vq, policy), data, run, bicubic)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items() if k in before)
    torch.testing.assert_close(made.decode(codes), plain)
    assert not torch.allclose(made.decode(codes, lr), both, atol=1e-3)
    made.decoder.clean = None
    torch.testing.assert_close(made.decode(codes, lr), both)


def test_what_an_ending_learns_from(data, tiny):
    """The chain's picture, seen small and drawn anew; the LR photo itself, drawn by the teacher,
    where the chain reads it as clean or codes are left out."""
    vq, policy = tiny()
    before = RealSR(vq, policy)
    words = ["no blur, keep, no noise, no compression, downsample"] * 3 + [
        "heavy blur, keep, no noise, no compression, downsample"
    ] * 3

    def sample(*args):
        drawn = RealSR.sample(before, *args)
        for chain, said in zip(drawn.chains, words, strict=True):
            chain.degradation = said
        return drawn

    before.sample = sample
    batch = {k: torch.stack([data[i][k] for i in range(6)]).float() / 255 for k in ("hr", "lr")}
    torch.manual_seed(0)
    out = next(ending._lessons(before, iter([batch]), lambda x: 1 - bicubic(x)))
    assert sorted({round(x, 2) for x in out["trust"].tolist()}) == [0.0, 0.35, 0.5]
    for i, trust in enumerate(out["trust"]):
        codes, lr = out["drawn"][i : i + 1], batch["lr"][i : i + 1]
        expected = 1 - bicubic(lr)[0]
        if trust == vq.config.trust:
            expected = ending.taught(before.decode(codes, lr)[0], lambda x: 1 - bicubic(x))
        assert trust in (0.0, float(vq.trust(torch.tensor(float(i < 3)))))
        torch.testing.assert_close(out["target"][i] / 255, expected, atol=0.01, rtol=0)


def test_what_a_teacher_is_shown_keeps_its_content():
    smooth = torch.linspace(0.2, 0.8, 128).expand(3, 128, 128)
    torch.testing.assert_close(ending.taught(smooth, bicubic), smooth, atol=0.01, rtol=0)
    fine = torch.rand(3, 128, 128)
    assert ending.taught(fine, bicubic).std() < 0.5 * fine.std()


def test_a_training_goes_on_from_the_ending_that_is_there(data, tmp_path, tiny):
    vq, policy = tiny()
    vq.decoder.clean = vq.decoder.new_ending()
    with torch.no_grad():
        vq.decoder.clean.later[2][1].bias += 0.7
    before = copy.deepcopy(vq.decoder.clean.later[2][1].bias)
    fit = FitConfig(minutes=60, steps=1, lr=1e-4, warmup=1, ema=0.0)
    run = Run(tmp_path, Machine(batch=2, draws=2), fit)
    made = ending.train_ending(RealSR(vq, policy), data, run, bicubic)
    learnt = made.decoder.clean.later[2][1].bias
    assert not torch.equal(learnt, before)
    torch.testing.assert_close(learnt, before, atol=1e-3, rtol=0)


def test_a_teacher_on_the_cpu_is_asked_for_few_pictures_at_a_time(monkeypatch):
    """A GPU would else wait minutes for the first step."""
    monkeypatch.setattr(stages, "device_of", lambda _: torch.device("cuda"))
    settings = stages.Settings()
    assert settings.machine("ending").draws < settings.machine("decoder").draws / 10


def test_half_of_an_endings_crops_are_lightly_damaged():
    settings, light = stages.Settings(), degradation.PRESETS["nano-light"]
    made = stages._crops(settings, "ending")
    assert [x.config == light for x in made.sets] == [False, True]
    torch.testing.assert_close(made.weights, torch.tensor([0.5, 1.0]))
    assert all(x.config != light for x in stages._crops(settings, "tokenizer").sets)
