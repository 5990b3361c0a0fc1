import csv
from dataclasses import replace

import pytest

from realsr_r1 import photographs
from realsr_r1.ablations import optimizer
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining.recipes import Machine


@pytest.mark.slow
def test_each_optimizer_gets_its_row(tmp_path):
    model = RealSR.from_pretrained("nano", "cpu")
    photos = photographs.load("val")[:2]
    for muon in (True, False):
        s = optimizer.Settings(None, tmp_path, muon=muon, steps=3)
        row = optimizer.run(model, photos, s, Machine("cpu", 1))
        assert row["steps"] == 3 and 4 < row["rough_image"] < 9
    with pytest.raises(ValueError, match="other settings"):
        optimizer.run(model, photos, replace(s, minutes=1.0), Machine("cpu", 1))
    with (tmp_path / "optimizer.csv").open(newline="", encoding="utf-8-sig") as f:
        assert [r["optimizer"] for r in csv.DictReader(f)] == ["muon-0.004-0", "adamw-0.004-0"]
