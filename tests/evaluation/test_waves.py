"""Rows drawn one after the other and together."""

from realsr_r1.evaluation import waves
from realsr_r1.photographs import load
from realsr_r1.pipeline import RealSR


def test_every_lag_has_its_line_and_its_steps(monkeypatch):
    monkeypatch.setattr(waves, "SEVERITIES", ("medium",))
    model = RealSR.from_pretrained("nano", "cpu")
    rows = [
        line.strip("| ").split(" | ")
        for line in waves.report(model, load("val")[:2], draws=1).split("\n")
    ]
    assert [row[0] for row in rows[2:-1]] == [str(lag) for lag in waves.LAGS]
    assert [int(row[1]) for row in rows[2:-1]] == [336, 128, 78, 53]
    assert all(0 < float(x) < 1 for x in rows[2][2:]) and "[" in rows[3][2]
