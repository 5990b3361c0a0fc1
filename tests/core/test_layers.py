"""The core is read from top to bottom: no module imports a later one, and none the apparatus."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "realsr_r1"
ORDER = (
    "version _torchvision common images stats degradation photographs perceptual tokenizer eye "
    "vlcot "
    "grammar policy decoding sampling sft rewards objective grpo pipeline"
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


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes a file of text."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name != "open":
        return name in ("read_text", "write_text")
    owner = ast.unparse(call.func.value)
    mode = [a.value for a in call.args[:1] if isinstance(a, ast.Constant)]
    other = owner in ("tarfile", "Image", "os") or len(mode) < len(call.args[:1])
    return not other and mode in ([], ["r"], ["w"], ["a"])


def test_text_files_name_their_encoding():
    """Else Python before 3.15 takes the system's, and that of Windows holds few signs."""
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and opens_text(call):
                named = any(k.arg == "encoding" for k in call.keywords)
                assert named, f"{path.name}, line {call.lineno}"


def test_every_core_module_has_its_place():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {*ORDER, *TOP}


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    later = imported(PACKAGE / f"{name}.py") - set(ORDER[: ORDER.index(name)]) - {"__version__"}
    assert not later, f"{name} imports {', '.join(sorted(later))}, which come after it"


def test_the_core_is_read_in_an_afternoon():
    """Without `decoding`, the policy's cache written out for speed, which a reader may skip."""
    names = {*ORDER, *TOP} - {"version", "_torchvision", "__main__", "decoding"}
    texts = [(PACKAGE / f"{n}.py").read_text(encoding="utf-8") for n in names]
    assert sum(len(text.splitlines()) for text in texts) <= 3_300


def functions(path: Path) -> list[tuple[str, int, list[str]]]:
    """Name, lines without the docstring, and parameters of a file's functions."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = [a.arg for a in given if a.arg not in ("self", "cls")]
            text = ast.get_docstring(node, clean=False)
            said = len(text.split("\n")) if text else 0
            out.append((node.name, node.end_lineno - node.lineno + 1 - said, parameters))
    return out


# The checks of exercises are lists of cases, as long as there are cases.
@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent.name != "checks"],
    ids=lambda p: p.relative_to(PACKAGE).as_posix(),
)
def test_functions_are_short(path):
    """At most 40 lines and seven parameters (six in the core): a frozen config takes the rest."""
    most = 6 if path.stem in ORDER and path.parent == PACKAGE else 7
    for name, lines, parameters in functions(path):
        assert lines <= 40, f"{name} is long"
        if (path.stem, name) != ("chameleon", "forward"):  # transformers' own signature
            assert len(parameters) <= most, f"{name} takes {', '.join(parameters)}"
