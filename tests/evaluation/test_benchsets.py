import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from realsr_r1 import degradation, photographs
from realsr_r1 import images as photos
from realsr_r1.evaluation import sets as benchsets


def picture(path, w, h, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (w, h), (level, 50, 0)).save(path)


def make_pairs(
    folder, names, hr="hr", lr="lr", size=(8, 6), hr_suffix="", lr_suffix="", suffix=".png"
):
    w, h = size
    for i, name in enumerate(names):
        picture(folder / lr / f"{name}{lr_suffix}{suffix}", w, h, 10 + i)
        picture(folder / hr / f"{name}{hr_suffix}{suffix}", 4 * w, 4 * h, 110 + i)


# ---------------------------------------------------------------- the offline sets


def test_eval_photos_under_three_fixed_degradations():
    found = benchsets.load("eval")
    files = sorted((photographs.ASSETS / "eval").glob("*.webp"))
    assert (
        len(found) == 3 * len(files) == 42
        and found.paired
        and len({i.id for i in found.items}) == 42
    )
    assert [i.group for i in found.items[:4]] == [files[0].stem] * 3 + [files[1].stem]
    lr, hr = found.items[1].read()
    assert lr.shape == (3, 64, 64) and hr.shape == (3, 256, 256)
    again = degradation.degrade(hr[None], "nano-medium", torch.Generator().manual_seed(0))
    assert torch.equal(lr, again.lr[0]) and found.items[1].labels == again.labels[0]
    assert found.items[1].id.endswith("-medium") and not torch.equal(lr, found.items[2].read()[0])


def test_one_degradation_alone_is_the_same_pictures():
    whole, heavy = benchsets.load("eval", 6), benchsets.load("eval:heavy", 2)
    assert [i.id for i in heavy.items] == [
        i.id for i in whole.items if i.id.endswith("heavy")
    ] and heavy.name == "eval-heavy-first-2"
    assert torch.equal(heavy.items[1].read()[0], whole.items[5].read()[0])


def test_an_original_is_the_center_square_and_keeps_colors():
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 0, 0), (10, 0, 30, 20))  # the center square, exactly
    x = benchsets.center_square(image, 16)
    assert x.shape == (3, 16, 16) and torch.equal(x[0], torch.ones(16, 16)) and not x[1:].any()


def test_real_photos_have_no_original():
    found = benchsets.load("real_lr")
    assert (
        len(found) == 7
        and not found.paired
        and all(i.read()[1] is None and i.labels is None for i in found.items)
    )


def test_annotated_photographs_are_the_test_split_at_three_severities():
    found, photos_of_split = benchsets.load("photographs", 6), photographs.load("test")
    names = [p.file for p in photos_of_split[:2] for _ in range(3)]
    assert [i.photo.file for i in found.items] == names
    pair = photographs.Pairs(photos_of_split, "nano-heavy", training=False)[1]
    lr, hr = found.items[5].read()
    assert torch.equal((lr * 255).round().byte(), pair["lr"])
    assert torch.equal((hr * 255).round().byte(), pair["hr"])
    assert degradation.to_words(found.items[5].labels) == pair["degradation"]
    assert found.items[0].group == found.items[2].group != found.items[3].group


def test_annotated_photographs_of_two_folders_have_two_names(tmp_path):
    names = set()
    head = "source,author,file,split,subject,count,view,colors,place,background"
    for who in ("one", "two"):
        picture(tmp_path / who / "a.png", 130, 130)
        row = f"flower_photos,{who},a.png,test,rose,one,near,red,center,grass"
        (tmp_path / who / "annotations.csv").write_text(f"{head}\n{row}\n")
        found = benchsets.load(f"photographs:{tmp_path / who}")
        names.add(found.name)
        assert {i.group for i in found.items} == {who}  # a flower's photographer
    assert len(names) == 2 and "photographs" not in names
    with pytest.raises(ValueError, match="write photographs or photographs:FOLDER"):
        benchsets.load("photographs:")


# ---------------------------------------------------------------- folders


def test_a_folder_of_pairs_by_name(tmp_path):
    make_pairs(tmp_path, ["b", "a"])
    found = benchsets.load(str(tmp_path))
    assert (
        [i.id for i in found.items] == ["a", "b"]
        and found.paired
        and found.name.startswith(f"{tmp_path.name}-")
    )
    lr, hr = found.items[1].read()
    assert (
        lr.shape == (3, 6, 8)
        and hr.shape == (3, 24, 32)
        and round(float(lr[0, 0, 0]) * 255) == 10
        and round(float(hr[0, 0, 0]) * 255) == 110
    )
    assert len(benchsets.load(str(tmp_path), 1)) == 1


@pytest.mark.parametrize(
    ("names", "hr", "lr", "hr_suffix", "lr_suffix"),
    [
        (
            ["0801", "0802"],
            "DIV2K_valid_HR",
            "DIV2K_valid_LR_bicubic/X4",
            "",
            "x4",
        ),  # DIV2K as it is distributed
        (["Canon_001", "Nikon_001"], "test_HR", "test_LR", "", ""),  # StableSR's folders
        (["Canon_001", "Canon_002"], "", "", "_HR", "_LR4"),  # RealSR version 3, side by side
        (["one", "two"], "GT", "LQ", "", ""),
        (["one", "two"], "hr", "lr", "", "_x4"),
        (["box1", "box2", "box3"], "hr", "lr", "", ""),  # names that end like a scale
        (["a_x2", "x4", "0001x4"], "hr", "lr", "", ""),
        (["box1", "0001x4"], "", "", "_HR", "_LR4"),
    ],
)
def test_the_layouts_that_sets_come_in(tmp_path, names, hr, lr, hr_suffix, lr_suffix):
    make_pairs(tmp_path, names, hr, lr, hr_suffix=hr_suffix, lr_suffix=lr_suffix)
    found = benchsets.find_pairs(tmp_path)
    assert [key for key, *_ in found] == sorted(names)
    assert all(
        photos.open_photo(h).size == (32, 24) and photos.open_photo(s).size == (8, 6)
        for _, s, h in found
    )


def test_cameras_in_folders_of_their_own_do_not_collide(tmp_path):
    for camera in ("Canon", "Nikon"):
        make_pairs(tmp_path / camera, ["001"], "", "", hr_suffix="_HR", lr_suffix="_LR4")
    assert [key for key, *_ in benchsets.find_pairs(tmp_path)] == ["Canon__001", "Nikon__001"]


def test_two_files_of_one_side_and_one_name_are_refused_and_not_dropped(tmp_path):
    for suffix in (".png", ".bmp"):
        make_pairs(tmp_path / "suffixes", ["a"], suffix=suffix)
    make_pairs(tmp_path / "folders", ["a__b", "a/b"])
    make_pairs(tmp_path / "scales", ["0001"], lr_suffix="x4")
    picture(tmp_path / "scales" / "lr" / "0001_x4.png", 8, 6)
    for name, two in (
        ("suffixes", r"lr/a\.bmp and lr/a\.png"),
        ("folders", r"lr/a/b\.png and lr/a__b\.png"),
        ("scales", r"lr/0001_x4\.png and lr/0001x4\.png"),
    ):
        with pytest.raises(ValueError, match=f"{two} would both be called "):
            benchsets.find_pairs(tmp_path / name)


def test_what_is_left_over_is_named_in_full(tmp_path):
    make_pairs(tmp_path, ["a"])
    picture(tmp_path / "lr" / "a_x4.png", 8, 6)
    with pytest.raises(ValueError, match="1 photos have no partner, the first is a_x4:"):
        benchsets.find_pairs(tmp_path)


def test_div2k_s_other_scales_may_lie_beside_x4(tmp_path):
    make_pairs(tmp_path, ["0801"], "DIV2K_valid_HR", "DIV2K_valid_LR_bicubic/X4", lr_suffix="x4")
    picture(tmp_path / "DIV2K_valid_LR_bicubic" / "X2" / "0801x2.png", 16, 12)
    [(key, lr, _)] = benchsets.find_pairs(tmp_path)
    assert key == "0801" and lr.name == "0801x4.png"


def test_photos_alone_or_in_lr_alone_have_no_original(tmp_path):
    picture(tmp_path / "flat" / "x.png", 9, 7)
    picture(
        tmp_path / "sub" / "lr" / "x4.png", 9, 7
    )  # a photo may be called what a pair's ending is called
    for folder, key in (("flat", "x"), ("sub", "x4")):
        found = benchsets.load(str(tmp_path / folder))
        assert (
            [i.id for i in found.items] == [key]
            and not found.paired
            and found.items[0].read()[1] is None
        )


def test_folders_that_are_wrong_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no set and no folder 'nowhere': choose among eval, eval:light"
    ):
        benchsets.load("nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        benchsets.load(f"realsr:{tmp_path / 'none'}")
    with pytest.raises(ValueError, match="does not say where realsr lies: write realsr:FOLDER"):
        benchsets.load("realsr")
    with pytest.raises(ValueError, match="one item or more, got n = 0"):
        benchsets.load("eval", 0)
    with pytest.raises(ValueError, match="holds no pictures"):
        benchsets.load(str(tmp_path))
    make_pairs(tmp_path, ["a", "b"])
    (tmp_path / "hr" / "b.png").unlink()
    with pytest.raises(ValueError, match="1 photos have no partner, the first is b"):
        benchsets.load(str(tmp_path))
    for f in (tmp_path / "lr").iterdir():
        f.unlink()
    (tmp_path / "lr").rmdir()
    with pytest.raises(ValueError, match="has hr/ but no LR photos"):
        benchsets.load(str(tmp_path))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((32, 25), r"LR 8x6 and HR 32x25: HR must be 32x24"),
        ((8, 6), r"set's version of equal sizes"),
    ],
)
def test_pairs_of_another_scale_are_refused_before_anything_is_restored(tmp_path, size, said):
    make_pairs(tmp_path, ["a", "b"])
    picture(tmp_path / "hr" / "b.png", *size)
    with pytest.raises(ValueError, match=said):
        benchsets.load(str(tmp_path))


def test_a_broken_file_of_a_pair_is_named(tmp_path):
    make_pairs(tmp_path, ["a"])
    (tmp_path / "hr" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is not an image that Pillow can read"):
        benchsets.load(str(tmp_path))


# ---------------------------------------------------------------- the paper's sets


def test_a_prepared_set_must_hold_what_is_expected(tmp_path, monkeypatch):
    known = (
        benchsets.Prepared(2, True, (8, 6), (32, 24), "tiny crops"),
        benchsets.Prepared(3, True, source="whole"),
    )
    monkeypatch.setitem(benchsets.KNOWN, "realsr", known)
    make_pairs(tmp_path, ["a", "b"])
    found = benchsets.load(f"realsr:{tmp_path}")
    assert (
        found.name == "realsr"
        and found.note == "2 pairs, LR 8x6, HR 32x24 (tiny crops)"
        and len(found) == 2
    )
    make_pairs(tmp_path, ["c"], size=(5, 5))
    assert benchsets.load(f"realsr:{tmp_path}").note == "3 pairs (whole)"
    (tmp_path / "lr" / "a.png").unlink()
    (tmp_path / "hr" / "a.png").unlink()
    with pytest.raises(
        ValueError,
        match=r"expected to be 2 pairs, LR 8x6, HR 32x24 \(tiny crops\), or 3 pairs \(whole\); .* "
        r"holds 2 pairs, LR of 2 sizes, e.g. 5x5",
    ):
        benchsets.load(f"realsr:{tmp_path}")


def test_reallq250_is_250_photos_of_256_without_originals(tmp_path):
    for i in range(250):
        picture(tmp_path / f"{i:03d}.png", 256, 256)
    assert (
        len(benchsets.load(f"reallq250:{tmp_path}")) == 250
        and len(benchsets.load(f"reallq250:{tmp_path}", 5)) == 5
    )
    picture(tmp_path / "000.png", 256, 255)
    with pytest.raises(
        ValueError, match="reallq250 is expected to be 250 photos without originals, LR 256x256"
    ):
        benchsets.load(f"reallq250:{tmp_path}")


def test_ost_val_is_checked_for_what_is_known_only(tmp_path):
    make_pairs(tmp_path, ["a"])
    assert "any number of pairs" in benchsets.load(f"ost-val:{tmp_path}").note
    picture(tmp_path / "flat" / "a.png", 8, 8)
    with pytest.raises(ValueError, match="holds 1 photos without originals"):
        benchsets.load(f"ost-val:{tmp_path / 'flat'}")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name="set", **columns):
        features = datasets.Features(
            {
                k: datasets.Image() if isinstance(v[0], Image.Image) else datasets.Value("string")
                for k, v in columns.items()
            }
        )
        for split in ("train", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            datasets.Dataset.from_dict(columns, features=features).to_parquet(
                tmp_path / name / f"{split}-0.parquet"
            )
        return f"hf:{tmp_path / name}"

    return make


def image(w, h, level):
    return Image.fromarray(np.full((h, w, 3), level, np.uint8))


def test_a_row_without_a_picture_is_named(local):
    found = benchsets.load(local(lr=[image(8, 6, 10), None]))
    assert found.items[0].read()
    with pytest.raises(ValueError, match="row 1 has no picture"):
        found.items[1].read()


def test_a_data_set_with_pairs_and_its_test_split(local):
    spec = local(LR=[image(8, 6, 10), image(8, 6, 20)], HR=[image(32, 24, 30), image(32, 25, 40)])
    found = benchsets.load(spec)
    assert (
        len(found) == 2
        and found.paired
        and found.name.endswith("-set-test")
        and "/" not in found.name
    )
    lr, hr = found.items[0].read()
    assert lr.shape == (3, 6, 8) and hr.shape == (3, 24, 32) and round(float(hr.max()) * 255) == 30
    with pytest.raises(ValueError, match="the pair of row 1 is not ×4"):
        found.items[1].read()
    assert benchsets.load(f"{spec}:train").name.endswith("-train")
    with pytest.raises(ValueError, match="no split 'val': choose among"):
        benchsets.load(f"{spec}:val")


def test_a_data_set_of_photos_alone_and_one_without_any(local):
    found = benchsets.load(local("alone", image=[image(8, 6, 10)]))
    assert not found.paired and found.items[0].read()[1] is None
    with pytest.raises(ValueError, match="it needs lr and hr, or image alone"):
        benchsets.load(local("words", text=["a"]))
    with pytest.raises(ValueError, match=r"column lr of data set .* does not hold images"):
        benchsets.load(local("paths", lr=["a.png"]))


def test_a_data_set_that_is_not_here_is_one_sentence_and_no_download(monkeypatch):
    def offline(name):
        raise ConnectionError("many\nlines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="data set a/b cannot be had") as e:
        benchsets.load("hf:a/b")
    assert "HF_HUB_OFFLINE=0" in str(e.value) and "\n" not in str(e.value)
