import csv

import pytest
import torch

from realsr_r1.evaluation import calibration
from realsr_r1.first import experts, policy, tokenizer
from realsr_r1.first.restore import Models


@pytest.fixture(scope="module")
def models(tiny):
    vq, reader, lm = tiny
    return {"sft": Models(vq, reader, tokenizer.GuidedDecoder(width=16, blocks=1).eval(), lm)}


def test_drawn_are_the_policys_own_images_and_repeat(models, pairs):
    images, away = calibration.drawn(models["sft"], pairs, batch=8)
    again, _ = calibration.drawn(models["sft"], pairs, batch=8)
    assert images.shape == (12, 3, 128, 128) and torch.equal(images, again) and (away > 0).all()
    other = Models(
        models["sft"].tokenizer,
        models["sft"].reader,
        models["sft"].guided,
        policy.build(models["sft"].policy.nano, seed=5).eval(),
    )
    assert not torch.equal(calibration.drawn(other, pairs, batch=8)[0], images)


def test_experts_side_by_side(models, tmp_path, monkeypatch):
    found = calibration.calibrate(["nano", "piqe", "brisque"], models, tmp_path, n=2, chains=6)
    assert set(found) == {"nano", "piqe"}
    text = (tmp_path / "experts.md").read_text()
    assert (
        "chains of sft" in text
        and "brisque: skipped, files are missing" in text
        and "HUB/pyiqa" in text
    )
    with (tmp_path / "experts.csv").open() as f:
        rows = {r["expert"]: r for r in csv.DictReader(f)}
    nano = found["nano"]
    assert (
        float(rows["nano"]["pairs in order"])
        == nano["ordered"]
        > float(rows["piqe"]["pairs in order"])
    )
    assert float(rows["nano"]["chains of sft"]) == pytest.approx(
        experts.spearman(*nano["chains"]["sft"])
    )
    assert (tmp_path / "experts.webp").stat().st_size > 1000
    with pytest.raises(FileNotFoundError, match="brisque: skipped"):
        calibration.calibrate(["brisque"], models, tmp_path, n=2, chains=2)
    with pytest.raises(ValueError, match="no expert 'beauty'"):
        calibration.calibrate(["beauty"], models, tmp_path, n=2, chains=2)
