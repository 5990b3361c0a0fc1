"""Every notebook runs, and what is committed is what its code makes: light, quiet, and from no
particular machine."""

import ast
import re

import nbformat
import pytest

from realsr_r1.course import notebooks as course

PATHS = course.notebooks()
NAMES = [p.stem for p in PATHS]
LONGEST_CELL = 25  # lines
LARGEST_FILE = 1.5e6  # bytes
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])(/(root|home|work|tmp|usr|opt|Users|private|var)/[\w.~-]|[A-Z]:\\Users)"
)
each = pytest.mark.parametrize("path", PATHS, ids=NAMES)


@pytest.fixture(scope="module")
def read():
    known = {p: course.read(p) for p in PATHS}
    return known.__getitem__


def code(nb) -> list:
    return [c for c in nb.cells if c.cell_type == "code"]


def texts(cell) -> list[str]:
    """All that a cell's outputs say in text, whatever its kind."""
    said = []
    for out in cell.outputs:
        said += [out.get("text", ""), *out.get("traceback", [])]
        said += [
            v
            for k, v in out.get("data", {}).items()
            if not k.startswith("image/p") and not k.startswith("image/j") and isinstance(v, str)
        ]
    return said


def speaks(source: str) -> bool:
    """True if the cell surely shows something: it prints, shows or displays, or its last line is a
    value."""
    body = ast.parse(source).body
    calls = [n.value for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    names = {ast.unparse(c.func) for c in calls}
    return bool(names & {"print", "display", "plt.show"}) or any(
        n.startswith("checks.") for n in names
    )


def test_there_are_notebooks():
    assert "00_start_here" in NAMES


@pytest.mark.parametrize(
    "path", [*PATHS, course.NOTEBOOKS / "playground.ipynb"], ids=lambda p: p.stem
)
def test_it_runs(path, monkeypatch):
    monkeypatch.setenv("QUICK", "1")
    nb = course.run_through(course.read(path), path.stem)
    assert all(c.execution_count for c in code(nb) if c.source.strip())


@each
def test_code_and_outputs_belong_together(path, read):
    nb = read(path)
    stored = nb.metadata.get("realsr_r1", {}).get("code")
    assert stored == course.fingerprint(nb), (
        f"the code of {path.stem} changed after its outputs were made: "
        f"realsr course execute {path.stem}"
    )


@each
def test_outputs_are_complete_and_quiet(path, read):
    for i, cell in enumerate(code(read(path))):
        where = f"{path.stem}, code cell {i + 1}: {cell.source[:60]!r}"
        assert cell.execution_count, f"{where} was not run"
        assert not speaks(cell.source) or cell.outputs, f"{where} should have an output"
        for out in cell.outputs:
            assert out.output_type != "error", f"{where} ended in an error"
            assert out.get("name") != "stderr", (
                f"{where} wrote warnings: {out.get('text', '')[:200]}"
            )


@each
def test_no_path_of_a_machine(path, read):
    nb = read(path)
    for cell in nb.cells:
        for text in [cell.source, *(texts(cell) if cell.cell_type == "code" else [])]:
            assert not (m := MACHINE_PATH.search(text)), (
                f"{path.stem} names {text[max(0, m.start() - 20) : m.end() + 40]!r}"
            )


@each
def test_size_and_form(path, read):
    nb = read(path)
    assert path.stat().st_size <= LARGEST_FILE
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name == "python3"
    long = [
        (len(c.source.splitlines()), c.source[:60])
        for c in code(nb)
        if len(c.source.splitlines()) > LONGEST_CELL
    ]
    assert not long, f"{path.stem}: cells of more than {LONGEST_CELL} lines: {long}"


@each
def test_opening_and_set_up(path, read):
    nb, repository = read(path), course.repository()
    first, set_up = nb.cells[0], nb.cells[1]
    badge = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
    assert first.cell_type == "markdown" and first.source.startswith("# "), (
        f"{path.stem} does not begin with its title"
    )
    assert f"]({badge})" in first.source, f"{path.stem}: the badge does not lead to {badge}"
    assert "T4" in first.source and "memory" in first.source.lower()
    expected = SET_UP.replace("ADDRESS", f"git+https://github.com/{repository}")
    assert set_up.source.strip() == expected.strip(), (
        f"{path.stem}: the second cell is not the common set-up cell"
    )
    assert sum("course.start(" in c.source for c in code(nb)) == 1


@each
def test_addresses_agree(path, read):
    found = set()
    for cell in read(path).cells:
        found |= set(re.findall(r"git\+https://github\.com/([\w.-]+/[\w.-]+)", cell.source))
        found |= set(
            re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)", cell.source)
        )
    assert found == {course.repository()}


@each
def test_links_between_notebooks_lead_somewhere(path, read):
    """To a notebook of the course, by its number and name."""
    linked = {
        n
        for c in read(path).cells
        if c.cell_type == "markdown"
        for n in re.findall(r"\]\((\w+)\.ipynb\)", c.source)
    }
    assert linked <= COURSE


COURSE = {
    "00_start_here",
    "01_degradation_synthesis",
    "02_images_as_tokens",
    "03_vlcot_sft",
    "04_reward_design",
    "05_vlcot_grpo",
    "06_evaluation",
    "07_scaling_up",
}
SET_UP = """\
# Set-up: in Colab this installs the package, locally it finds it.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("realsr_r1") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "ADDRESS"], check=True)
from realsr_r1.course import notebooks as course

device, QUICK = course.start(seed=0)
"""
