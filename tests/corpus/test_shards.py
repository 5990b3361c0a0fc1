"""Annotated photographs as parquet files: written, read back, streamed."""

from dataclasses import replace

import datasets
import pytest

from realsr_r1 import photographs
from realsr_r1.cli import main
from realsr_r1.corpus import shards


@pytest.fixture(scope="module")
def photos():
    return photographs.load("train")[:7]


def plain(photos):
    """Annotation and picture, without the way to read it."""
    return [(replace(p, read=None), p.read()) for p in photos]


def test_photographs_come_back_as_they_were(photos, tmp_path):
    others = photographs.load("val")[:2]
    files = shards.write_shards([*photos, *others], tmp_path, per_file=4)
    assert [f.name for f in files] == [f"annotated-{i:05d}.parquet" for i in range(3)]
    assert sorted(tmp_path.iterdir()) == files
    assert plain(photographs.load("train", tmp_path)) == plain(photos)
    assert plain(photographs.load("val", tmp_path)) == plain(others)
    assert photographs.load("train", tmp_path)[3].captions == photos[3].captions


def test_datasets_streams_them_too(photos, tmp_path):
    files = shards.write_shards(photos, tmp_path, per_file=4)
    data = datasets.load_dataset(
        "parquet", data_files=[*map(str, files)], split="train", streaming=True
    )
    assert data.num_shards == 2
    rows = list(data.cast_column("image", datasets.Image()))
    assert [r["file"] for r in rows] == [p.file for p in photos]
    assert rows[0]["image"].size and rows[0]["colors"] == "+".join(photos[0].colors)


def test_a_killed_run_goes_on(photos, tmp_path):
    class Killed(Exception):
        pass

    def kill():
        raise Killed

    with pytest.raises(Killed):
        shards.write_shards([*photos[:5], replace(photos[5], read=kill)], tmp_path, per_file=2)
    first = sorted(tmp_path.glob("*.parquet"))
    times = [f.stat().st_mtime_ns for f in first]
    assert len(first) == 2
    (tmp_path / ".annotated-00002.parquet.part").write_bytes(b"half")
    shards.write_shards(photos[:6], tmp_path, per_file=2)
    assert [f.stat().st_mtime_ns for f in first] == times
    assert plain(photographs.load("train", tmp_path)) == plain(photos[:6])
    assert not list(tmp_path.glob(".*.part"))


def test_files_of_other_photographs_are_not_mixed_in(photos, tmp_path):
    shards.write_shards(photos, tmp_path, per_file=4)
    for other, size in ((photos[1:], 4), (photos, 3), (photos[:4], 4)):
        with pytest.raises(ValueError, match="not of these photographs and sizes: use a new"):
            shards.write_shards(other, tmp_path, size)
    said = [replace(photos[0], subject="ship"), *photos[1:]]  # annotated anew
    with pytest.raises(ValueError, match="not of these photographs"):
        shards.write_shards(said, tmp_path, 4)
    with pytest.raises(ValueError, match="nothing to write"):
        shards.write_shards([], tmp_path)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["data", "shards", str(out), "--split", "val", "test", "val", "--per-file", "50"]) == 0
    )
    assert f"use them with --photographs {out}" in capsys.readouterr().out
    for split in ("val", "test"):
        assert plain(photographs.load(split, out)) == plain(photographs.load(split))
    assert main(["data", "shards", str(tmp_path / "x"), "--photographs", str(tmp_path)]) == 2
    assert "holds none of the annotated photographs" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
