import csv
import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from realsr_r1 import degradation, photographs
from realsr_r1.photographs import Pairs, from_row

ROW = {
    "source": "flower_photos",
    "file": "a/1.jpg",
    "split": "train",
    "subject": "tulip",
    "count": "many",
    "view": "near",
    "colors": "pink+white",
    "place": "left",
    "background": "field+sky",
    "extras": "windmill+leaf+cloud",
    "author": "someone",
}


def picture(size: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def photos():
    return [from_row(ROW, partial(bytes, picture((200, 170), i))) for i in range(3)]


def test_captions_go_from_the_main_thing_to_the_details():
    rough, middle, final = from_row(ROW).captions
    assert rough == "tulips in a field"
    assert middle == "many pink tulips in a field under the sky"
    assert final == "a near view of many pink and white tulips on the left with leaves and clouds"


@pytest.mark.parametrize(
    ("change", "rough"),
    [
        ({"count": "one"}, "a tulip in a field"),
        ({"count": "one", "subject": "elephant"}, "an elephant in a field"),
        ({"subject": "daisy", "background": "dark"}, "daisies on a dark background"),
        ({"subject": "gerbera"}, "flowers in a field"),
        ({"subject": "polar bear", "count": "one"}, "an animal in a field"),
        ({"subject": "gizmo", "count": "one"}, "a thing in a field"),
        ({"subject": "fish"}, "fish in a field"),
    ],
)
def test_rough_captions(change, rough):
    assert from_row(ROW | change).captions[0] == rough


def test_tags_are_what_the_understanding_reward_can_ask_for():
    photo = from_row(ROW | {"extras": "leaf+gizmo"})
    assert photo.tags == ("tulip", "field", "sky", "leaf")  # rare extras are dropped


@pytest.mark.parametrize(
    "change",
    [
        {"place": "in the midle"},
        {"colors": ""},
        {"split": None},
        {"count": "three"},
        {"background": "+"},
        {"colors": "+"},
    ],
)
def test_an_annotation_that_no_caption_can_be_made_of(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"annotation of .* has {name}"):
        from_row(ROW | change)


def test_a_photograph_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match=f"^{ROW['file']}: "):
        from_row(ROW, lambda: b"no picture").image()


def test_an_annotation_with_a_word_that_captions_do_not_have():
    with pytest.raises(ValueError, match=r"annotation of .* needs the word 'teal'"):
        from_row(ROW | {"colors": "teal"})


def test_a_mirror_image_changes_sides_only():
    assert from_row(ROW).mirrored().place == "right"
    assert from_row(ROW | {"place": "top-right"}).mirrored().place == "top-left"
    assert from_row(ROW | {"place": "bottom"}).mirrored().place == "bottom"


def test_every_caption_of_the_table_is_in_the_vocabulary():
    words = set(photographs.vocabulary())
    with (photographs.ASSETS / "annotations.csv").open(newline="", encoding="utf-8-sig") as f:
        for row in csv.DictReader(f):
            used = set(" ".join(from_row(row).captions).split())
            assert used <= words, used - words


def test_splits_share_no_flower_photographer():
    with (photographs.ASSETS / "annotations.csv").open(newline="", encoding="utf-8-sig") as f:
        rows = [r for r in csv.DictReader(f) if r["source"] == "flower_photos"]
    authors = {s: {r["author"] for r in rows if r["split"] == s} for s in photographs.SPLITS}
    assert all(authors.values())
    assert not authors["train"] & (authors["val"] | authors["test"])
    assert not authors["val"] & authors["test"]


def test_a_folder_with_a_table_is_read(tmp_path):
    for name, _split in (("1.png", "train"), ("2.png", "val")):
        (tmp_path / name).write_bytes(picture((64, 48)))
    rows = [ROW | {"file": "1.png"}, ROW | {"file": "2.png", "split": "val"}]
    rows.append(ROW | {"file": "missing.png"})
    with (tmp_path / "annotations.csv").open("w", newline="", encoding="utf-8") as f:
        names = [k for k in ROW if k != "source"]  # which may be missing
        w = csv.DictWriter(f, names, extrasaction="ignore")
        w.writeheader()
        w.writerows(rows)
    found = photographs.load("train", tmp_path)
    assert [p.file for p in found] == ["1.png"] and found[0].image().size == (64, 48)
    with pytest.raises(FileNotFoundError, match="none of the annotated photographs of test"):
        photographs.load("test", tmp_path)
    with pytest.raises(ValueError, match="choose one of train, val, test"):
        photographs.load("dev", tmp_path)


def test_parquet_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [ROW | {"image": picture((64, 48))}, ROW | {"split": "test", "image": b""}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "annotated-00.parquet")
    found = photographs.load("train", tmp_path)
    assert len(found) == 1 and found[0].image().size == (64, 48)
    with pytest.raises(FileNotFoundError, match="none of the annotated photographs of val"):
        photographs.load("val", tmp_path)
    for image in (None, {"bytes": b"", "path": "x.jpg"}):
        rows = [ROW | {"split": "test", "image": image}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "annotated-00.parquet")
        with pytest.raises(ValueError, match=ROW["file"]):
            photographs.load("test", tmp_path)[0].image()


def test_pairs_of_an_unknown_preset_are_refused():
    with pytest.raises(ValueError, match="no preset 'hard'; choose one of paper, nano"):
        photographs.Pairs([], "hard")


def test_some_of_a_split_lie_evenly_over_it():
    every = [p.file for p in photographs.load("train")]
    some = photographs.load("train", n=20)
    places = [every.index(p.file) for p in some]
    assert len(every) == 204 and places[0] == 0
    assert set(np.diff([*places, 204])) == {10, 11}  # to the end: the table is sorted by source
    assert len(photographs.load("train", n=1000)) == 204


def test_a_photograph_taken_sideways_is_upright():
    out, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6  # orientation: turn right
    Image.new("RGB", (60, 40)).save(out, "JPEG", exif=exif)
    assert from_row(ROW, out.getvalue).image().size == (40, 60)


def test_large_photographs_are_scaled_down(photos):
    assert min(photos[0].image().size) == photographs.SHORT_SIDE


def test_pairs_are_replayable_and_differ(photos):
    data = Pairs(photos, seed=3)
    a, b, c = data[5], data[5], data[6]
    assert torch.equal(a["hr"], b["hr"]) and torch.equal(a["lr"], b["lr"])
    assert a["degradation"] == b["degradation"] and a["captions"] == b["captions"]
    assert not torch.equal(a["lr"], c["lr"])
    assert a["hr"].shape == (3, 128, 128) and a["lr"].shape == (3, 32, 32)
    assert len(degradation.from_words(a["degradation"])) == 5


def test_pairs_for_evaluation_are_the_centers_in_order(photos):
    data = Pairs(photos, "nano-light", training=False)
    assert len(data) == 3 and [data[i]["index"] for i in range(3)] == [0, 1, 2]
    want = photographs.to_bytes(photographs.center(photos[1].image(), 128))
    assert torch.equal(data[1]["hr"], want)


def test_captions_follow_the_mirror(photos):
    data = Pairs(photos, seed=0)
    sides = {" ".join(data[i]["captions"]).split(" on the ")[1].split()[0] for i in range(12)}
    assert sides == {"left", "right"}


def test_a_loop_over_held_out_pairs_ends():
    photos = photographs.load("val")[:3]
    assert len(list(photographs.Pairs(photos, labels=False, training=False))) == 3
