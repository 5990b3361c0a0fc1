"""`realsr course`."""

import argparse
import json

import pytest

from realsr_r1.course import commands


def course(*options: str) -> None:
    p = argparse.ArgumentParser()
    commands.register(p.add_subparsers())
    a = p.parse_args(["course", *options])
    a.run(a)


def test_the_list_has_every_lesson_with_its_time(capsys):
    course("list")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(commands.NOTEBOOKS.glob("0*.ipynb")))
    assert lines[0].startswith("00  Start here  ")
    assert all(line.endswith(("minute", "minutes")) for line in lines)


def test_the_lab_opens_at_the_first_lesson(monkeypatch):
    from jupyterlab import labapp

    asked = []
    monkeypatch.setattr(labapp, "main", asked.extend)
    course()
    assert asked == [
        f"--ServerApp.root_dir={commands.NOTEBOOKS}",
        "--LabApp.default_url=/lab/tree/00_start_here.ipynb",
    ]
    assert (commands.NOTEBOOKS / commands.FIRST).exists()


def test_run_tells_where_a_notebook_stopped(monkeypatch, tmp_path):
    from realsr_r1.course import notebooks

    cell = {"cell_type": "markdown", "source": ["# 03 · A title\n"]}
    (tmp_path / "03_x.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    monkeypatch.setattr(commands, "NOTEBOOKS", tmp_path)

    def run(paths):
        raise notebooks.Stopped(f"{paths[0].stem} stopped in cell 2")

    monkeypatch.setattr(notebooks, "run", run)
    with pytest.raises(RuntimeError, match="03_x stopped in cell 2"):
        course("run")


@pytest.mark.parametrize("what", ["lab", "list", "run"])
def test_without_a_checkout_one_sentence_says_what_to_do(monkeypatch, tmp_path, what):
    monkeypatch.setattr(commands, "NOTEBOOKS", tmp_path / "notebooks")
    with pytest.raises(FileNotFoundError, match=r"no notebooks in .*: clone the repository"):
        course(what)
