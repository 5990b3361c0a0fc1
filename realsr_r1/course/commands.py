"""`realsr course`: the lessons, opened, run through, saved, shared, re-addressed."""

import argparse
import os
from pathlib import Path

from realsr_r1.files.options import leaf

FIRST = "00_start_here.ipynb"
WHAT = {
    "lab": "open JupyterLab at the first lesson",
    "run": "execute all in order into a temporary folder",
    "execute": "execute and save with outputs",
    "student": "the edition without solutions, to editions/student",
    "solutions": "the edition with every exercise solved, to editions/solutions",
    "address": "point badges and install lines to a fork, by default this checkout's remote",
}


def chosen(names: list[str]) -> list[Path]:
    """The notebooks that have one of these parts in their names, without names all. Raises
    FileNotFoundError where there are no notebooks, ValueError where none is called so."""
    from realsr_r1.course import notebooks

    every = notebooks.notebooks()
    if not every:
        raise FileNotFoundError(
            f"there are no notebooks in {notebooks.NOTEBOOKS}: clone the repository and call "
            f"`pip install -e .` in it, or open the lessons in Colab by the links of its README"
        )
    parts = [name.removesuffix(".ipynb") for name in names]
    found = [p for p in every if not parts or any(x in p.stem for x in parts)]
    if not found:
        raise ValueError(f"no notebook is called {' or '.join(names)}: see notebooks/")
    return found


def course(a: argparse.Namespace) -> None:
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    from realsr_r1.course import notebooks

    most = {"run": len(a.names), "execute": len(a.names), "address": 1}.get(a.what, 0)
    if len(a.names) > most:
        takes = "one address, OWNER/REPO" if most else "no names"
        raise ValueError(f"realsr course {a.what} takes {takes}: leave out the rest")
    if a.what == "address":
        new = a.names[0] if a.names else notebooks.remote_address()
        print(f"{len(notebooks.set_address(new))} files now point to github.com/{new}")
        return
    paths = chosen(a.names)
    if a.what == "lab":
        from jupyterlab.labapp import main

        folder = f"--ServerApp.root_dir={notebooks.NOTEBOOKS}"
        main([folder, f"--LabApp.default_url=/lab/tree/{FIRST}"])
    elif a.what in ("student", "solutions"):
        notebooks.write_editions(a.what)
    else:
        {"run": notebooks.run, "execute": notebooks.execute}[a.what](paths)


def register(sub) -> None:
    p = leaf(sub, "course", course, "the lessons: open them, run them, save or share them")
    text = "; ".join(f"{k}: {v}" for k, v in WHAT.items())
    p.add_argument("what", nargs="?", choices=tuple(WHAT), default="lab", help=text)
    p.add_argument("names", nargs="*", help="lessons, by a part of their names; or OWNER/REPO")
