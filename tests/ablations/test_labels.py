"""The yardstick of the degradation labels, on a tiny scale."""

import csv

import pytest
import torch

from realsr_r1 import photographs
from realsr_r1.ablations import labels
from realsr_r1.degradation import LABELS
from realsr_r1.pretraining.loop import FitConfig
from realsr_r1.pretraining.recipes import Machine


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    data = photographs.Pairs(photographs.load("train"), seed=1)
    fit, out = FitConfig(minutes=10, steps=3, warmup=1), tmp_path_factory.mktemp("run")
    namer = labels.train(data, out, Machine(batch=4), fit)
    again = labels.train(data, out, Machine(batch=4), fit)  # after a measuring that was stopped
    assert all(map(torch.equal, namer.parameters(), again.parameters()))
    return labels.measure(namer, photographs.load("test")[:3])


def test_every_label_of_every_photo_is_right_or_wrong(rows):
    assert len(rows) == 9 and {r.severity for r in rows} == {"light", "medium", "heavy"}
    assert all(set(r.labels.values()) <= {0.0, 1.0} and list(r.labels) == [*LABELS] for r in rows)
    assert labels.report(rows, {}).count("[") == 5


def test_the_chain_beside_it_on_the_same_photos(rows, tmp_path):
    """A chain that names everything right, against this CNN."""
    table = tmp_path / "nano.csv"
    with table.open("w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, ["severity", "file", "subject", *LABELS])
        w.writeheader()
        for r in rows[:-1]:
            w.writerow({"severity": r.severity, "file": r.file} | dict.fromkeys(LABELS, 1.0))
    photos = photographs.load("test")[:3]
    text = labels.report(rows[:-1], labels.said_in(table, photos[:2]))
    right = sum(r.labels["blur"] for r in rows[:-1]) / len(rows[:-1])
    line = next(x for x in text.splitlines() if x.startswith("| blur |"))
    assert "| 1.000 [1.000, 1.000] |" in line and line.split("| ")[-1].startswith(
        f"{1 - right:.3f}"
    )
    with pytest.raises(ValueError, match=r"lacks .*: measure the same photographs"):
        labels.said_in(table, photos)
    with pytest.raises(ValueError, match="is no table that realsr eval table has written"):
        labels.said_in(table, photos[:2], ("subject", "background"))
    with pytest.raises(FileNotFoundError):
        labels.said_in(tmp_path / "nowhere.csv", photos)
