"""GRPO on first words from a short start, on a tiny scale."""

from dataclasses import replace

import pytest

from realsr_r1 import photographs
from realsr_r1.ablations import words
from realsr_r1.evaluation import words as evaluation
from realsr_r1.pipeline import RealSR


def test_a_start_a_run_and_its_control_are_measured_alike(tmp_path, monkeypatch):
    model = RealSR.from_pretrained("nano", "cpu")
    settings = words.Settings(None, tmp_path, cold=2, steps=1)
    found = words.run(model, photographs.load("test")[:2], settings)
    assert list(found) == ["cold start", "GRPO", "more fine-tuning"]
    text = evaluation.table(found)
    assert text.count("| its gain |") == 4 and evaluation.SHUFFLED in text
    assert "| understanding, more fine-tuning |" in text
    monkeypatch.setattr(
        words, "fine_tune", lambda *_: pytest.fail("again")
    )  # nothing is trained twice
    monkeypatch.setattr(words.grpo, "train_grpo", lambda *_: pytest.fail("again"))
    assert list(words.run(model, photographs.load("test")[:2], settings)) == list(found)
    with pytest.raises(ValueError, match="other settings"):
        words.run(model, [], replace(settings, cold=3))
    other = RealSR(model.tokenizer, model.policy, "another model")
    with pytest.raises(ValueError, match="other settings"):
        words.run(other, [], settings)
    (tmp_path / "none").mkdir()
    missing = replace(settings, photographs=str(tmp_path / "none"), out=tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="none of the annotated"):
        words.run(model, [], missing)
    assert not missing.out.exists()  # what is missing is told before a place is claimed


def test_one_photograph_has_no_other_ones_truth():
    policy = RealSR.from_pretrained("nano", "cpu").policy
    with pytest.raises(ValueError, match="take two or more"):
        evaluation.measure(policy, photographs.load("test")[:1])


def test_who_says_the_truth_earns_it_from_his_own_photo_alone():
    """The control: a list for everybody would earn the same from both."""
    data = photographs.Pairs(photographs.load("test")[:6], training=False)
    items = [data[i] for i in range(6)]
    true = [
        f"<degradation> {x['degradation']} </degradation> "
        f"<rough_understand> {' '.join(x['tags'])} </rough_understand>"
        for x in items
    ]
    own, other = (
        evaluation._scored(true, some, "greedy") for some in (items, items[3:] + items[:3])
    )
    for name in evaluation.NAMES:
        assert own["greedy", name].mean() == 1 > other["greedy", name].mean()


def test_the_two_halves_share_no_photograph():
    photos = photographs.load("train")
    cold, rest = ({p.file for p in half} for half in words.halves(photos))
    assert not cold & rest and len(cold | rest) == len({p.file for p in photos})
