"""The chain against the final image alone, on a tiny scale."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from realsr_r1 import photographs, sft
from realsr_r1.ablations import chain
from realsr_r1.evaluation import benchmark
from realsr_r1.pipeline import RealSR
from realsr_r1.policy import ChainPolicy
from realsr_r1.pretraining import redraw
from realsr_r1.pretraining.recipes import Machine


def test_variants_of_a_seed_are_trained_and_measured_side_by_side(tmp_path):
    model = RealSR.from_pretrained("nano", "cpu")
    settings = chain.Settings(None, tmp_path, steps=1)
    photos = photographs.load("test")[:2]
    paths = chain.seeds(model, photos, settings, Machine(batch=2), 1)
    text = chain.table(paths)
    for variant in chain.MEASURED:
        assert f"| {variant} |" in text
    with pytest.raises(ValueError, match="other settings"):  # its files would be taken for these
        chain.seeds(model, photos, replace(settings, warm=True), Machine(batch=2), 1)
    kept = tmp_path / "direct-equal-pairs-0"
    direct = benchmark.load_method("direct", "cpu", str(kept))
    made, chains = direct.call(torch.rand(1, 3, 40, 34), 0)
    assert made.shape == (1, 3, 160, 136)
    assert all(c.final_image is not None and c.rough_image is None for c in chains[0])


def test_differences_are_the_firsts_photograph_by_photograph(tmp_path):
    rows = [
        {"variant": v, "source": "x", "file": f, "author": "x", "lpips": d, "psnr": 20, "nats": 5}
        for v, each in (("a", (0.1, 0.5, 0.3)), ("b", (0.2, 0.6, 0.4)))
        for f, d in zip("pqr", each, strict=True)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    text = chain.table([tmp_path / "rows.csv"])
    assert "a minus it" in text and "| a | 0.300 | 20.00 | 5.00 |  |" in text
    assert "| b | 0.400 | 20.00 | 5.00 | -0.100 [-0.100, -0.100] |" in text


def test_settings_that_do_not_go_together(tmp_path):
    for wrong in ({"warm": True, "variants": chain.VARIANTS}, {"hidden": 28}, {"variants": "x"}):
        with pytest.raises(ValueError):
            chain.Settings(None, tmp_path, **wrong)
    policy = chain.Settings(None, tmp_path, hidden=8, layers=1).policy(64, True)
    assert ChainPolicy(policy).config.hidden_size == 8


def test_the_eye_alone_sees_no_code():
    """Chains that differ in their codes alone look the same to it, and their places stay known."""
    model = RealSR.from_pretrained("nano", "cpu")
    data = photographs.Pairs(photographs.load("test")[:2], training=False)
    policy, items = model.policy, [data[0], data[1]]
    ids = sft.collate(policy.vocabulary, chain.DIRECT)(items)["ids"]
    hr = torch.stack([x["hr"] for x in items]) / 255
    true = sft.fill(policy, ids, model.tokenizer.encode_steps(hr))
    assert not torch.equal(true[0], ids[0])
    assert torch.equal(redraw.blank_codes(policy, true), redraw.blank_codes(policy, ids))
    assert torch.equal(policy.cells(redraw.blank_codes(policy, true)), policy.cells(true))


def test_a_warm_control_begins_with_the_policys_weights_and_leaves_them_alone(tmp_path):
    model = RealSR.from_pretrained("nano", "cpu")
    before = {k: v.clone() for k, v in model.policy.state_dict().items()}
    settings = chain.Settings(None, tmp_path, steps=1, lr=1e-6, warm=True)
    assert chain.train(model, "chain", settings, Machine(batch=2)) is model.policy
    control = chain.train(model, "eye alone, equal pairs", settings, Machine(batch=2))
    moved = [(v - before[k]).abs().max() for k, v in control.state_dict().items()]
    assert 0 < max(moved) < 1e-4
    assert all(torch.equal(v, before[k]) for k, v in model.policy.state_dict().items())


def test_a_chain_is_longer_than_a_direct_sequence():
    assert 1.2 < chain.length_ratio() < 1.6
