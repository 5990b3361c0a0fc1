import csv
import math
import re

import peer_degradation
import pytest
import torch
from bench import main
from PIL import Image
from record import Record, exponent, side_by_side


def test_exponent_of_a_known_power():
    k, c = exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert k == pytest.approx(1.5) and c == pytest.approx(3)
    # One point off by a factor e in the middle of three changes the scale but not the slope.
    k, c = exponent([1, math.e, math.e**2], [1, math.e**2, math.e**2])
    assert k == pytest.approx(1) and c == pytest.approx(math.exp(1 / 3))
    with pytest.raises(ValueError, match="at least two sizes"):
        exponent([4, 4], [1, 2])


def test_rows_survive_a_stop_and_the_newest_counts(tmp_path):
    first = Record(tmp_path, "restore")
    first.row("a photo", "9 s", "restore", 64, 9)
    first.row("a larger photo", "36 s", "restore", 256, 36)
    again = Record(tmp_path, "restore")
    again.row("a photo", "3 s", "restore", 64, 3)
    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert (
        "| a photo | 3 s |" in table and "9 s" not in table and "| a larger photo | 36 s |" in table
    )
    assert Record(tmp_path).points("restore") == ([64.0, 256.0], [3.0, 36.0])
    with first.path.open(newline="", encoding="utf-8-sig") as f:
        assert [r["result"] for r in csv.DictReader(f) if r["result"]] == ["9 s", "36 s", "3 s"]


def test_the_figure_has_the_fitted_exponents(tmp_path):
    record = Record(tmp_path, "growth")
    assert record.write_figure() == {}
    for x in (1, 2, 4):
        record.row(f"a group of {x}", "", "group", x, 5 * x**0.5)
    record.row("one point only", "", "restore", 100, 1)
    assert record.write_figure() == {"group": pytest.approx(0.5, abs=1e-4)}
    assert Image.open(tmp_path / "bench.webp").width > 200
    record.row("last", "")
    assert "bench.webp" in (tmp_path / "bench.md").read_text(encoding="utf-8")


def test_contestants_take_turns_and_warm_up():
    calls = []
    seconds = side_by_side(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2
    )
    assert calls == ["a", "b"] * 3 and set(seconds) == {"a", "b"}


def test_real_esrgans_own_degradation():
    run = peer_degradation.load()
    if run is None:
        pytest.skip(f"Real-ESRGAN's degradation is {peer_degradation.INSTALL}")
    hr, cuda = (
        torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0)),
        torch.Tensor.cuda,
    )
    lr = run(hr)
    assert lr.shape == (2, 3, 16, 16) and 0 <= lr.min() and lr.max() <= 1
    assert lr.std() < hr.std()  # noise in, and most of it blurred away
    assert torch.Tensor.cuda is cuda


def test_the_command_refuses_what_would_mislead(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "choose from degradation, sampling" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--small"])
    assert "folder of its own" in capsys.readouterr().err


def test_a_section_by_itself_without_the_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peer_degradation, "load", lambda: None)
    main(["degradation", "--small", "--out", str(tmp_path)])
    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "ms each" in table and "not installed" in table
    assert "sampled tokens" not in table


def test_rollouts_and_a_step_are_timed_part_by_part(tmp_path):
    main(["rollouts", "grpo", "growth", "--small", "--out", str(tmp_path)])
    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "2 groups of 2, the first words" in table and "exponent: sample a group" in table
    pattern = r"sampling (\d+)%, rewards (\d+)%, forward, backward and rest (\d+)%"
    shares = [int(x) for x in re.search(pattern, table).groups()]
    assert 99 <= sum(shares) <= 101 and shares[0] > 0  # rounded
    assert (tmp_path / "bench.webp").stat().st_size > 1000
