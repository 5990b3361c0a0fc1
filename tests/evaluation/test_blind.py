import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from realsr_r1.cli import main
from realsr_r1.evaluation import blind
from realsr_r1.photographs import load
from realsr_r1.pipeline import RealSR


def gray(level: float):
    return lambda lr: torch.full((len(lr), 3, 128, 128), level)


@pytest.fixture
def comparison(tmp_path):
    out = tmp_path / "pairs"
    blind.prepare(load("val")[:8], {"bright": gray(0.9), "dark": gray(0.1)}, out, seed=3)
    return out


def bright_side(out, i: int) -> str:
    """What a person who likes bright pictures would choose, from the picture alone."""
    from PIL import Image

    picture = Image.open(out / f"{i:03d}.png")
    return "left" if picture.getpixel((5, 5))[0] > 128 else "right"


def test_the_order_is_shuffled_and_the_key_knows_it(comparison):
    sides = [bright_side(comparison, i) for i in range(8)]
    assert set(sides) == {"left", "right"}
    sealed = (comparison / "key.sealed").read_bytes()
    assert b"bright" not in sealed
    key = json.loads(base64.b64decode(sealed))["pairs"]
    assert [k[s] for k, s in zip(key, sides, strict=True)] == ["bright"] * 8
    assert {k["severity"] for k in key} == {"light", "medium", "heavy"}


def test_the_report_counts_what_was_chosen(comparison, capsys):
    for i in range(6):
        blind.answer(comparison, i, bright_side(comparison, i))
    blind.answer(comparison, 6, "same")
    other = {"left": "right", "right": "left"}[bright_side(comparison, 7)]
    blind.answer(comparison, 7, "same")
    blind.answer(comparison, 7, other)  # changed its mind: the last answer counts
    found = blind.report(comparison)
    assert found.share.mean == pytest.approx(6.5 / 8) and found.answers == 8
    assert found.share.low < found.share.mean <= found.share.high
    assert main(["eval", "blind", "--report", "--out", str(comparison)]) == 0
    assert "bright preferred to dark: 0.812" in capsys.readouterr().out


def test_the_page_goes_through_the_pairs(comparison):
    page = blind.page(comparison)
    text, picture, buttons = page.children
    assert "8 of 8 are open" in text.value and picture.value[:4] == b"\x89PNG"
    for i in range(8):
        {b.description: b for b in buttons.children}[bright_side(comparison, i)].click()
    assert text.value.startswith("bright preferred to dark: 1.000")
    assert all(b.disabled for b in buttons.children)
    again = blind.page(comparison)  # a page that is opened again goes on where it was
    assert again.children[0].value.startswith("bright preferred")


def test_an_answer_is_for_the_pair_that_is_shown(comparison):
    one, other = blind.page(comparison), blind.page(comparison)  # two people at pair 0
    for page, side in ((one, 0), (other, 2)):
        page.children[2].children[side].click()
    assert blind.read_answers(comparison) == {0: "right"}
    assert "7 of 8 are open" in other.children[0].value


def test_no_answer_is_lost_when_several_people_choose(comparison):
    with ThreadPoolExecutor(8) as people:
        list(people.map(lambda i: blind.answer(comparison, i % 8, "same"), range(80)))
    rows = (comparison / "answers.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "pair,choice" and len(rows) == 81
    (comparison / "answers.csv").unlink()  # a comparison of an older version
    blind.answer(comparison, 3, "left")
    assert blind.read_answers(comparison) == {3: "left"}


def test_first_ending_and_cold_start_are_methods_and_leave_the_model_alone():
    model = RealSR.from_pretrained("nano", "cpu")
    lr = next(blind.damaged(load("val")[:1])).lr[None]
    chain, first = (blind.method(name, model)(lr) for name in ("chain", "first ending"))
    drawn = model.sample(lr, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(chain, model.finish(drawn.chains, lr))
    torch.testing.assert_close(first, model.finish(drawn.chains, lr, clean=False))
    assert (chain - first).abs().mean() > 0.003
    start = RealSR.from_pretrained("nano", "cpu", "policy-sft")
    drawn = start.sample(lr, generator=torch.Generator().manual_seed(0))
    before = blind.method("cold start", model)(lr)
    torch.testing.assert_close(before, start.finish(drawn.chains, lr))
    assert not torch.equal(before, chain)


def test_pairs_have_noise_of_their_own_and_both_methods_the_same():
    """Else all pairs of a comparison would share their luck."""
    model, lr = RealSR.from_pretrained("nano", "cpu"), torch.full((1, 3, 32, 32), 0.5)
    call, again = (blind.method("chain", model, 5) for _ in range(2))
    first, second = call(lr), call(lr)
    assert not torch.equal(first, second)
    assert torch.equal(first, again(lr)) and torch.equal(second, again(lr))


def test_a_comparison_that_was_stopped_can_be_answered(tmp_path):
    def stop(lr):
        if len([*tmp_path.glob("pairs/*.png")]) == 1:
            raise KeyboardInterrupt
        return gray(1)(lr)

    with pytest.raises(KeyboardInterrupt):
        blind.prepare(load("val")[:2], {"a": gray(0), "b": stop}, tmp_path / "pairs")
    blind.answer(tmp_path / "pairs", 0, "same")
    assert "1 of 1 pairs" in str(blind.report(tmp_path / "pairs"))


def test_errors_are_one_sentence(comparison, tmp_path):
    photos = load("val")[:1]
    with pytest.raises(ValueError, match="already holds a comparison"):
        blind.prepare(photos, {"a": gray(0), "b": gray(1)}, comparison)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "000.png").touch()  # an earlier one was stopped
    with pytest.raises(ValueError, match="or part of one"):
        blind.prepare(photos, {"a": gray(0), "b": gray(1)}, tmp_path / "half")
    with pytest.raises(ValueError, match="two methods, got 1"):
        blind.prepare(photos, {"a": gray(0)}, tmp_path / "x")
    with pytest.raises(ValueError, match="holds no answers yet"):
        blind.report(comparison)
    with pytest.raises(ValueError, match="holds no comparison"):
        blind.report(tmp_path)
    with pytest.raises(ValueError, match="left, right or same"):
        blind.answer(comparison, 0, "both")
    for row in ("8,left", "0,Left", "none,left", "0"):
        (comparison / "answers.csv").write_text(f"pair,choice\n{row}\n")
        with pytest.raises(ValueError, match="that is no answer: remove it"):
            blind.report(comparison)
    with pytest.raises(ValueError, match="no method 'magic'"):
        blind.method("magic", None)


def test_squares_of_real_photos_take_turns(tmp_path):
    enlarge = {"large": lambda lr: torch.nn.functional.interpolate(lr, scale_factor=4)}
    methods = enlarge | {"dark": lambda lr: torch.zeros(1, 3, 256, 256)}
    assert blind.prepare(blind.real(9), methods, tmp_path / "pairs") == 9
    sealed = (tmp_path / "pairs" / "key.sealed").read_bytes()
    key = json.loads(base64.b64decode(sealed))["pairs"]
    assert len({k["cluster"] for k in key}) == 7 and {k["severity"] for k in key} == {"real"}
    first, again = (next(iter(blind.real(1, seed=4))).lr for _ in range(2))
    assert torch.equal(first, again) and first.shape == (3, 64, 64)
