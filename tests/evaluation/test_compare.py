import csv
import json

import pytest
import torch

from realsr_r1.evaluation import policies as compare
from realsr_r1.first import experts, policy, scenes, tokenizer
from realsr_r1.first.restore import Models


@pytest.fixture(scope="module")
def models(tiny):
    vq, reader, lm = tiny
    guided = tokenizer.GuidedDecoder(width=16, blocks=1).eval()
    other = policy.build(lm.nano, seed=5).eval()
    return {"sft": Models(vq, reader, guided, lm), "grpo": Models(vq, reader, guided, other)}


def test_policies_side_by_side(models, tmp_path):
    found = compare.compare(models, tmp_path, lambda x: x.mean((1, 2, 3)), n=4, name="t")
    assert set(found) == {"sft", "grpo"} and all(
        len(v) == 4 for s in found.values() for v in s.values()
    )
    one = found["sft"]
    assert one["format"] == [1.0] * 4  # the grammar sees to it
    assert one["total reward"] == pytest.approx(
        [
            sum(one[k][i] for k in ("format", "degradation", "understanding", "generation"))
            for i in range(4)
        ]
    )
    assert all(0 <= v <= 1 for v in one["FSIM"]) and all(v > 0 for v in one["LPIPS"])
    text = (tmp_path / "t.md").read_text()
    assert "| LPIPS ↓ |" in text and "grpo - sft (paired)" in text
    assert json.loads((tmp_path / "t.json").read_text()) == found
    with (tmp_path / "t.csv").open() as f:
        rows = {(r["policy"], r["measure"]): float(r["mean"]) for r in csv.DictReader(f)}
    assert rows["grpo", "LPIPS"] == pytest.approx(sum(found["grpo"]["LPIPS"]) / 4)


def test_scenes_that_chose_a_policy_can_be_left_out(models, tmp_path, monkeypatch):
    seen, score = [], compare.score_policy
    monkeypatch.setattr(
        compare, "score_policy", lambda m, data, *rest: seen.append(data) or score(m, data, *rest)
    )
    compare.compare({"sft": models["sft"]}, tmp_path, lambda x: x.mean((1, 2, 3)), n=2, first=1)
    assert (
        torch.equal(seen[0].hr, scenes.cached_pairs(3, "test").hr[1:])
        and len(seen[0].labels) == len(seen[0].scenes) == 2
    )
    assert "2 test scenes (from number 1 on)" in (tmp_path / "grpo.md").read_text()


def test_paired_difference_of_a_policy_with_itself_is_zero(models):
    row = {"LPIPS": [0.2, 0.4, 0.3]}
    line = compare.table({"a": row, "b": {"LPIPS": [0.1, 0.3, 0.2]}}, "a")[-1]
    assert line.endswith("-0.100 [-0.100, -0.100] |")
    assert compare.table({"a": row, "b": row}, "a")[-1].endswith("0.000 [0.000, 0.000] |")


def test_fsim_against_hand_known_ends():
    x = torch.rand(2, 3, 64, 64)
    f = experts.create("fsim")
    assert torch.allclose(f(x, x).flatten(), torch.ones(2), atol=1e-4)
    assert (f(x, torch.rand(2, 3, 64, 64)) < 0.9).all()
