import huggingface_hub
import numpy as np
import pytest
import scipy.io
import torch

from realsr_r1 import perceptual
from realsr_r1.first import degradation, experts, scenes, weights
from realsr_r1.first.weights import WEIGHTS


@pytest.fixture(scope="module")
def nano():
    return experts.load_expert("nano")


@pytest.fixture(scope="module")
def vq():
    return weights.load(WEIGHTS / "tokenizer.safetensors")


@pytest.fixture
def hub(tmp_path):
    """An empty torch hub folder."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    yield tmp_path
    torch.hub.set_dir(before)


def few(pairs, n):
    return scenes.Pairs(pairs.hr[:n], pairs.lr[:n], pairs.labels[:n], pairs.scenes[:n])


# ---------------------------------------------------------------- the nano expert


def test_one_number_a_picture_between_0_and_1_whatever_the_batch(nano, pairs):
    x = pairs.hr[:4].float() / 255
    score = nano(x)
    assert (
        score.shape == (4,) and score.dtype == torch.float32 and ((score > 0) & (score < 1)).all()
    )
    assert torch.allclose(score, torch.cat([nano(one) for one in x.split(1)]), atol=1e-5)
    assert sum(p.numel() for p in nano.parameters()) <= 600_000 and not any(
        p.requires_grad for p in nano.parameters()
    )


@pytest.mark.parametrize("size", [(16, 16), (37, 50), (128, 200)])
def test_pictures_of_any_size(nano, size):
    assert torch.isfinite(nano(torch.rand(2, 3, *size))).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_pictures_give_a_number(nano, value):
    assert torch.isfinite(nano(torch.full((1, 3, 64, 64), value))).all()


def test_shipped_weights_rank_held_out_scenes(nano, vq, pairs):
    # A guard on four scenes, looser than what is measured on many: 91% in order and -0.76 on 64
    # test scenes.
    report = experts.calibrate(nano, few(pairs, 4), vq, levels=(0.2, 0.9))
    assert report["ordered"] >= 0.85 and report["spearman_scene"] <= -0.6
    assert set(report["by_kind"]) == set(experts.KINDS) - {"guided"}
    assert len(report["rows"]) == 4 * 3 * len(report["by_kind"])
    kind, severity, scene, score, away = report["rows"][0]
    assert (kind, severity, scene, away) == (
        "codes",
        0.0,
        0,
        pytest.approx(0, abs=1e-6),
    ) and 0 < score < 1


def test_training_writes_a_file_that_loads_and_the_seed_decides(tiny, pairs, tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    bank = (
        torch.randint(0, 256, (3, 7, 3, 64, 64), generator=g, dtype=torch.uint8),
        torch.rand((3, 7), generator=g),
    )
    monkeypatch.setattr(experts, "make_bank", lambda *a, **k: bank)
    runs = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        torch.rand(int(name == "b") + 1)  # global state elsewhere must not matter
        model = experts.train_expert(pairs, tiny[0], path, steps=2, batch=14, device="cpu")
        assert (
            path.with_suffix(".csv").read_text().startswith("step,seconds,loss,rank,anchor,ordered")
        )
        x = bank[0][0, :2].float() / 255
        runs.append(experts.load_expert("nano", path=path)(x))
        with torch.no_grad():
            assert torch.allclose(model(x), runs[-1], atol=2e-2)  # the file is in half precision
    assert torch.equal(*runs)


def test_bank_starts_with_the_original(tiny, pairs):
    bank, away = experts.make_bank(few(pairs, 3), (tiny[0],), 3, versions=3, chunk=2)
    assert bank.shape == (3, 3, 3, 128, 128) and bank.dtype == torch.uint8
    assert (
        torch.equal(bank[:, 0], pairs.hr[:3])
        and (away[:, 0] == 0).all()
        and (away[:, 1:] > 0).all()
    )
    real = perceptual.distance(bank[:, 1].float() / 255, pairs.hr[:3].float() / 255)
    assert torch.allclose(real, away[:, 1], atol=0.03)  # made in bfloat16


def test_ranking_loss_by_hand():
    logits, away, scene = (
        torch.tensor([2.0, 1.0, 0.0]),
        torch.tensor([0.0, 0.5, 0.51]),
        torch.tensor([0, 0, 1]),
    )
    # (0, 1) must lead by 3.2 and leads by 1; (0, 2) by 3.26 and leads by 2; (1, 2) is too close to
    # be known
    loss, right = experts.ranking_loss(logits, away)
    assert float(loss) == pytest.approx((2.2 + 1.26) / 2, abs=1e-5) and float(right) == 1
    assert float(experts.ranking_loss(logits, away, scene)[0] - loss) == pytest.approx(
        2.2, abs=1e-5
    )  # the pair of one scene again
    assert float(experts.ranking_loss(-logits, away)[1]) == 0
    assert float(experts.ranking_loss(logits, torch.zeros(3))[0]) == 0  # nothing is known


# ---------------------------------------------------------------- spoilt pictures


@pytest.mark.parametrize("kind", [k for k in experts.KINDS if k != "guided"])
def test_more_severity_is_farther_from_the_original(vq, pairs, kind):
    hr, lr = (t[:2].float() / 255 for t in (pairs.hr, pairs.lr))
    g = torch.Generator().manual_seed(0)
    mild, bad = (experts.spoil(kind, s, hr, lr, vq, g) for s in (0.1, 0.9))
    assert mild.shape == hr.shape and 0 <= float(bad.min()) and float(bad.max()) <= 1
    assert perceptual.distance(bad, hr).mean() > perceptual.distance(mild, hr).mean() + 0.02


def test_guided_pictures_use_the_guided_decoder(vq, pairs):
    hr, lr = (t[:1].float() / 255 for t in (pairs.hr, pairs.lr))
    guided = weights.load(WEIGHTS / "guided.safetensors")
    y = experts.spoil("guided", 0.0, hr, lr, vq, torch.Generator(), guided)
    plain = experts.spoil("codes", 0.0, hr, lr, vq, torch.Generator())
    assert torch.allclose(plain, vq.decode(vq.encode(hr)), atol=1e-6) and not torch.allclose(
        y, plain, atol=1e-2
    )


def test_unknown_kind_is_named(vq, pairs):
    x = pairs.hr[:1].float() / 255
    with pytest.raises(ValueError, match="no kind 'fog'; choose one of codes, near codes"):
        experts.spoil("fog", 0.5, x, x, vq, torch.Generator())


def test_regions_and_neighbours(tiny):
    vq, g = tiny[0], torch.Generator().manual_seed(0)
    codes = torch.full((1, 16, 16), 64)  # no code of the codebook: whatever is replaced shows
    assert (experts._region(codes, 0.25, 64, g) != 64).sum() == 64
    codes = torch.randint(0, 64, (1, 16, 16), generator=g)
    near = experts._near(codes, 0.0, vq, g)
    assert 0.1 < float((near != codes).float().mean()) < 0.3
    cosine = (
        vq.quantize.embed(codes)[0].flatten(1).T
        @ torch.nn.functional.normalize(vq.quantize.weight, dim=1).T
    )
    rank = (cosine > cosine.gather(1, near.view(-1, 1)) + 1e-6).sum(
        1
    )  # how many codes are closer, itself among them
    assert int(rank.max()) <= 2


# ---------------------------------------------------------------- pyiqa's metrics


def test_piqe_needs_no_file_and_prefers_the_sharp_picture(pairs):
    piqe, hr = experts.load_expert("piqe"), pairs.hr[:3].float() / 255
    blurred = degradation.blur(
        hr, degradation.gaussian_kernel(13, 2.0, 2.0, 0.0).expand(3, -1, -1)
    ).clamp(0, 1)
    score = piqe(torch.cat([hr, blurred, torch.zeros(1, 3, 128, 128)]))
    assert score.shape == (7,) and (score[:3] > score[3:6]).all() and score[6] == 0
    assert torch.allclose(score[:3], 1 - piqe.raw(hr)["piqe"] / 100)


@pytest.mark.filterwarnings("ignore:cov")
def test_niqe_reads_its_file_and_a_flat_picture_does_not_take_the_batch(hub, pairs):
    (hub / "pyiqa").mkdir()
    scipy.io.savemat(
        hub / "pyiqa" / "niqe_modelparameters.mat",
        {"mu_prisparam": np.full((1, 36), 0.8), "cov_prisparam": np.eye(36)},
    )
    niqe, x = (
        experts.load_expert("niqe"),
        torch.cat([pairs.hr[:2].float() / 255, torch.full((1, 3, 128, 128), 0.5)]),
    )
    score = niqe(x)
    assert score.shape == (3,) and (score[:2] > 0).all() and score[2] == 0
    assert torch.allclose(score[:2], niqe(x[:2])) and torch.allclose(
        score[:2], (40 - niqe.raw(x[:2])["niqe"]) / 38
    )
    with pytest.raises(ValueError, match="NIQE needs pictures of 96 px or more, got 64x64"):
        niqe(x[..., :64, :64])


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("brisque", ["brisque_svm_weights.pth"]),
        (
            "paper",
            [
                "cfanet_nr_koniq_res50-9a73138b.pth",
                "musiq_koniq_ckpt-e95806b9.pth",
                "MANIQA_PIPAL-ae6d356b.pth",
                "RN50.pt",
                "timm/",
            ],
        ),
    ],
)
def test_absent_files_are_named_with_their_folder_and_not_downloaded(hub, monkeypatch, name, files):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: None)
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("a download was tried")
    )
    with pytest.raises(FileNotFoundError) as e:
        experts.load_expert(name)
    assert (
        all(f in str(e.value) for f in files)
        and str(hub) in str(e.value)
        and "\n" not in str(e.value)
    )
    assert not list(hub.iterdir())


def test_file_names_are_those_of_the_installed_pyiqa():
    from pyiqa.archs import brisque_arch, maniqa_arch, musiq_arch, niqe_arch, topiq_arch

    urls = {
        "niqe": niqe_arch.default_model_urls["niqe"],
        "brisque": brisque_arch.default_model_urls["url"],
        "topiq_nr": topiq_arch.default_model_urls["cfanet_nr_koniq_res50"],
        "musiq": musiq_arch.default_model_urls["koniq10k"],
        "maniqa-pipal": maniqa_arch.default_model_urls["pipal"],
    }
    for metric, url in urls.items():
        assert url.rsplit("/", 1)[1] == experts.METRICS[metric][2][0].removeprefix("pyiqa/")


def test_paper_expert_is_the_mean_of_four_scaled_metrics(monkeypatch):
    import pyiqa

    values = {"topiq_nr": 0.8, "musiq": 60.0, "maniqa-pipal": 0.6, "clipiqa": 0.4}
    monkeypatch.setattr("realsr_r1.experts.missing_files", lambda metric: [])
    monkeypatch.setattr(
        pyiqa, "create_metric", lambda m, device: lambda x: torch.full((len(x), 1), values[m])
    )
    assert experts.load_expert("paper")(torch.rand(3, 3, 32, 32)).tolist() == pytest.approx(
        [0.6] * 3
    )


def test_better_values_never_score_lower():
    for metric, (zero, one, _files) in experts.METRICS.items():
        expert = experts.PyiqaExpert.__new__(experts.PyiqaExpert)
        expert.device = torch.device("cpu")
        steps = torch.linspace(-0.5, 1.5, 9)
        expert.metrics = {
            metric: lambda x, zero=zero, one=one, steps=steps: zero + (one - zero) * steps
        }
        score = expert(torch.rand(9, 3, 128, 128))
        assert (
            (score.diff() >= 0).all()
            and score[0] == 0
            and score[-1] == 1
            and score[4] == pytest.approx(0.5)
        )


# ---------------------------------------------------------------- loading and calibration


def test_wrong_names_and_files_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(
        ValueError, match="no expert 'lpips'; choose one of nano, niqe, brisque, piqe, paper"
    ):
        experts.load_expert("lpips")
    with pytest.raises(FileNotFoundError, match=r"weights expert\.safetensors are missing"):
        experts.load_expert("nano", path=tmp_path / "expert.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer\.safetensors are not the nano expert's"):
        experts.load_expert("nano", path=WEIGHTS / "tokenizer.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((WEIGHTS / "expert.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short or damaged"):
        experts.load_expert("nano", path=tmp_path / "cut.safetensors")


def test_pairs_in_order_by_hand():
    scores = torch.tensor(
        [[0.9, 0.5], [0.6, 0.5], [0.7, 0.1]]
    )  # three levels of two scenes; a tie is not in order
    assert experts.in_order(scores) == (4, 6)
    away = torch.tensor(
        [[0.0, 0.0], [0.5, 0.01], [0.4, 0.6]]
    )  # LPIPS knows 0<1, 0<2 of the first scene, 0<2, 1<2 of the second
    assert experts.in_order(scores, away) == (4, 4)

    def brightness(x):
        return x.mean((1, 2, 3))

    ladder = torch.stack([torch.full((2, 3, 8, 8), v) for v in (0.9, 0.5, 0.6)])
    assert experts.ordered_pairs(brightness, ladder) == pytest.approx(2 / 3)


def test_spearman():
    assert experts.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert experts.spearman(torch.tensor([1.0, 2, 3]), [3, 2, 1]) == pytest.approx(-1)
    assert experts.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_an_expert_that_likes_everything_orders_nothing(tiny, pairs):
    report = experts.calibrate(lambda x: torch.ones(len(x)), few(pairs, 1), tiny[0], levels=(0.5,))
    assert report["ordered"] == 0 and report["ordered_all"] == 0 and report["spearman"] == 0
