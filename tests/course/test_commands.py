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


def test_what_is_asked_for_is_done(monkeypatch, capsys):
    did = []
    monkeypatch.setattr(notebooks, "execute", lambda paths: did.append([p.stem for p in paths]))
    monkeypatch.setattr(notebooks, "write_editions", did.append)
    monkeypatch.setattr(notebooks, "set_address", lambda new: did.append(new) or ["README.md"])
    monkeypatch.setattr(notebooks, "remote_address", lambda: "its/remote")
    for words in ("execute 05", "student", "solutions", "address me/fork", "address"):
        assert main(["course", *words.split()]) == 0
    assert did == [["05_vlcot_grpo"], "student", "solutions", "me/fork", "its/remote"]
    assert "1 files now point to github.com/its/remote" in capsys.readouterr().out


def test_a_stopped_lesson_keeps_its_place(monkeypatch, capsys):
    """Also where its error is one that the command line has a sentence of its own for."""

    def run(paths):
        raise notebooks.Stopped("03_x stopped in cell 2: OutOfMemoryError: CUDA out of memory")

    monkeypatch.setattr(notebooks, "run", run)
    assert main(["course", "run"]) == 2
    assert "03_x stopped in cell 2" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["lab", "student", "run"])
def test_without_a_checkout_one_sentence_says_what_to_do(monkeypatch, capsys, what):
    monkeypatch.setattr(notebooks, "notebooks", list)
    assert main(["course", what]) == 2
    assert "no notebooks in" in capsys.readouterr().err
