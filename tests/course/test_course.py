"""The course's machinery: editions, exercises with their checks, addresses, fingerprints, and clear
failures."""

import ast
import math
import subprocess
from collections.abc import Iterator

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from realsr_r1.cli import main
from realsr_r1.course import checks
from realsr_r1.course import notebooks as course

PATHS = course.notebooks()
EXERCISES = [(p, e) for p in PATHS for e in course.exercises(course.read(p))]
each_exercise = pytest.mark.parametrize(
    "path, exercise", EXERCISES, ids=[f"{p.stem[:2]}-{e.name}" for p, e in EXERCISES]
)


def notebook(*cells: tuple[str, str]):
    """A notebook of (kind, source) cells: "md", "code", or "exercise" for a code cell with that
    tag."""
    v4, made = nbformat.v4, []
    for kind, source in cells:
        made.append(v4.new_markdown_cell(source) if kind == "md" else v4.new_code_cell(source))
        if kind == "exercise":
            made[-1].metadata["tags"] = ["exercise"]
    return v4.new_notebook(cells=made)


LAB = notebook(
    ("md", "# Lab"),
    ("code", "print('hello')"),
    (
        "exercise",
        "SCALE = 2\n\n\ndef double(x: int) -> int:\n    '''Twice x.'''\n    raise "
        "NotImplementedError",
    ),
    ("code", "checks.double(double)"),
    (
        "md",
        "<details><summary>Solution</summary>\n\n```python\ndef double(x: int) -> int:\n    "
        "return SCALE * x\n```\n\n</details>",
    ),
    ("code", "print(double(2))"),
)


def definitions(nb, end: int) -> Iterator[ast.stmt]:
    """Statements that prepare a namespace without any work: imports, functions, classes and
    constants of the cells before `end`."""
    for cell in nb.cells[:end]:
        if (
            cell.cell_type != "code"
            or "exercise" in cell.metadata.get("tags", [])
            or "course.start(" in cell.source
        ):
            continue
        for node in ast.parse(cell.source).body:
            constant = isinstance(node, ast.Assign) and not any(
                isinstance(n, ast.Call) for n in ast.walk(node.value)
            )
            if constant or isinstance(
                node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
            ):
                yield node


def verdict(nb, exercise: course.Exercise, source: str) -> bool:
    """Run `source` in place of the exercise's cell, then its check; returns what the check says."""
    space = {
        "torch": torch,
        "math": math,
        "np": np,
        "numpy": np,
        "F": F,
        "device": torch.device("cpu"),
        "QUICK": True,
        "__name__": "lab",
    }
    for node in definitions(nb, exercise.at):
        try:
            exec(compile(ast.Module([node], []), "<notebook>", "exec"), space)
        except (NameError, AttributeError):
            # it needs something that only the whole notebook makes, and so no solution may rest on
            # it
            pass
    exec(compile(source, f"<{exercise.name}>", "exec"), space)
    check = ast.parse(exercise.check).body
    (call,) = [
        n
        for n in check
        if isinstance(n, ast.Expr) and ast.unparse(n).startswith(f"checks.{exercise.name}(")
    ]
    exec(compile(ast.Module([n for n in check if n is not call], []), "<check>", "exec"), space)
    return eval(compile(ast.Expression(call.value), "<check>", "eval"), space)


@pytest.mark.parametrize("path", PATHS, ids=[p.stem for p in PATHS])
def test_each_notebook_has_exercises(path):
    nb = course.read(path)
    found = course.exercises(nb)
    assert len(found) >= 3
    assert len({e.name for e in found}) == len(found)
    for e in found:
        task = nb.cells[e.at - 1].source
        assert "### Exercise " in task and "difficulty: " in task and "minutes" in task, (
            f"{e.name}: no task above the stub"
        )
        assert "<summary>Hint</summary>" in task, f"{e.name}: no hint"
        stub = course.function_in(e.stub)
        assert ast.get_docstring(stub), f"{e.name}: the stub has no docstring"
        assert stub.returns and all(a.annotation for a in stub.args.args), (
            f"{e.name}: the stub is not typed"
        )


@each_exercise
def test_student_edition_fails_until_solved(path, exercise, capsys):
    (cell,) = [
        c for c in course.edition(course.read(path), "student").cells if c.source == exercise.stub
    ]
    assert not verdict(course.read(path), exercise, cell.source)
    assert f"✗ {exercise.name}: not written yet" in capsys.readouterr().out


@each_exercise
def test_solutions_edition_passes(path, exercise, capsys):
    source = course.solved(exercise)
    assert any(c.source == source for c in course.edition(course.read(path), "solutions").cells)
    assert verdict(course.read(path), exercise, source), capsys.readouterr().out


@pytest.mark.parametrize("kind", ["student", "solutions"])
def test_editions_have_no_solution_block_and_no_outputs(tmp_path, kind, capsys):
    course.write_editions(kind, tmp_path)
    beside = ["GLOSSARY.md", "playground.ipynb"]
    names = [*(p.name for p in PATHS), *beside]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    for path in PATHS:
        nb = course.read(tmp_path / path.name)
        nbformat.validate(nb)
        text = "\n".join(c.source for c in nb.cells)
        assert "](../" not in text  # an edition may lie anywhere
        assert "<summary>Solution" not in text and "<summary>Hint</summary>" in text
        assert not any(c.get("outputs") for c in nb.cells)
        stubs = sum(
            "raise NotImplementedError" in c.source
            for c in nb.cells
            if "exercise" in c.metadata.get("tags", [])
        )
        assert stubs == (len(course.exercises(course.read(path))) if kind == "student" else 0)


def test_an_edition_leaves_the_notebook_alone():
    before = nbformat.writes(LAB)
    student, solutions = course.edition(LAB, "student"), course.edition(LAB, "solutions")
    assert nbformat.writes(LAB) == before
    assert [c.cell_type for c in student.cells] == ["markdown", "code", "code", "code", "code"]
    assert student.cells[2].source == LAB.cells[2].source
    assert (
        solutions.cells[2].source
        == "SCALE = 2\n\n\ndef double(x: int) -> int:\n    return SCALE * x"
    )


def test_an_exercise_without_solution_is_refused():
    with pytest.raises(ValueError, match="exercise double: its check or its solution"):
        course.exercises(
            notebook(
                *[
                    (("exercise" if c.metadata.get("tags") else c.cell_type), c.source)
                    for c in LAB.cells[:4]
                ]
            )
        )


def test_fingerprint_sees_code_but_neither_prose_nor_address():
    a = notebook(("md", "one"), ("code", "x = 'git+https://github.com/OWNER/realsr-r1'"))
    b = notebook(("md", "two"), ("code", "x = 'git+https://github.com/me/my-fork'"))
    c = notebook(("md", "one"), ("code", "x = 'git+https://github.com/OWNER/realsr-r1'  # changed"))
    assert course.fingerprint(a) == course.fingerprint(b) != course.fingerprint(c)


def test_address_moves_everywhere_also_after_a_kill(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/OWNER/realsr-r1"\n'
    )
    (tmp_path / "README.md").write_text(
        "https://github.com/OWNER/realsr-r1/issues https://github.com/OWNER/realsr-r1-old "
        "https://github.com/a/b"
    )
    badge = "https://colab.research.google.com/github/OWNER/realsr-r1/blob/main/notebooks/00.ipynb"
    course.write(
        notebook(("md", badge), ("code", "'git+https://github.com/OWNER/realsr-r1'")),
        tmp_path / "notebooks" / "00.ipynb",
    )
    real, done = course.write_text, []

    def killed(path, text):
        if done:
            raise KeyboardInterrupt
        done.append(real(path, text))

    monkeypatch.setattr(course, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        course.set_address("me/fork", tmp_path)
    monkeypatch.setattr(course, "write_text", real)
    assert len(course.set_address("me/fork", tmp_path)) == 2  # the rest
    assert course.repository(tmp_path) == "me/fork"
    nb = course.read(tmp_path / "notebooks" / "00.ipynb")
    assert (
        nb.cells[0].source == badge.replace("OWNER/realsr-r1", "me/fork")
        and nb.cells[1].source == "'git+https://github.com/me/fork'"
    )
    assert (tmp_path / "README.md").read_text(encoding="utf-8").split() == [
        "https://github.com/me/fork/issues",
        "https://github.com/OWNER/realsr-r1-old",
        "https://github.com/a/b",
    ]
    with pytest.raises(ValueError, match="not of the form"):
        course.set_address("https://github.com/me/fork", tmp_path)


def test_execute_saves_outputs_with_the_fingerprint_and_tidies_them(tmp_path, capsys):
    path = tmp_path / "00_tiny.ipynb"
    source = (
        "import ipywidgets\nfrom tqdm.auto import tqdm\nfor _ in tqdm(range(2)):\n    "
        "pass\nprint('done')\nipywidgets.IntSlider()"
    )
    course.write(notebook(("md", "# Tiny"), ("code", source)), path)
    course.execute([path])
    nb = course.read(path)
    assert nb.metadata["realsr_r1"]["code"] == course.fingerprint(nb)
    assert [o.get("text") or o["data"] for o in nb.cells[1].outputs] == [
        "done\n",
        {"text/plain": "(a widget: it appears, and moves, when the notebook runs)"},
    ]
    assert "00_tiny: " in capsys.readouterr().out


def test_a_failing_notebook_stops_the_course_with_one_sentence(tmp_path, capsys, monkeypatch):
    path = tmp_path / "00_broken.ipynb"
    course.write(notebook(("md", "# Broken"), ("code", "x = 1"), ("code", "y = x / 0")), path)
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(course, "notebooks", lambda: [path])
    assert main(["course", "run"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("[1/1] 00_broken … stopped")
    assert (
        err
        == 'error: 00_broken stopped in cell 3 ("y = x / 0"): ZeroDivisionError: division by zero\n'
    )
    assert path.read_text(encoding="utf-8") == before


def test_unknown_names_get_one_sentence(capsys):
    assert main(["course", "execute", "99_nothing"]) == 2
    assert main(["course", "address", "a/b", "c/d"]) == 2
    assert main(["course", "student", "03"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


@pytest.mark.parametrize("value, quick", [("1", True), ("0", False), (None, True)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_start_is_seeded_and_reads_quick(monkeypatch, capsys, device, value, quick):
    monkeypatch.setattr(course, "device_of", lambda _: torch.device(device))
    monkeypatch.delenv("QUICK", raising=False)
    if value:
        monkeypatch.setenv("QUICK", value)
    found, got = course.start(3)
    first = torch.rand(1)
    assert found.type == device and got is quick and "seed 3" in capsys.readouterr().out
    course.start(3)
    assert torch.equal(torch.rand(1), first)


def test_without_a_name_the_address_is_the_remotes(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init", "-q")
    with pytest.raises(ValueError, match="no remote on GitHub"):
        course.remote_address(tmp_path)
    git("remote", "add", "origin", "git@github.com:me/my-fork.git")
    assert course.remote_address(tmp_path) == "me/my-fork"
    git("remote", "set-url", "origin", "https://github.com/you/course")
    assert course.remote_address(tmp_path) == "you/course"


def test_a_foreign_not_implemented_error_is_not_taken_for_the_stub(capsys):
    def student(n: int, side: int) -> int:
        raise NotImplementedError("aten::frobnicate is not implemented for cpu")

    assert not checks.tokens.image_tokens(student)
    assert "NotImplementedError: aten::frobnicate" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, torch.tensor, np.array])
def test_an_answer_may_be_any_kind_of_number(kind):
    assert checks.number(kind(0.5), "a share") == 0.5


@pytest.mark.parametrize("answer", [None, True, "0.5", [0.5], torch.tensor([0.5, 0.5])])
def test_what_is_no_number_is_named(answer):
    with pytest.raises(checks.Mistake, match=r"return one number|returns nothing"):
        checks.number(answer, "a share")
