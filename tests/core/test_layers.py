"""The core is read from top to bottom: no module imports a later one, and none the apparatus."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "realsr_r1"
ORDER = (
    "version _torchvision common images stats degradation photographs perceptual tokenizer eye "
    "vlcot "
    "grammar policy decoding sampling sft experts rewards objective grpo pipeline"
).split()
TOP = {"__init__", "__main__", "cli"}  # the face and the command line may import anything


def imported(path: Path) -> set[str]:
    """The names right below `realsr_r1` that a file imports, at its head or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "realsr_r1":
                names |= {parts[1]} if parts[1:] else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("realsr_r1.")}
    return names


def test_every_core_module_has_its_place():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {*ORDER, *TOP}


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    later = imported(PACKAGE / f"{name}.py") - set(ORDER[: ORDER.index(name)]) - {"__version__"}
    assert not later, f"{name} imports {', '.join(sorted(later))}, which come after it"


@pytest.mark.parametrize("name", ORDER)
def test_functions_are_short(name):
    """At most 40 lines and six parameters: a frozen config takes the rest."""
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = [a.arg for a in given if a.arg not in ("self", "cls")]
            assert node.end_lineno - node.lineno < 40, f"{node.name} is long"
            assert len(parameters) <= 6, f"{node.name} takes {', '.join(parameters)}"
