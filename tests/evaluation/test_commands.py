"""Every `realsr eval` leaf once, on one photograph, and the demo pictures."""

import pytest
from PIL import Image

from realsr_r1.cli import main
from realsr_r1.evaluation import demo


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        ("chains --severity light", "LPIPS under own texts: 0."),
        ("experts --experts nano", "nano: pairs in LPIPS order 0."),
        ("words --policies policy-cold policy-grpo", "| degradation, policy-grpo |"),
        ("lattice", "true codes: "),
        ("blind --methods chain bicubic -o {tmp}/pairs", "1 pairs in"),
        ("table --peers lanczos -o {tmp}/out", "| lanczos |"),
    ],
)
def test_a_leaf_says_what_it_found(leaf, said, tmp_path, capsys):
    n = 2 if leaf.startswith(("chains", "words")) else 1  # they ask for another photograph
    command = f"eval {leaf.format(tmp=tmp_path)} -n {n} --device cpu"
    assert main(command.split()) == 0
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CUT", 32)  # one tile a photo
    for name in ("sheet.png", "chain.gif"):
        assert main(["demo", "-o", str(tmp_path / name), "--device", "cpu"]) == 0
        with Image.open(tmp_path / name) as made:
            assert min(made.size) > 150
            assert getattr(made, "n_frames", 1) > 1 or name.endswith("png")
