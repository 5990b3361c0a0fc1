import os
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat
from scipy.ndimage import correlate1d

from realsr_r1 import images as photos
from realsr_r1 import perceptual
from realsr_r1.evaluation import metrics, quality
from realsr_r1.photographs import ASSETS

READY = (
    "psnr_y",
    "psnr_rgb",
    "ssim_y",
    "ssim_rgb",
    "lpips",
    "fsim",
    "niqe",
    "piqe",
)  # what a fresh clone can compute
EVAL = ASSETS / "eval"


def photo(name: str, side: int = 128) -> torch.Tensor:
    """The top left corner of a shipped photo, (1, 3, side, side)."""
    return photos.to_tensor(photos.open_photo(EVAL / f"{name}.webp").crop((0, 0, side, side)))[None]


@pytest.fixture(scope="module")
def pair():
    """Two photos with noise of a standard deviation of 8 and 20 of 255, as 8-bit values: (noisy,
    original)."""
    x = torch.cat([photo("scikit-image-chelsea"), photo("scikit-image-astronaut")])
    noise = (
        torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        * torch.tensor([8.0, 20.0]).view(2, 1, 1, 1)
        / 255
    )
    return ((x + noise).clamp(0, 1) * 255).round() / 255, x


@pytest.fixture
def hub(tmp_path):
    """An empty torch hub folder."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub"
    torch.hub.set_dir(before)


def luma(x: torch.Tensor) -> np.ndarray:
    """BT.601's narrow-range luma of 255, in double precision: (b, h, w)."""
    r, g, b = x.double().numpy().transpose(1, 0, 2, 3)
    return 16 + 65.481 * r + 128.553 * g + 24.966 * b


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two (h, w) pictures of 255 by its definition (Wang et al. 2004): Gaussian window 11,
    sigma 1.5, inside only."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def mean(x):
        return correlate1d(correlate1d(x, taps, 0), taps, 1)[5:-5, 5:-5]

    ma, mb, c1, c2 = mean(a), mean(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return float(
        ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()
    )


# ---------------------------------------------------------------- with the original


def test_psnr_on_luma_of_photos_is_that_of_the_formula(pair):
    mse = ((luma(pair[0]) - luma(pair[1])) ** 2).mean((1, 2))
    assert metrics.load("psnr_y")(*pair).tolist() == pytest.approx(
        (10 * np.log10(255**2 / mse)).tolist(), abs=1e-3
    )
    assert torch.allclose(metrics.load("psnr_rgb")(*pair), perceptual.psnr(*pair), atol=1e-3)


def test_ssim_on_luma_and_on_rgb_is_that_of_the_formula(pair):
    on_y = [ssim(a, b) for a, b in zip(*(luma(x).round() for x in pair), strict=True)]
    on_rgb = [
        np.mean(
            [ssim(a, b) for a, b in zip(*(255 * x[i].double().numpy() for x in pair), strict=True)]
        )
        for i in range(2)
    ]
    assert metrics.load("ssim_y")(*pair).tolist() == pytest.approx(on_y, abs=1e-4)
    assert metrics.load("ssim_rgb")(*pair).tolist() == pytest.approx(on_rgb, abs=1e-4)


def test_lpips_is_the_training_loss_s(pair):
    assert torch.equal(metrics.load("lpips")(*pair), perceptual.distance(*pair).detach())


@pytest.mark.parametrize("name", [k for k in READY if metrics.METRICS[k].reference])
def test_the_original_is_best_and_more_noise_is_worse(name, pair):
    score, x = metrics.load(name), pair[1]
    same, noisy = score(x, x), score(*pair)
    better = torch.gt if metrics.METRICS[name].higher else torch.lt
    assert better(same, noisy).all() and better(noisy[0], noisy[1])
    best = {"psnr_y": 80.0, "psnr_rgb": 80.0, "lpips": 0.0}.get(
        name, 1.0
    )  # pyiqa's PSNR ends at 80 dB
    assert same.tolist() == pytest.approx([best] * 2, abs=1e-4)


# ---------------------------------------------------------------- without


@pytest.mark.parametrize("name", ["niqe", "piqe"])
def test_heavy_noise_is_worse_without_the_original_too(name):
    x = photo("scikit-image-astronaut", 288)
    noisy = (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 0.2).clamp(0, 1)
    score = metrics.load(name)
    assert float(score(noisy)) > float(score(x)) + 3  # of both, lower is better


def test_niqe_ships_in_double_precision_and_gives_what_the_calibrated_one_gave(hub):
    found = loadmat(quality.NIQE)
    mean, cov = (torch.from_numpy(found[k]) for k in ("mu_prisparam", "cov_prisparam"))
    assert (
        mean.shape == (1, 36) and cov.shape == (36, 36) and mean.dtype == cov.dtype == torch.float64
    )
    assert torch.equal(cov, cov.T) and torch.linalg.eigvalsh(cov).min() > 0
    # These parameters give the published values on pyiqa's calibration pictures (test below), and
    # these on two shipped photos; in half precision it would be 4.314 and 3.286.
    x = torch.cat([photo("scikit-image-astronaut", 288), photo("libjxl-testdata-flower", 288)])
    assert metrics.load("niqe")(x).tolist() == pytest.approx([4.3008, 3.3006], rel=2e-3)
    assert not list(hub.rglob("*"))  # neither downloaded nor left behind


def test_a_flat_picture_has_no_number_and_does_not_take_the_batch():
    x = torch.cat([photo("scikit-image-chelsea"), torch.full((1, 3, 128, 128), 0.5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = metrics.load("niqe")(x)
    assert score[0] > 0 and torch.isnan(score[1])


# Published values: pyiqa's calibration table, for the distorted pictures I03, I04, I06, I08 and I19
# beside their originals.
PUBLISHED = {
    "psnr_rgb": (21.11, 20.99, 27.01, 23.30, 21.62),
    "lpips": (0.7237, 0.2572, 0.0508, 0.0520, 0.4253),
    "fsim": (0.6890, 0.9702, 0.9927, 0.9575, 0.8220),
    "niqe": (15.6538, 3.6549, 3.2342, 3.1922, 9.0722),
    "piqe": (100.0, 21.62, 35.86, 41.15, 76.95),
    "dists": (0.4742, 0.1424, 0.0683, 0.0287, 0.3123),
    "brisque": (94.6443, -0.1068, 1.0732, 5.1447, 66.8415),
    "musiq": (12.4773, 75.7764, 73.7459, 75.4604, 38.0248),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_calibration(name):
    """With pyiqa's ten calibration pictures, which its wheel brings (or CALIBRATION/ref_dir and
    dist_dir), the published numbers."""
    import pyiqa

    folder = Path(os.environ.get("CALIBRATION", Path(pyiqa.__file__).parents[1] / "ResultsCalibra"))
    if not (folder / "ref_dir" / "I03.bmp").exists():
        pytest.skip(f"{folder} lacks pyiqa's calibration pictures: set CALIBRATION to their folder")
    if missing := quality.absent(metrics.METRICS[name].files):
        pytest.skip(f"{name} needs {missing}")
    out, hr = (
        torch.cat(
            [
                photos.to_tensor(photos.open_photo(folder / side / f"I{i}.bmp"))[None]
                for i in ("03", "04", "06", "08", "19")
            ]
        )
        for side in ("dist_dir", "ref_dir")
    )
    assert metrics.load(name)(out, hr).tolist() == pytest.approx(
        PUBLISHED[name], rel=1e-3, abs=1e-3
    )


# ---------------------------------------------------------------- the table, files and refusals


def test_the_table_agrees_with_pyiqa_on_which_way_is_better_and_what_needs_the_original():
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    for name, metric in metrics.METRICS.items():
        theirs = DEFAULT_CONFIGS[metric.pyiqa or "lpips"]
        assert metric.higher != theirs.get("lower_better", False), name
        assert metric.whole_set or metric.reference == (theirs["metric_mode"] == "FR"), name
    assert metrics.arrow("psnr_y") == "↑" and metrics.arrow("fid") == "↓"


def test_the_files_are_those_that_the_installed_pyiqa_reads():
    from pyiqa.archs import dists_arch, inception

    for name, url in (
        ("dists", dists_arch.default_model_urls["url"]),
        ("fid", inception.FID_WEIGHTS_URL),
    ):
        assert f"pyiqa/{url.rsplit('/', 1)[1]}" in metrics.METRICS[name].files


@pytest.mark.parametrize("name", [k for k in metrics.METRICS if k not in (*READY, "fid")])
def test_absent_files_are_named_with_their_folder_and_not_downloaded(hub, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: None)
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("a download was tried")
    )
    with pytest.raises(FileNotFoundError) as e:
        metrics.load(name)
    said = str(e.value)
    assert (
        said.startswith(f"{name}: files are missing and nothing is downloaded")
        and str(hub) in said
        and "\n" not in said
    )
    assert len(quality.absent(metrics.METRICS[name].files)) == said.count("; ") + 1 >= 1


def test_nothing_ready_needs_a_file(hub):
    ready = [k for k, m in metrics.METRICS.items() if not quality.absent(m.files)]
    assert ready == list(READY)


@pytest.mark.parametrize("name", READY)
def test_the_smallest_picture_works_and_a_smaller_one_is_refused_in_a_sentence(name):
    n = metrics.METRICS[name].smallest
    x = torch.rand(1, 3, n + 3, n, generator=torch.Generator().manual_seed(0))
    y = torch.rand(1, 3, n + 3, n, generator=torch.Generator().manual_seed(1))
    score = metrics.load(name)
    assert torch.isfinite(score(x, y)).all()
    if n > 1:
        with pytest.raises(
            ValueError, match=rf"{name} needs pictures of {n} px or more, got {n - 1}x{n + 3}"
        ):
            score(x[..., 1:], y[..., 1:])


def test_values_outside_the_range_are_clipped(pair):
    x = pair[1]
    assert (
        metrics.load("psnr_rgb")(x * 3 - 1, x).tolist()
        == metrics.load("psnr_rgb")((x * 3 - 1).clamp(0, 1), x).tolist()
    )


def test_wrong_calls_are_refused_in_a_sentence(pair):
    x = pair[1]
    with pytest.raises(ValueError, match="no metric 'psnr'; choose among psnr_y, psnr_rgb"):
        metrics.load("psnr")
    with pytest.raises(
        ValueError,
        match="psnr_y compares with the original and there is none: choose among niqe, brisque",
    ):
        metrics.load("psnr_y")(x)
    with pytest.raises(ValueError, match=r"one size, got \(2, 3, 128, 128\) and \(2, 3, 64, 128\)"):
        metrics.load("ssim_y")(x, x[..., :64, :])
    with pytest.raises(ValueError, match="add the batch dimension"):
        metrics.load("piqe")(x[0])
    for pictures in ((x * 255).byte(), x), (x, (x * 255).byte()):
        with pytest.raises(ValueError, match=r"psnr_y takes floats .* 8-bit pictures by 255"):
            metrics.load("psnr_y")(*pictures)
    with pytest.raises(ValueError, match=r"call metrics\.fid"):
        metrics.load("fid")


# ---------------------------------------------------------------- FID


def test_fid_refuses_few_pictures_and_then_asks_for_its_file(hub):
    with pytest.raises(ValueError, match="fid needs 100 pictures or more, got 99"):
        metrics.fid(["a.png"] * 99, ["b.png"] * 200)
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d\.pth"):
        metrics.fid(["a.png"] * 100, ["b.png"] * 100)


def test_fid_hands_over_two_folders_of_every_picture_and_warns(tmp_path, monkeypatch):
    for name, level in (("out", 10), ("hr", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (level,) * 3).save(
            tmp_path / name / "same.png"
        )  # one name twice: neither may be lost
    seen = []

    def fake(outputs, originals, **how):
        seen.extend(sorted(Path(f).glob("*.png")) for f in (outputs, originals))
        assert [Image.open(side[0]).getpixel((0, 0))[0] for side in seen] == [10, 200]
        return np.float64(12.5)

    monkeypatch.setattr(quality, "absent", lambda files: [])
    monkeypatch.setattr(metrics.quality, "create", lambda name, device: fake)
    with pytest.warns(UserWarning, match="FID of 100 pictures is biased"):
        assert (
            metrics.fid([tmp_path / "out" / "same.png"] * 100, [tmp_path / "hr" / "same.png"] * 120)
            == 12.5
        )
    assert [len(side) for side in seen] == [100, 120] and not seen[0][0].exists()
