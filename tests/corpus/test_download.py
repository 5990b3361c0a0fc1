"""`realsr data get` against a small server of our own."""

import csv
import gzip
import io
import tarfile
import threading
import zipfile
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from realsr_r1 import photographs
from realsr_r1.cli import main
from realsr_r1.corpus import download


def photo() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (60, 50), "green").save(out, "JPEG")
    return out.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            t.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def annotated(source: str, n: int = 2) -> list[str]:
    with (photographs.ASSETS / "annotations.csv").open(newline="", encoding="utf-8-sig") as f:
        rows = [r for r in csv.DictReader(f) if r["source"] == source and r["split"] == "train"]
    return [r["file"] for r in rows[:n]]


@pytest.fixture
def server(monkeypatch):
    """Serves `files` by name; `cut` bytes at most at first, as a connection that breaks."""
    state = {"files": {}, "cut": None, "ranges": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = state["files"].get(self.path.strip("/"))
            if data is None:
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            state["ranges"].append(asked)
            first = int(asked[6:-1]) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            self.wfile.write(data[first : state["cut"]])
            state["cut"] = None
            self.close_connection = True

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{http.server_port}"
    for name, archive in download.ARCHIVES.items():
        file = archive.url.rsplit("/", 1)[1]
        moved = type(archive)(**{**vars(archive), "url": f"{state['url']}/{file}"})
        monkeypatch.setitem(download.ARCHIVES, name, moved)
    yield state
    http.shutdown()


def test_flowers_are_read_after_the_download(server, tmp_path, capsys):
    names = annotated("flower_photos")
    files = {f"flower_photos/{n}": photo() for n in names} | {"flower_photos/daisy/no.jpg": b"x"}
    server["files"]["flower_photos.tgz"] = tar(files)
    assert main(["data", "get", "flowers", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "229 MB, CC BY 2.0" in said and "2 annotated photographs" in said
    assert not (tmp_path / "flower_photos.tgz").exists()
    assert not (tmp_path / "flower_photos" / "daisy" / "no.jpg").exists()
    found = photographs.load("train", tmp_path)
    assert sorted(p.file for p in found) == sorted(names) and found[0].image().size == (60, 50)


def test_an_archive_in_an_archive(server, tmp_path):
    names = annotated("caltech101")
    inner = tar({f"101_ObjectCategories/{n}": photo() for n in names})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("caltech-101/101_ObjectCategories.tar.gz", inner)
        z.writestr("caltech-101/Annotations.tar", b"x")
    server["files"]["caltech-101.zip"] = out.getvalue()
    assert download.get("caltech101", tmp_path, keep=True) == 2
    assert (tmp_path / "caltech-101.zip").exists()
    assert len(photographs.load("train", tmp_path)) == 2


def test_a_broken_download_goes_on(server, tmp_path, capsys):
    data = tar({f"images/{n}": photo() for n in annotated("pets600")})
    server["files"]["images.tar.gz"], server["cut"] = data, 100
    assert main(["data", "get", "pets", "--out", str(tmp_path)]) == 2
    assert f"broke off after 100 of {len(data)} bytes: call again" in capsys.readouterr().err
    assert main(["data", "get", "pets", "--out", str(tmp_path)]) == 0
    assert server["ranges"] == [None, "bytes=100-"]
    assert len(photographs.load("train", tmp_path)) == 2


def test_an_answer_that_is_cut_is_one_sentence(tmp_path, monkeypatch):
    class Cut(io.BytesIO):
        headers, status = {}, 200

        def read(self, n=-1):
            raise IncompleteRead(b"")

    monkeypatch.setattr(download, "_open", lambda url, first: Cut())
    with pytest.raises(ValueError, match=r"x.zip broke off: call again"):
        download.fetch("http://nowhere/x.zip", tmp_path / "x.zip")


def test_a_damaged_archive_is_removed(server, tmp_path, capsys):
    server["files"]["flower_photos.tgz"] = tar({"flower_photos/a.jpg": photo() * 50})[:-40]
    assert main(["data", "get", "flowers", "--out", str(tmp_path)]) == 2
    assert "is damaged and was removed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_header_is_noticed(server, tmp_path):
    names = annotated("pets600")
    data = bytearray(gzip.decompress(tar({f"images/{n}": photo() for n in names})))
    second = data.index(names[1].encode())
    good, data[second + 1] = bytes(data), data[second + 1] ^ 1
    packed = gzip.compress(bytes(data))[:-8] + gzip.compress(good)[-8:]  # the checksum as it was
    server["files"]["images.tar.gz"] = packed
    with pytest.raises(ValueError, match="damaged and was removed"):
        download.get("pets", tmp_path)
    assert not (tmp_path / "images.tar.gz").exists()


def test_where_photographs_cannot_be_written_the_archive_stays(server, tmp_path, capsys):
    files = {f"flower_photos/{n}": photo() for n in annotated("flower_photos")}
    server["files"]["flower_photos.tgz"] = tar(files)
    (tmp_path / "flower_photos").write_bytes(b"in the way")
    assert main(["data", "get", "flowers", "--out", str(tmp_path)]) == 2
    assert "damaged" not in capsys.readouterr().err
    assert (tmp_path / "flower_photos.tgz").exists()


def test_an_archive_of_something_else_is_named(server, tmp_path):
    server["files"]["caltech-101.zip"] = tar({"readme": b"moved"})
    with pytest.raises(ValueError, match="none of the annotated photographs"):
        download.get("caltech101", tmp_path)


def test_an_address_that_has_moved(server, tmp_path, capsys):
    assert main(["data", "get", "flowers", "--out", str(tmp_path)]) == 2
    assert "answers 404" in capsys.readouterr().err
