"""The course: what every notebook starts with, and how notebooks are run, saved, shared and
re-addressed (`realsr course`).

A saved notebook carries a fingerprint of the code that made its outputs, so that a test sees when
the two drift apart.
"""

import ast
import base64
import copy
import hashlib
import io
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from realsr_r1.common import atomic, device_of, write_text

ROOT = Path(__file__).parents[2]  # of a checkout; the commands below need one, `start` does not
NOTEBOOKS = ROOT / "notebooks"
SECONDS_A_CELL = 900  # no cell of the course comes near it, on any machine


def start(seed: int = 0) -> tuple[torch.device, bool]:
    """Seed everything, choose the device, and decide between the quick and the full form of a
    lesson.

    Returns (device, quick). A lesson is quick unless `QUICK=0` is in the environment.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  students may use it
    torch.manual_seed(seed)
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = device_of(None)
    quick = os.environ.get("QUICK", "1") != "0"
    print(
        f"device {device}, seed {seed}, "
        f"{'quick: training is shortened, no lesson is skipped' if quick else 'full length'}"
    )
    return device, quick


# Reading and writing notebooks. nbformat and nbclient are imported late: `start` must stay quick.


def notebooks(folder: Path = NOTEBOOKS) -> list[Path]:
    """The course's notebooks in order."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def read(path: Path):
    """A notebook as nbformat's version 4 object."""
    import nbformat

    return nbformat.read(path, as_version=4)


def write(nb, path: Path) -> None:
    """Write a notebook; the write is atomic, so that a kill never leaves half a file."""
    import nbformat

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        nbformat.write(nb, part)


def fingerprint(nb) -> str:
    """SHA-256 of all code cells' sources, in order. The address in the set-up cell does not count:
    forks change it."""
    sources = [
        re.sub(r"git\+https://github\.com/[\w.-]+/[\w.-]+", "ADDRESS", c.source)
        for c in nb.cells
        if c.cell_type == "code"
    ]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


# Executing.


class Stopped(ValueError):
    """A notebook that did not run through, with one sentence that says where and why."""


def _environment() -> dict[str, str]:
    """A kernel's: Python finds this checkout before any installed copy, and waiting threads sleep,
    for on a busy machine two that spin slow each other down a hundredfold."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONPATH": paths}


def run_through(nb, name: str):
    """Execute a notebook object in a fresh kernel and an empty folder; returns it, or raises
    `Stopped`."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            nb,
            timeout=SECONDS_A_CELL,
            startup_timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--log-level=40"],
        )
        at = [0]
        client.on_cell_start = lambda cell, cell_index: at.__setitem__(0, cell_index)
        try:
            client.execute(env=_environment())
        except CellExecutionError as e:
            why = f"{e.ename}: {e.evalue}".splitlines()[0]
        except CellTimeoutError:
            why = f"no end after {SECONDS_A_CELL} s"
        except DeadKernelError:
            why = (
                "the kernel died, most likely for want of memory: close other programs and run "
                "it again"
            )
        else:
            return nb
    first = next((line for line in nb.cells[at[0]].source.splitlines() if line.strip()), "")
    raise Stopped(f'{name} stopped in cell {at[0] + 1} ("{first.strip()[:60]}"): {why}')


def lighten(data: dict) -> None:
    """Figures of photographs make huge PNGs: those above 100 kB become JPEG of high quality where
    that is smaller."""
    raw = base64.b64decode(data["image/png"])
    if len(raw) > 100_000:
        file = io.BytesIO()
        Image.open(io.BytesIO(raw)).convert("RGB").save(
            file, "JPEG", quality=90, subsampling=0, optimize=True
        )
        if file.tell() < len(raw):
            del data["image/png"]
            data["image/jpeg"] = base64.b64encode(file.getvalue()).decode()


def tidy(nb) -> None:
    """Make outputs fit to be committed: no progress bars; for a widget, which lives only in a
    running notebook, its version for print or a note; light figures."""
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for out in cell.outputs:
            data = out.get("data", {})
            if "application/vnd.jupyter.widget-view+json" in data:
                if re.search(r"(Float|Int)Progress\(|\d+%\||\dit \[", data.get("text/plain", "")):
                    continue
                note = {"text/plain": "(a widget: it appears, and moves, when the notebook runs)"}
                printed = {k: v for k, v in data.items() if k == "text/markdown"}
                out["data"] = note | printed
            if "image/png" in data:
                lighten(data)
            kept.append(out)
        cell.outputs = kept
        for key in ("execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
    nb.metadata.pop("widgets", None)


def execute(paths: list[Path]) -> None:
    """Execute and save notebooks in place, with the fingerprint of their code; the first failure
    stops, saving nothing of it."""
    for path in paths:
        began, nb = time.time(), read(path)
        run_through(nb, path.stem)
        tidy(nb)
        nb.metadata["realsr_r1"] = {"code": fingerprint(nb)}
        write(nb, path)
        print(
            f"{path.stem}: {time.time() - began:.0f} s, {path.stat().st_size / 1e6:.2f} MB",
            flush=True,
        )
        noisy = [
            i + 1
            for i, c in enumerate(nb.cells)
            if any(o.get("name") == "stderr" for o in c.get("outputs", []))
        ]
        if noisy:
            print(
                f"  warnings in the outputs of cell {', '.join(map(str, noisy))}: silence their "
                f"cause, the tests refuse them"
            )


def run(paths: list[Path]) -> None:
    """Execute all notebooks in order, a line each; nothing in the checkout changes. Raises
    `Stopped` at the first failure."""
    os.environ.setdefault("QUICK", "1")
    began = time.time()
    for i, path in enumerate(paths):
        at = time.time()
        print(f"[{i + 1}/{len(paths)}] {path.stem} …", end=" ", flush=True)
        try:
            run_through(read(path), path.stem)
        except Stopped:
            print("stopped")
            raise
        print(f"{time.time() - at:.0f} s", flush=True)
    print(
        f"all {len(paths)} notebooks ran in {(time.time() - began) / 60:.1f} min; open them "
        f"with `realsr course lab`"
    )


# Exercises and editions.

SOLUTION = re.compile(r"<details>\s*<summary>\s*Solution\s*</summary>.*?</details>", re.DOTALL)


@dataclass
class Exercise:
    """One exercise: the function's name, its stub, check and solution, and the stub's place among
    the cells."""

    name: str
    at: int
    stub: str
    check: str
    solution: str


def function_in(source: str, name: str | None = None) -> ast.FunctionDef:
    """The last top-level function of a cell, or the one of that name. Raises ValueError where there
    is none."""
    found = [
        n
        for n in ast.parse(source).body
        if isinstance(n, ast.FunctionDef) and name in (None, n.name)
    ]
    if not found:
        raise ValueError(f"no function {name or ''} in the cell that begins: {source[:60]!r}")
    return found[-1]


def exercises(nb) -> list[Exercise]:
    """The exercises of a notebook: a code cell tagged `exercise`, then its check, then its
    collapsed solution."""
    found = []
    for at, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or "exercise" not in cell.metadata.get("tags", []):
            continue
        name, check, solution = function_in(cell.source).name, None, None
        for later in nb.cells[at + 1 :]:
            if later.cell_type == "code" and "exercise" in later.metadata.get("tags", []):
                break
            if later.cell_type == "code" and check is None:
                check = later.source
            block = SOLUTION.search(later.source) if later.cell_type == "markdown" else None
            if block:
                code = re.search(r"```python\n(.*?)```", block[0], re.DOTALL)
                solution = code[1].strip() if code else None
                break
        if check is None or f"checks.{name}(" not in check or solution is None:
            raise ValueError(f"exercise {name}: its check or its solution is not where it belongs")
        function_in(solution, name)
        found.append(Exercise(name, at, cell.source, check, solution))
    return found


def solved(exercise: Exercise) -> str:
    """The exercise's cell with the solution's function in place of the stub's; lines around it
    stay."""
    node, lines = function_in(exercise.stub), exercise.stub.splitlines()
    return "\n".join([*lines[: node.lineno - 1], exercise.solution, *lines[node.end_lineno :]])


def edition(nb, kind: str):
    """A copy of the notebook without solutions and outputs: for `student` the stubs stay, for
    `solutions` they are solved. It may lie anywhere, so what lies beside notebooks/ is linked to
    where it is published."""
    nb, published = copy.deepcopy(nb), f"](https://github.com/{repository()}/blob/main/"
    if kind == "solutions":
        for e in exercises(nb):
            nb.cells[e.at].source = solved(e)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = SOLUTION.sub("", cell.source).replace("](../", published).strip()
        elif cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nb.cells = [c for c in nb.cells if c.source.strip()]
    nb.metadata.pop("realsr_r1", None)
    nb.metadata.pop("widgets", None)
    return nb


def write_editions(kind: str, folder: Path | None = None) -> Path:
    """Write every notebook's edition of that kind, `student` or `solutions`; returns the folder."""
    folder = folder or ROOT / "editions" / kind
    count = 0
    for path in notebooks():
        nb = read(path)
        count += len(exercises(nb))
        write(edition(nb, kind), folder / path.name)
    write(edition(read(NOTEBOOKS / "playground.ipynb"), kind), folder / "playground.ipynb")
    shutil.copy(NOTEBOOKS / "GLOSSARY.md", folder)
    print(
        f"{len(notebooks())} notebooks, {count} exercises → "
        f"{folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder}"
    )
    return folder


# The address, which is set in one place: `Repository` in pyproject.toml.


def repository(root: Path = ROOT) -> str:
    """OWNER/REPO of this checkout. Raises ValueError if pyproject.toml names none."""
    pyproject = root / "pyproject.toml"
    urls = (
        tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
        if pyproject.exists()
        else {}
    )
    match = re.fullmatch(
        r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", urls.get("Repository", "")
    )
    if not match:
        raise ValueError(
            'pyproject.toml has no [project.urls] Repository = "https://github.com/OWNER/REPO": '
            "add it"
        )
    return match[1]


def remote_address(root: Path = ROOT) -> str:
    """OWNER/REPO of the checkout's `git remote`. Raises ValueError where it has none on GitHub."""
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$", found.stdout.strip())
    if not match:
        raise ValueError(
            "this checkout has no remote on GitHub: say where, make address REPO=OWNER/REPO"
        )
    return match[1]


def set_address(new: str, root: Path = ROOT) -> list[Path]:
    """Rewrite the repository's address in pyproject.toml, README.md and everything in notebooks/;
    returns the files changed."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        raise ValueError(f"{new!r} is not of the form OWNER/REPO")
    old = re.compile(rf"(github\.com/|/github/){re.escape(repository(root))}(?![\w-])")
    changed = []
    for path in [
        root / "README.md",
        *sorted((root / "notebooks").glob("*.ipynb")),
        *sorted((root / "notebooks").glob("*.md")),
        root / "pyproject.toml",  # last: it holds the address that is looked for
    ]:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if (fresh := old.sub(rf"\g<1>{new}", text)) != text:
            write_text(path, fresh)
            changed.append(path)
    return changed
