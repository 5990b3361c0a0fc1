"""The weights that ship, on photographs that ship: what the front page promises."""

import pytest
import torch

from realsr_r1 import RealSR, Sampling, perceptual, vlcot
from realsr_r1.evaluation.nano import bicubic
from realsr_r1.grpo import WORDS
from realsr_r1.photographs import Pairs, load
from realsr_r1.pipeline import decode_grid
from realsr_r1.rewards import degradation_reward
from realsr_r1.sampling import sample

POLICIES = ("policy-grpo", "policy-sft")


@pytest.fixture(scope="module")
def model() -> RealSR:
    return RealSR.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    data = Pairs(load("val"), "nano-heavy", training=False, labels=False)
    items = [data[i] for i in range(16)]
    return tuple(torch.stack([x[k] for x in items]).float() / 255 for k in ("lr", "hr"))


def lpips(y: torch.Tensor, hr: torch.Tensor) -> float:
    return float(perceptual.distance(y, hr).mean())


def test_the_policy_after_grpo_ships_and_restores(model):
    """Without its file restorations would silently be those of the cold start."""
    restores, after, before = (
        next(m.policy.parameters())
        for m in (model, *(RealSR.from_pretrained("nano", "cpu", p) for p in POLICIES))
    )
    assert restores.equal(after) and not restores.equal(before)


@pytest.mark.slow
def test_the_chain_beats_bicubic_and_confetti(model, pairs):
    lr, hr = pairs
    samples = model.sample(lr, Sampling(), torch.Generator().manual_seed(0))
    confetti = torch.randint(
        0, 2048, samples.codes.shape, generator=torch.Generator().manual_seed(1)
    )
    assert lpips(model.finish(samples.chains, lr), hr) < 0.75 * lpips(bicubic(lr), hr)
    # Beside an LR photo of kinds that the model has not learnt, the decoder hides what codes say.
    chain, random = (lpips(model.decode(codes), hr) for codes in (samples.codes, confetti))
    assert chain < 0.75 * random


def test_the_second_ending_ships_and_is_smoother(model, pairs):
    """Without its file restorations would silently be those of the first."""
    lr, hr = pairs
    codes = model.tokenizer.encode(hr)
    with torch.no_grad():
        first, second = (model.tokenizer.decode(codes, lr, clean=c) for c in (False, True))
    steps = [(y[..., 1:] - y[..., :-1]).abs() for y in (first, second, hr)]
    flat = steps[2] < steps[2].median()  # where the truth has no edges
    assert steps[1][flat].mean() < 0.95 * steps[0][flat].mean()
    assert lpips(first, hr) < lpips(second, hr) < 0.6 * lpips(bicubic(lr), hr)


def test_the_form_has_been_learnt(model, pairs):
    """Every chain names five labels and speaks its captions' language."""
    samples = model.sample(pairs[0][:4], Sampling(), torch.Generator().manual_seed(0))
    for chain in samples.chains:
        assert len(chain.labels) == 5
        assert chain.final_understand.split()[2] == "view"
        assert vlcot.well_formed(vlcot.render(chain))


def test_windows_of_a_large_photo_do_not_show(model, monkeypatch):
    """What lies beyond their margin moves no pixel by a grey level."""
    g = torch.Generator().manual_seed(0)
    grid, lr = torch.randint(0, 2048, (40, 40), generator=g), torch.rand(3, 80, 80, generator=g)
    whole = decode_grid(model, grid, lr, 0.6)
    monkeypatch.setattr("realsr_r1.pipeline.WINDOW", 20)
    assert (decode_grid(model, grid, lr, 0.6) - whole).abs().max() < 1 / 255


def test_true_codes_are_a_picture(model, pairs):
    hr = pairs[1]
    assert lpips(model.decode(model.tokenizer.encode(hr)), hr) < 0.25


def test_the_beginner_of_lesson_05_has_something_to_learn(model):
    data = Pairs(load("val"), training=False)
    items = [data[i] for i in range(len(data))]
    lr = torch.stack([x["lr"] for x in items]).float() / 255

    def reward(policy) -> float:
        chains = sample(policy, lr, Sampling(), None, policy.grammar(WORDS)).chains
        said = [vlcot.render(c, WORDS) for c in chains]
        return sum(degradation_reward(said, [x["degradation"] for x in items])) / len(said)

    beginner = RealSR.from_pretrained("nano", device="cpu", policy="policy-cold")
    assert 0.25 < reward(beginner.policy) < reward(model.policy) - 0.02
