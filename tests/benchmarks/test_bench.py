import csv
import math
import re

import peer_degradation
import peer_sampling
import pytest
import torch
from bench import main
from PIL import Image
from record import Peak, Record, exponent, side_by_side

from realsr_r1.first import policy
from realsr_r1.first.policy import Sampling
from realsr_r1.first.vlcot import END, ROW, START, LayoutGrammar


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
    with first.path.open("a") as f:
        f.write("restore,half a r")  # a kill in the middle of a line
    again = Record(tmp_path, "restore")
    again.row("a photo", "3 s", "restore", 64, 3)
    table = (tmp_path / "bench.md").read_text()
    assert (
        "| a photo | 3 s |" in table
        and "9 s" not in table
        and "| a larger photo | 36 s |" in table
        and "half" not in table
    )
    assert Record(tmp_path).points("restore") == ([64.0, 256.0], [3.0, 36.0])
    with first.path.open(newline="") as f:
        assert [r["result"] for r in csv.DictReader(f) if r["result"]] == ["9 s", "36 s", "3 s"]


def test_the_figure_has_the_fitted_exponents(tmp_path):
    record = Record(tmp_path, "growth")
    assert record.write_figure() == {}
    for x in (1, 2, 4):
        record.row(f"a group of {x}", "", "group", x, 5 * x**0.5)
    record.row("one point only", "", "chain", 100, 1)
    assert record.write_figure() == {"group": pytest.approx(0.5, abs=1e-4)}
    assert Image.open(tmp_path / "bench.webp").width > 200
    record.row("last", "")
    assert "bench.webp" in (tmp_path / "bench.md").read_text()


def test_contestants_take_turns_and_warm_up():
    calls = []
    seconds = side_by_side(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2
    )
    assert calls == ["a", "b"] * 3 and set(seconds) == {"a", "b"}


def test_peak_memory_sees_what_was_freed():
    with Peak() as small:
        pass
    with Peak() as large:
        x = torch.ones(2**26)  # 256 MiB
        del x
    assert large.gib > small.gib + 0.2 or not large.exact


def test_the_row_by_row_layout_agrees_with_the_grammar(tiny):
    model = tiny[2]
    v, grammar = model.vocabulary, LayoutGrammar(tiny[2].vocabulary, model.nano.sizes)
    prompts = v.prompts(torch.arange(8).view(2, 2, 2))
    ids = policy.sample(
        model, prompts, Sampling.rollout(), torch.Generator().manual_seed(0), grammar=grammar
    ).ids
    layout, state, checked = peer_sampling.PerRowLayout(v), grammar.start(2), 0
    inside = (
        grammar.is_image | (grammar.only_word == v.ids[ROW]) | (grammar.only_word == v.ids[END])
    )
    for i in range(ids.shape[1]):
        scores = layout(torch.cat([prompts, ids[:, :i]], 1), torch.zeros(2, len(v)))
        for row in range(2):
            if inside[state[row]]:
                assert torch.equal(torch.isfinite(scores[row]), grammar.allowed(state)[row]), (
                    f"word {i}"
                )
                checked += 1
            else:
                assert torch.equal(scores[row], torch.zeros(len(v)))
        state = grammar.step(state, ids[:, i])
    assert checked == 2 * sum(n * (n + 1) + 1 for n in model.nano.sizes)


def test_generate_obeys_the_layout_and_leaves_global_randomness_alone(tiny):
    model = tiny[2]
    v = model.vocabulary
    opened = v.ids[START], v.ids["<n2>"], v.ids["<n3>"]
    prompts = torch.cat(
        [v.prompts(torch.zeros(2, 2, 2, dtype=torch.long)), torch.tensor([opened, opened])], 1
    )
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    out = peer_sampling.generate(model, prompts, 9, peer_sampling.PerRowLayout(v))
    assert torch.equal(torch.rand(1), expected)
    code = lambda w: v.first_code <= w < v.first_code + v.codes  # noqa: E731
    for row in out.tolist():
        assert [code(w) or w for w in row] == [
            True,
            True,
            True,
            v.ids[ROW],
            True,
            True,
            True,
            v.ids[ROW],
            v.ids[END],
        ]
    free = peer_sampling.generate(model, prompts, 9)
    assert not all(
        code(w) for w in free[0].tolist()[:3]
    )  # random weights would hardly choose codes alone


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
    assert "choose from degradation, data, sampling" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--small"])
    assert "folder of its own" in capsys.readouterr().err


def test_a_section_by_itself_without_the_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peer_degradation, "load", lambda: None)
    main(["degradation", "--small", "--out", str(tmp_path)])
    table = (tmp_path / "bench.md").read_text()
    assert "ms an image" in table and "not installed" in table
    assert "scenes" not in table


def test_rollouts_and_a_step_are_timed_part_by_part(tmp_path):
    main(["rollouts", "grpo", "growth", "--small", "--out", str(tmp_path)])
    table = (tmp_path / "bench.md").read_text()
    assert (
        "2 groups of 2, the first 24 words" in table
        and "4 chains of 32 words" in table
        and "exponent: sample a group" in table
    )
    shares = [
        int(x)
        for x in re.search(
            r"sampling (\d+)%, forward and backward (\d+)%, rewards (\d+)%, other (\d+)%", table
        ).groups()
    ]
    assert 98 <= sum(shares) <= 102 and min(shares[:2]) > 0  # rounded
    assert (tmp_path / "bench.webp").stat().st_size > 1000
