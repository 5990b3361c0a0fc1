import csv
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "realsr_r1" / "assets"


def pins() -> dict[str, str]:
    return dict(
        re.findall(
            r"^\s+- ([A-Za-z0-9_.-]+)==(\S+)$",
            (ROOT / "environment.yml").read_text(encoding="utf-8"),
            re.M,
        )
    )


def test_every_requirement_is_pinned_inside_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [
        Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["dev"]
    ]
    assert {r.name for r in requirements} == set(pins())
    for r in requirements:
        assert r.specifier.contains(pins()[r.name]), (
            f"{r.name}: pin {pins()[r.name]} is outside {r.specifier}"
        )


def test_torchvision_imports_beside_this_torch():
    code = (
        "import realsr_r1, torchvision; from transformers import Qwen3ForCausalLM; "
        "print(torchvision.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_asset_is_credited_and_every_credit_is_shipped():
    with (ASSETS / "CREDITS.csv").open(encoding="utf-8-sig") as f:
        rows = list(csv.DictReader(f))
    listed = [r["file"] for r in rows]
    shipped = {
        p.relative_to(ASSETS).as_posix()
        for p in ASSETS.rglob("*")
        if p.suffix in (".webp", ".safetensors", ".mat")
        or p.name in ("annotations.csv", "words.json")
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == shipped
    assert all(r["licence"] and r["author"] and r["source"] for r in rows)


def test_assets_stay_light():
    sizes = [p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()]
    assert max(sizes) < 16e6 and sum(sizes) < 45e6
