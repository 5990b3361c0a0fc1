import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from realsr_r1 import images as photos
from realsr_r1.corpus import folders, sources
from realsr_r1.first import degradation


def draw(path, seed, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Seven photos in two folders."""
    for i in range(7):
        draw(tmp_path / "in" / ("a" if i < 4 else "b") / f"{i}.png", i)
    return tmp_path / "in"


ALL = [f"a/{i}.png" for i in range(4)] + [f"b/{i}.png" for i in range(4, 7)]


def names(data):
    return [row["file"] for row in data]


def as_parquet(folder, out, column="image", **more):
    files = folders.photo_files(folder)
    rows = {column: [str(folder / f) for f in files], **{k: v(files) for k, v in more.items()}}
    data = datasets.Dataset.from_dict(rows).cast_column(column, datasets.Image())
    out.mkdir()
    data.select(range(5)).to_parquet(out / "x-0.parquet")
    data.select(range(5, 7)).to_parquet(out / "x-1.parquet")


def test_a_folder_of_photos_in_depth(folder):
    rows = list(sources.open_source(folder))
    assert [r["file"] for r in rows] == ALL and all(r["bytes"] is None for r in rows)
    assert np.array_equal(sources.open_row(rows[5]), Image.open(folder / "b" / "5.png"))


def test_a_folder_of_archives_needs_no_unpacking(folder, tmp_path):
    out = tmp_path / "tars"
    out.mkdir()
    for part, mode in (("a", "w:gz"), ("b", "w")):
        with tarfile.open(out / f"shard-{part}.tar{'.gz' if mode == 'w:gz' else ''}", mode) as tar:
            tar.add(folder / part, arcname=f"./{part}", filter=lambda m: m)
            note = tarfile.TarInfo(f"{part}/read.txt")
            tar.addfile(note, io.BytesIO())
    rows = sorted(sources.open_source(out), key=lambda r: r["file"])
    assert [
        r["file"] for r in rows
    ] == ALL  # the same names as of the unpacked folder, and no text file
    assert np.array_equal(sources.open_row(rows[5]), Image.open(folder / "b" / "5.png"))
    parts = [names(sources.open_source(out, shard=(i, 2))) for i in range(2)]
    assert [{f[0] for f in p} for p in parts] == [{"a"}, {"b"}]
    whole = (out / "shard-a.tar.gz").read_bytes()
    (out / "shard-a.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"archive shard-a\.tar\.gz is damaged or cut short"):
        list(sources.open_source(out))


def test_parquet_as_on_the_hub(folder, tmp_path):
    as_parquet(
        folder,
        tmp_path / "named",
        file_name=lambda files: files,
        label=lambda files: [0] * len(files),
    )
    rows = list(sources.open_source(tmp_path / "named"))
    assert [r["file"] for r in rows] == ALL and set(rows[0]) == {"file", "path", "bytes"}
    assert np.array_equal(sources.open_row(rows[2]), Image.open(folder / "a" / "2.png"))
    as_parquet(folder, tmp_path / "unnamed", column="hr")
    assert names(sources.open_source(tmp_path / "unnamed")) == [
        f"{i}.png" for i in range(7)
    ]  # the images' own paths
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "text" / "x.parquet")
    with pytest.raises(ValueError, match="has no column of images, only text"):
        sources.open_source(tmp_path / "text")


def test_a_photo_without_any_name_is_named_by_its_content(folder):
    def rows(order):
        data = [{"image": {"bytes": (folder / ALL[i]).read_bytes(), "path": None}} for i in order]
        return datasets.Dataset.from_list(
            data, features=datasets.Features({"image": datasets.Image()})
        ).to_iterable_dataset()

    first, second = (names(sources._from_column(rows(o), "x")) for o in ((0, 1, 2), (2, 0, 1)))
    assert len(set(first)) == 3 and second == [first[2], first[0], first[1]]


def test_hub_datasets_are_streamed(folder, tmp_path, monkeypatch):
    as_parquet(folder, tmp_path / "hub", file_name=lambda files: files)
    local, asked = sources.load_dataset, []

    def hub(name, split, streaming):
        asked.append((name, split, streaming))
        return local(
            "parquet", data_files=str(tmp_path / "hub" / "*.parquet"), split="train", streaming=True
        )

    monkeypatch.setattr(sources, "load_dataset", hub)
    assert names(sources.open_source("hf:owner/photos", "validation")) == ALL
    assert asked == [("owner/photos", "validation", True)]
    rows = [{"image": {"path": "hf://datasets/owner/photos@0123abc/train/x.png", "bytes": None}}]
    data = datasets.Dataset.from_list(
        rows, features=datasets.Features({"image": datasets.Image()})
    ).to_iterable_dataset()
    assert names(sources._from_column(data, "x")) == [
        "train/x.png"
    ]  # neither repository nor revision is in the name


def test_a_remote_path_is_fetched(folder):
    row = {"file": "x.png", "path": f"file://{folder}/a/1.png", "bytes": None}
    assert np.array_equal(sources.open_row(row), Image.open(folder / "a" / "1.png"))
    with pytest.raises(ValueError, match=r"x\.png could not be fetched"):
        sources.open_row(row | {"path": f"file://{folder}/a/none.png"})


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_shards_are_a_partition(folder, tmp_path, kind, number):
    if kind == "parquet":  # two files: with three processes, rows are dealt out
        as_parquet(folder, tmp_path / "p", file_name=lambda files: files)
    where = folder if kind == "folder" else tmp_path / "p"
    parts = [names(sources.open_source(where, shard=(i, number))) for i in range(number)]
    assert sorted(f for p in parts for f in p) == ALL
    assert max(map(len, parts)) - min(map(len, parts)) <= (
        3 if kind == "parquet" and number == 2 else 1
    )


@pytest.mark.parametrize(
    ("where", "match"),
    [
        (
            "lsdir",
            r"lsdir is not a folder: get hub repository ofsoundof/LSDIR .* and give its folder",
        ),
        ("nowhere", r"nowhere is not a folder: give a folder, or hf:OWNER/NAME"),
        (
            "hf:owner/absent",
            r"hf:owner/absent could not be streamed .* check name, split and network",
        ),
    ],
)
def test_nothing_to_read_says_what_to_do(where, match):
    with pytest.raises(ValueError, match=match):
        sources.open_source(where)


def test_bad_folder_and_bad_shard(tmp_path, folder):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no photos"):
        sources.open_source(tmp_path / "text")
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"shard {shard[0]}/{shard[1]} does not exist"):
            sources.open_source(folder, shard=shard)


def test_pairs_do_not_depend_on_company_or_order(folder):
    rows = list(sources.open_source(folder))
    recipe = sources.Recipe(size=32, copies=2)
    data, skipped = sources.pairs(rows, recipe)
    assert (
        skipped == []
        and data.hr.shape == (14, 3, 32, 32)
        and data.lr.shape == (14, 3, 8, 8)
        and data.hr.dtype == torch.uint8
    )
    assert [s.file for s in data.scenes[:4]] == ["a/0.png", "a/0.png", "a/1.png", "a/1.png"]
    alone, _ = sources.pairs([rows[3]], recipe)
    assert (
        torch.equal(alone.hr, data.hr[6:8])
        and torch.equal(alone.lr, data.lr[6:8])
        and alone.labels == data.labels[6:8]
    )
    assert not torch.equal(alone.hr[0], alone.hr[1])  # copies are other crops
    other, _ = sources.pairs([rows[3]], sources.Recipe(size=32, seed=1))
    assert not torch.equal(other.lr[0], alone.lr[0])


def test_a_pair_is_its_crop_degraded(folder):
    """By hand: the crop of that seed, then the preset's degradation of that seed."""
    data, _ = sources.pairs([next(iter(sources.open_source(folder)))], sources.Recipe(size=32))
    seed = sources.seed_of(sources.Recipe(size=32), "a/0.png", 0)
    crop = photos.to_tensor(
        folders.largest_square(photos.open_photo(folder / "a" / "0.png"), 32, seed)
    )
    lr = degradation.degrade(crop[None], "nano", torch.Generator().manual_seed(seed)).lr
    assert torch.equal(data.hr[0].float() / 255, crop) and torch.equal(
        (lr[0] * 255).round().byte(), data.lr[0]
    )


def test_broken_photos_and_those_without_captions_are_left_out_by_name(folder):
    (folder / "a" / "1.png").write_bytes(b"broken")
    notes = {f: {"file": f, "captions": ["x", "y", "z"], "tags": ["t"]} for f in ALL[:3]}
    data, skipped = sources.pairs(sources.open_source(folder), sources.Recipe(size=32), notes)
    assert [(s.file, s.captions, s.tags) for s in data.scenes] == [
        (f, ("x", "y", "z"), ("t",)) for f in ("a/0.png", "a/2.png")
    ]
    why = {s["file"]: s["why"] for s in skipped}
    assert (
        "is not an image that Pillow can read" in why["a/1.png"]
        and [why[f] for f in ALL[3:]] == ["no captions"] * 4
    )
    assert sources.pairs([], sources.Recipe(size=32)) == (None, [])


def test_small_photos_are_enlarged(tmp_path):
    draw(tmp_path / "s.png", 0, (10, 20))
    data, _ = sources.pairs(sources.open_source(tmp_path), sources.Recipe(size=32))
    assert data.hr.shape == (1, 3, 32, 32)


def test_captions_join_by_file_name_in_folder_and_parquet(folder, tmp_path):
    line = {"file": "b/5.png", "captions": ["x", "y", "z"], "tags": []}
    (folder / "captions.jsonl").write_text(json.dumps(line) + "\n")
    as_parquet(folder, tmp_path / "p", file_name=lambda files: files)
    notes = folders.read_captions(folder)
    for where in (folder, tmp_path / "p"):
        assert sources.check_join(names(sources.open_source(where)), notes) == 1
    assert folders.PhotoFolder(folder)[5][1] == ["x", "y", "z"]  # the same name for PhotoFolder
    with pytest.raises(
        ValueError,
        match=r"none of 2 photos is named .* first photo is '5\.png', the first caption's file "
        r"'b/5\.png'",
    ):
        sources.check_join(["5.png", "6.png"], notes)


def test_captions_of_several_processes_and_broken_lines(tmp_path):
    def line(file, word):
        return json.dumps({"file": file, "captions": [word] * 3, "tags": []}) + "\n"

    (tmp_path / "captions.jsonl").write_text(line("a.png", "old"))
    (tmp_path / "captions.0-of-2.jsonl").write_text(line("a.png", "new") + line("b.png", "b"))
    (tmp_path / "captions.1-of-2.jsonl").write_text(
        line("c.png", "c") + '{"file": "d.png", "capt'
    )  # killed while writing
    notes = folders.read_captions(tmp_path)
    assert {f: n["captions"][0] for f, n in notes.items()} == {
        "a.png": "new",
        "b.png": "b",
        "c.png": "c",
    }
    assert folders.read_captions(tmp_path / "captions.jsonl")["a.png"]["captions"][0] == "old"
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png"}\n' + line("b.png", "b"))
    with pytest.raises(ValueError, match=r"line 1 of captions\.jsonl is not"):
        folders.read_captions(tmp_path)
    assert folders.read_captions(tmp_path / "elsewhere") == {}
