"""`realsr course`."""

import pytest
from jupyterlab import labapp

from realsr_r1.cli import main
from realsr_r1.course import commands, notebooks


def test_the_lab_opens_at_the_first_lesson(monkeypatch):
    asked = []
    monkeypatch.setattr(labapp, "main", asked.extend)
    assert main(["course"]) == 0
    assert asked == [
        f"--ServerApp.root_dir={notebooks.NOTEBOOKS}",
        "--LabApp.default_url=/lab/tree/00_start_here.ipynb",
    ]
    assert (notebooks.NOTEBOOKS / commands.FIRST).exists()


def test_notebooks_are_chosen_by_a_part_of_their_names(monkeypatch):
    ran = []
    monkeypatch.setattr(notebooks, "run", ran.append)
    assert main(["course", "run"]) == 0
    assert main(["course", "run", "03", "07_scaling_up.ipynb"]) == 0
    every, some = ran
    assert every == notebooks.notebooks() and len(every) == 8
    assert [p.stem for p in some] == ["03_vlcot_sft", "07_scaling_up"]


@pytest.mark.parametrize("what", ["lab", "student", "run"])
def test_without_a_checkout_one_sentence_says_what_to_do(monkeypatch, capsys, what):
    monkeypatch.setattr(notebooks, "notebooks", list)
    assert main(["course", what]) == 2
    assert "no notebooks in" in capsys.readouterr().err
