"""`realsr course`: the lessons, in JupyterLab, as a list, or run through."""

import argparse
import json
import os
import re
from pathlib import Path

from realsr_r1.files.options import leaf

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"  # of a checkout; a wheel has none
FIRST = "00_start_here.ipynb"


def lessons() -> list[tuple[Path, str, str]]:
    """Each notebook with its title and its time on two CPU cores, from its first cell. Raises
    FileNotFoundError where there are no notebooks."""
    found = []
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title = re.match(r"#\s*(?:\d+ · )?(.*)", text)[1]
        minutes = re.search(r"\|\s*((?:about |under )?\d+ minutes?)", text)
        found.append((path, title, minutes[1] if minutes else ""))
    if not found:
        raise FileNotFoundError(
            f"there are no notebooks in {NOTEBOOKS}: clone the repository and call "
            f"`pip install -e .` in it, or open the lessons in Colab by the links of its README"
        )
    return found


def course(a: argparse.Namespace) -> None:
    found = lessons()
    if a.what == "list":
        for path, title, minutes in found:
            print(f"{path.stem[:2]}  {title:<44}{minutes}".rstrip())
        return
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    if a.what == "lab":
        from jupyterlab.labapp import main

        options = f"--ServerApp.root_dir={NOTEBOOKS}", f"--LabApp.default_url=/lab/tree/{FIRST}"
        return main(options)
    from realsr_r1.course import notebooks

    try:
        notebooks.run([path for path, *_ in found])
    except notebooks.Stopped as e:
        raise RuntimeError(str(e)) from e


def register(sub) -> None:

    p = leaf(sub, "course", course, "the lessons: open them, list them, or run all of them")
    text = "lab: open JupyterLab at the first; list: titles and times; run: execute all in order"
    p.add_argument("what", nargs="?", choices=("lab", "list", "run"), default="lab", help=text)
