"""The playground's page, button by button, without a browser (test_browser.py has one)."""

import io
import json

import pytest
import torch
from PIL import Image

from realsr_r1 import RealSR
from realsr_r1.course import playground
from realsr_r1.course.playground import Playground, damaged


@pytest.fixture(scope="module")
def model() -> RealSR:
    return RealSR.from_pretrained("nano", "cpu")


@pytest.fixture
def page(model, tmp_path) -> Playground:
    return Playground(model, tmp_path / "saved")


def test_each_slider_does_its_damage():
    hr = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    clean = damaged(hr, 0, 0, playground.QUALITY)
    assert clean.shape == (3, 32, 32)
    assert damaged(hr, 1.3, 0, playground.QUALITY).std() < clean.std()
    noise = (damaged(hr, 0, 20, playground.QUALITY) - clean).std() * 255
    assert 15 < noise < 21  # some of it is cut off at black and white
    assert not torch.equal(damaged(hr, 0, 0, 20), clean)


def test_a_slider_changes_the_photo_and_forgets_the_chain(page):
    before, page.drawn = page.pictures[0].value, object()
    page.noise.value = 28
    assert page.pictures[0].value != before and page.drawn is None


def test_the_chain_grows_before_the_eyes(page):
    grown = {t: [] for t in page.texts}
    for tag, box in page.texts.items():
        box.observe(lambda c, tag=tag: grown[tag].append(c["new"]), names="value")
    rows = []
    page.pictures[3].observe(lambda c: rows.append(c["new"]), names="value")
    page.write()
    chain = page.drawn.chains[0]
    for tag, box in page.texts.items():
        assert box.value == getattr(chain, tag)
        assert len(grown[tag]) >= len(box.value.split())
    assert len(rows) >= 16 and "restored" in page.said.value


def test_other_words_give_another_picture_under_the_same_noise(page):
    page.write()
    first = page.drawn.codes
    page.redraw()
    assert torch.equal(page.drawn.codes[0], first[0])  # the same words again: the same picture
    page.texts["rough_understand"].value = "boats"
    page.texts["final_understand"].value = "a near view of white boats"
    page.redraw()
    assert not torch.equal(page.drawn.codes, first) and "picture before" in page.said.value


def test_what_the_policy_does_not_know_is_said(page):
    page.redraw()
    assert "write a chain first" in page.said.value
    page.write()
    page.texts["rough_understand"].value = "a xylophone"
    page.redraw()
    assert "does not know &#x27;xylophone&#x27;" in page.said.value
    page.texts["rough_understand"].value = " "
    page.redraw()
    assert "write a word" in page.said.value


def test_the_blind_choice_is_counted_and_the_result_saved(page, tmp_path):
    for action in (page.compare, page.save):
        action()
        assert "write a chain first" in page.said.value
    page.write()
    page.compare()
    page.picked(0)
    assert sum(page.wins.values()) == 1 and page.wins[page.order[0]] == 1
    page.picked(1)  # the pair has been judged
    assert sum(page.wins.values()) == 1
    said = page.texts["rough_understand"].value
    page.texts["rough_understand"].value = "written since"  # the picture was not drawn under it
    page.save()
    (picture,) = (tmp_path / "saved").glob("*.png")
    assert Image.open(picture).size == (128, 128) and "download" in page.download.value
    kept = json.loads(picture.with_suffix(".json").read_text())
    assert set(kept) == set(page.texts) and kept["rough_understand"] == said


@pytest.mark.parametrize("kind", [tuple, dict])
def test_an_uploaded_photo(page, monkeypatch, kind):
    file = io.BytesIO()
    Image.effect_noise((90, 64), 50).convert("RGB").save(file, "PNG")
    one = {"name": "mine.png", "content": memoryview(file.getvalue())}
    value = (one,) if kind is tuple else {"mine.png": one}
    monkeypatch.setattr(Playground, "upload", type("U", (), {"value": value})(), raising=False)
    del page.upload
    page.damage()
    assert page.hr.shape == (3, 128, 128)
    page.as_is.value = True
    assert page.hr is None and page.lr.shape == (3, 32, 32)
    page.write()
    assert page.said.value == "drawn"


def test_a_file_that_is_no_picture(page, monkeypatch):
    value = ({"name": "x", "content": b"no picture"},)
    monkeypatch.setattr(Playground, "upload", type("U", (), {"value": value})(), raising=False)
    del page.upload
    page.damage()
    assert "is not an image" in page.said.value
    page.write()
    page.save()
    saved = [p.name for p in page.folder.glob("*.png")]
    assert saved == [f"{page.photo.value}-{page.seed.value}.png"]  # what is shown, not "mine"
