"""One reader and one writer: what is in a file decides how it looks, and nothing else does."""

import io
import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from realsr_r1.files.writable import check_writable
from realsr_r1.images import Photo, open_photo, read, write

RAMP = np.linspace(0, 255, 48 * 36).reshape(36, 48).round().astype(np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def mean(source) -> float:
    return float(np.asarray(open_photo(source)).mean())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("factor", [1, 40, 257])
def test_sixteen_bits_are_scaled_by_their_kind_not_by_their_content(kind, factor):
    made = saved(Image.fromarray(RAMP.astype(np.uint16) * factor), kind)
    assert mean(made) == pytest.approx(RAMP.mean() * factor / 257, abs=0.6)


def test_floats_from_0_to_1_are_scaled_and_others_refused():
    assert mean(saved(Image.fromarray(RAMP / np.float32(255)), "TIFF")) == pytest.approx(
        RAMP.mean(), abs=0.6
    )
    for bad in (np.nan, np.inf, -0.1, 1.5):
        x = (RAMP / 255).astype(np.float32)
        x[0, 0] = bad
        with pytest.raises(ValueError, match="numbers outside 0 to 1: scale them first"):
            read(saved(Image.fromarray(x), "TIFF"))


@pytest.mark.parametrize("bits", [8, 16])
def test_white_is_zero_is_not_a_negative(bits):
    x = RAMP.astype(np.uint16) * 257 if bits == 16 else RAMP
    plain, turned = (Image.fromarray(v) for v in (x, x.max() - x + x.min()))
    tags = {262: 0}
    assert mean(saved(turned, "TIFF", tiffinfo=tags)) == pytest.approx(
        mean(saved(plain, "TIFF")), abs=1.0
    )


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_gray_is_transparent(bits):
    x = np.full((8, 8), 20 * (257 if bits == 16 else 1), np.uint16 if bits == 16 else np.uint8)
    x[:, 4:] *= 2
    png = saved(Image.fromarray(x))
    at = png.index(b"IDAT") - 4
    clear = read(png[:at] + chunk(b"tRNS", struct.pack(">H", int(x[0, 0]))) + png[at:])
    assert np.asarray(clear.alpha)[:, :4].max() == 0 and np.asarray(clear.alpha)[:, 4:].min() == 255
    assert np.asarray(clear.image)[0, 0].tolist() == [255] * 3  # on white


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_kept_apart(mode):
    rgba = Image.new("RGBA", (8, 8), (200, 10, 10, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 4, 8))
    photo = read(saved(rgba.convert(mode), "PNG"))
    if mode != "P":
        assert photo.alpha.getextrema() == (0, 255)
    assert photo.image.mode == "RGB"


def swapped_profile() -> bytes:
    """A profile in which red and green have changed places."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    return bytes(data.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ"))


def test_the_color_profile_is_applied():
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    got = open_photo(saved(red, icc_profile=swapped_profile())).getpixel((0, 0))
    assert got[1] > 150 and got[0] < 60
    broken = open_photo(saved(red, icc_profile=b"no profile at all"))
    assert broken.getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_by_exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.stack([RAMP] * 3, 2))
    photo = read(saved(image, exif=exif))
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(saved(image, exif=exif))))
    assert np.array_equal(np.asarray(photo.image), np.asarray(want))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0" + b"\xff" * 20, b"nonsense"])
def test_exif_that_cannot_be_read_is_passed_over(exif):
    assert open_photo(saved(Image.new("RGB", (5, 4)), "JPEG", exif=exif)).size == (5, 4)


def test_what_is_taken():
    x = np.zeros((4, 6, 3), np.uint8)
    png = saved(Image.fromarray(x))
    for source in (x, x / 255.0, torch.zeros(3, 4, 6), png, io.BytesIO(png), Image.fromarray(x)):
        assert open_photo(source).size == (6, 4)
    assert open_photo(x[..., 0]).size == (6, 4) and open_photo(x[..., :1]).size == (6, 4)


def test_what_is_not_taken(tmp_path):
    photo, text = tmp_path / "photo.jpg", tmp_path / "text.png"
    photo.write_bytes(saved(Image.fromarray(RAMP), "JPEG")[:-300])
    text.write_text("not a picture")
    for source, said in (
        (photo, "is damaged or cut short"),
        (text, "is not an image that Pillow can read"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.png", "does not exist"),
        (np.zeros((3, 4, 6), np.uint8), "must be numbers"),
        (np.zeros((0, 4, 3), np.uint8), "must be numbers"),
        (b"", "is not an image"),
        (7, "is not an image"),
    ):
        with pytest.raises(ValueError, match=said) as e:
            read(source)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif", "bmp"])
def test_written_as_read(suffix, tmp_path):
    x = np.kron(np.random.default_rng(0).integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1)))
    image = Image.fromarray(x.astype(np.uint8))
    alpha = Image.fromarray(np.kron([[0, 255], [255, 255]], np.ones((16, 16))).astype(np.uint8))
    path = tmp_path / f"out.{suffix}"
    write(Photo(image, alpha), path)
    back = read(path)
    kept = suffix in ("png", "webp", "tif", "avif")
    assert (back.alpha is not None) == kept
    away = np.abs(np.asarray(back.image).astype(int) - x)[:, 16:].mean()
    # quality 95 and color at full resolution, which lossy WebP does not have
    assert away < (25 if suffix == "webp" else 3)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix in ("png", "jpg", "webp", "tif"):
        profile = io.BytesIO(Image.open(path).info["icc_profile"])
        assert "sRGB" in ImageCms.getProfileDescription(profile)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_camera_and_date_come_along_but_the_place_only_if_asked_for(suffix, tmp_path):
    exif = Image.Exif()
    exif[271], exif[306], exif[274] = "Maker", "2020:01:01 00:00:00", 6
    exif.get_ifd(34665)[36867] = "2020:01:01 00:00:00"
    exif.get_ifd(34665)[37510] = b"a comment"
    exif.get_ifd(34853)[1] = "N"
    photo = read(saved(Image.new("RGB", (8, 4)), "JPEG", exif=exif))
    for gps in (False, True):
        write(photo, tmp_path / f"out.{suffix}", keep_gps=gps)
        got = Image.open(tmp_path / f"out.{suffix}").getexif()
        assert got[271] == "Maker" and got.get(274) is None
        assert dict(got.get_ifd(34665)) == {36867: "2020:01:01 00:00:00"}
        assert bool(got.get_ifd(34853)) == gps


def test_damaged_camera_data_do_not_cost_the_picture(tmp_path):
    photo = Photo(Image.new("RGB", (8, 4), "red"), exif={34853: {2: object()}, 271: "Maker"})
    write(photo, tmp_path / "out.png", keep_gps=True)
    made = Image.open(tmp_path / "out.png")
    assert made.getpixel((0, 0)) == (255, 0, 0) and not made.getexif()


def test_outputs_are_checked_before_the_work(tmp_path):
    for name, said in (
        ("x.psd", "Pillow cannot write"),
        ("x", "Pillow cannot write"),
        ("no/x.png", "does not exist: create it first"),
        (".", "is a folder"),
    ):
        with pytest.raises(ValueError, match=said):
            check_writable(tmp_path / name)
    with pytest.raises(ValueError, match="too long for WEBP"):
        check_writable(tmp_path / "x.webp", size=(16_400, 4))
    with pytest.raises(ValueError, match="give two names"):
        check_writable(tmp_path / "x.png", tmp_path / "y" / ".." / "x.png")
    with pytest.raises(ValueError, match="choose another place or name"):
        check_writable(tmp_path / f"{'x' * 248}.png")  # fits, but not beside its unfinished part
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\)"):
        (tmp_path / "file").touch()
        write(Photo(Image.new("RGB", (4, 4))), tmp_path / "file" / "x.png")
    with pytest.raises(ValueError, match="is full"):
        check_writable(tmp_path / "x.png", size=(10**9, 10**9))


def test_an_older_picture_survives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    write(Photo(Image.new("RGB", (4, 4), "red")), path)
    before = path.read_bytes()

    def full(self, fp, *_, **__):
        if not isinstance(fp, io.BytesIO):
            fp.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left"):
        write(Photo(Image.new("RGB", (4, 4), "blue")), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_among_the_tiles_keeps_what_is_done(tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    Image.fromarray(np.stack([RAMP] * 3, 2)).resize((160, 160)).save(photo)
    command = [sys.executable, "-m", "realsr_r1", "restore", str(photo), "-o", str(out)]
    run = subprocess.Popen(
        [*command, "--batch", "1"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # off in background jobs
    )
    said = ""
    while "1/" not in said:  # the bar says that the first tile is done
        said += run.stderr.read(1)
    run.send_signal(signal.SIGINT)
    rest = run.communicate(timeout=120)[1]
    assert run.returncode == 130 and "Traceback" not in rest
    assert Image.open(out).size == (640, 640)
