"""GRPO on first words from a short start, on a tiny scale."""

from realsr_r1 import photographs
from realsr_r1.ablations import words
from realsr_r1.evaluation.words import table
from realsr_r1.pipeline import RealSR


def test_a_start_a_run_and_its_control_are_measured_alike(tmp_path):
    model = RealSR.from_pretrained("nano", "cpu")
    settings = words.Settings(None, tmp_path, cold=2, steps=1)
    found = words.run(model, photographs.load("test")[:2], settings)
    assert list(found) == ["cold start", "GRPO", "more fine-tuning"]
    text = table(found)
    assert text.count("| its gain |") == 4
    assert "| understanding, more fine-tuning |" in text
    assert (tmp_path / "start-0" / "model.safetensors").exists()


def test_the_two_halves_share_no_photograph():
    photos = photographs.load("train")
    cold, rest = ({p.file for p in half} for half in words.halves(photos))
    assert not cold & rest and len(cold | rest) == len({p.file for p in photos})
