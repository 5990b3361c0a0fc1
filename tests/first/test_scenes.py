import json

import numpy as np
import pytest
import torch
from PIL import Image

from realsr_r1 import images as photos
from realsr_r1.corpus import folders
from realsr_r1.first import scenes


def test_same_seed_same_scene_and_other_seed_another():
    a, b, c = scenes.scene(5), scenes.scene(5), scenes.scene(6)
    assert torch.equal(a.image, b.image) and a.captions == b.captions
    assert not torch.equal(a.image, c.image)
    assert a.image.shape == (3, 128, 128) and 0 <= a.image.min() and a.image.max() <= 1


def test_splits_share_no_cutout_and_no_photograph():
    used = {}
    for split in scenes.SPLITS:
        cutouts, backgrounds, photos = scenes._pools(split)
        used[split] = (
            {n for names in cutouts.values() for n in names}
            | {n for regions in backgrounds.values() for n, _ in regions}
            | set(photos)
        )
        assert set(cutouts) == set(scenes.PLACES) and set(backgrounds) == set(
            scenes.PREPOSITIONS
        ), f"{split} lacks a category or a background"
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not used[a] & used[b]
    assert not {e["split"] for n, e in scenes.metadata()["photos"].items() if n in used["test"]} - {
        "test"
    }


def test_captions_grow_and_use_the_vocabulary():
    vocabulary = set(scenes.vocabulary())
    for seed in range(60):
        s = scenes.scene(seed)
        rough, middle, final = s.captions
        assert len(rough.split()) == 4 and len(middle.split()) == 6 and len(final.split()) == 13
        assert set(f"{rough} {middle} {final}".split()) <= vocabulary
        assert (
            s.category in rough and s.kind in middle and s.size in final and s.background in s.tags
        )


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((250, 250, 250), "white"),
        ((10, 10, 10), "black"),
        ((128, 128, 128), "gray"),
        ((220, 20, 20), "red"),
        ((30, 60, 220), "blue"),
        ((40, 180, 40), "green"),
        ((250, 220, 30), "yellow"),
        ((250, 130, 10), "orange"),
        ((110, 70, 35), "brown"),
        ((240, 160, 170), "pink"),
        ((130, 30, 200), "purple"),
    ],
)
def test_color_names(rgb, name):
    assert scenes.color_name(np.full((50, 3), rgb, np.uint8)) == name


def test_position_words_come_from_their_lists_and_all_columns_occur():
    for seed in range(40):
        s = scenes.collage(seed)
        assert s.vertical in scenes.VERTICAL and s.horizontal in scenes.HORIZONTAL
    names = {scenes.collage(i).horizontal for i in range(80)}
    assert names == set(scenes.HORIZONTAL)


def test_position_and_size_words_agree_with_the_pixels(monkeypatch):
    """A magenta square for an object on grey: where it is, is read off the picture."""
    real = scenes._load

    def marked(kind, name):
        image = real(kind, name)
        return (
            Image.new("RGBA", image.size, (255, 0, 255, 255))
            if kind == "cutouts"
            else Image.new("RGB", image.size, (128, 128, 128))
        )

    monkeypatch.setattr(scenes, "_load", marked)
    for seed in range(60):
        s = scenes.collage(seed)
        found = ((s.image[0] - s.image[1] > 0.4) & (s.image[2] - s.image[1] > 0.4)).nonzero()
        top, left = found.min(0).values.tolist()
        bottom, right = (found.max(0).values + 1).tolist()
        assert scenes.VERTICAL[min(2, int((top + bottom) / 2 / 128 * 3))] == s.vertical
        assert scenes.HORIZONTAL[min(2, int((left + right) / 2 / 128 * 3))] == s.horizontal
        lo, hi = {"small": (0.32, 0.46), "medium": (0.46, 0.64), "large": (0.66, 0.9)}[s.size]
        assert lo <= max(bottom - top, right - left) / 128 <= hi
        assert s.color == "pink" or s.color == "purple"


def test_cached_pairs_come_back_and_a_damaged_cache_is_made_again(tmp_path):
    a = scenes.cached_pairs(3, "val", cache=tmp_path)
    b = scenes.cached_pairs(2, "val", cache=tmp_path)
    assert torch.equal(a.hr[:2], b.hr) and a.labels[:2] == b.labels and a.scenes[:2] == b.scenes
    (tmp_path / "val_nano.pt").write_bytes(b"cut short")
    assert torch.equal(scenes.cached_pairs(2, "val", cache=tmp_path).lr, b.lr)


def test_photo_folder_with_and_without_captions(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "b.jpg")
    (tmp_path / "captions.jsonl").write_text(
        json.dumps({"file": "a.png", "captions": ["x", "y", "z"], "tags": ["t"]})
    )
    folder = folders.PhotoFolder(tmp_path)
    x, captions, tags = folder[0]
    assert (
        len(folder) == 2
        and x.shape == (3, 128, 128)
        and captions == ["x", "y", "z"]
        and tags == ["t"]
    )
    assert folder[1][0].shape == (3, 128, 128) and folder[1][1] is None
    with pytest.raises(ValueError, match="holds no photos"):
        folders.PhotoFolder(tmp_path / "empty")


def save_photo(path, kind):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    if kind == "cmyk":
        rgb.convert("CMYK").save(path.with_suffix(".jpg"))
        return path.with_suffix(".jpg")
    if kind == "palette":
        p = rgb.convert("P")
        p.info["transparency"] = 3
        p.save(path, transparency=3)
    elif kind == "16-bit":
        Image.fromarray((np.arange(2000).reshape(40, 50) * 32).astype(np.uint16)).save(path)
    elif kind == "gray":
        rgb.convert("L").save(path)
    elif kind == "alpha":
        rgb.putalpha(120)
        rgb.save(path)
    elif kind == "gif":
        rgb.save(
            path.with_suffix(".gif"),
            save_all=True,
            append_images=[Image.new("RGB", (50, 40), "blue")],
        )
        return path.with_suffix(".gif")
    return path


@pytest.mark.parametrize("kind", ["cmyk", "palette", "16-bit", "gray", "alpha", "gif"])
def test_every_mode_opens_as_rgb(tmp_path, kind):
    image = photos.open_photo(save_photo(tmp_path / "x.png", kind))
    assert image.mode == "RGB" and image.size == (50, 40)
    assert np.asarray(image).std() > 5  # not clipped to one value


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (50, 40), "red").save(tmp_path / "x.jpg", exif=exif)
    assert photos.open_photo(tmp_path / "x.jpg").size == (40, 50)


def test_bad_files_get_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="not an image"):
        photos.open_photo(tmp_path / "notes.txt")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)).save(
        tmp_path / "x.jpg"
    )
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match="damaged or cut short"):
        photos.open_photo(tmp_path / "cut.jpg")
    with pytest.raises(ValueError, match="does not exist"):
        photos.open_photo(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is a folder"):
        photos.open_photo(tmp_path)
