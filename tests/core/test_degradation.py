"""The second form's degradation: replayable draws, and labels that say what can be seen."""

from collections import Counter

import pytest
import torch

from realsr_r1 import degradation as D
from realsr_r1.photographs import Pairs, load


@pytest.fixture(scope="module")
def hr() -> torch.Tensor:
    return Pairs(load("val"), training=False, labels=False)[3]["hr"].float() / 255


def resize(n: int, **more) -> dict:
    return {"op": "resize", "size": [n, n], "mode": "area", **more}


def noise(sigma: float, gray: bool = False) -> dict:
    return {"op": "noise", "kind": "gaussian", "sigma": sigma, "gray": gray, "seed": 1}


def gauss(sigma: float) -> dict:
    shape = {"sigma_x": sigma, "sigma_y": sigma, "theta": 0.0, "beta": 1.0}
    return {"op": "blur", "kernel": "iso", "size": 33, **shape}


@pytest.mark.parametrize("preset", D.PRESETS)
def test_a_draw_replays_bit_for_bit(preset, hr):
    batch = hr[None].expand(3, -1, -1, -1)
    one = D.degrade(batch, preset, torch.Generator().manual_seed(5))
    assert one.lr.shape == (3, 3, 32, 32) and 0 <= one.lr.min() <= one.lr.max() <= 1
    assert torch.equal(D.apply(batch, one.draws), one.lr)
    assert torch.equal((one.lr * 255).round() / 255, one.lr)
    assert [D.label(x, d) for x, d in zip(batch, one.draws, strict=True)] == one.labels
    other = D.degrade(batch, preset, torch.Generator().manual_seed(6))
    assert not torch.equal(other.lr, one.lr)


def test_noise_that_jpeg_or_a_resize_took_away_does_not_count(hr):
    last = resize(32, final=True)
    plain = D.visible(hr, [resize(32), noise(12.0), last])["noise"]
    assert plain == pytest.approx(12, rel=0.15)
    averaged = D.visible(hr, [noise(12.0), last])["noise"]  # 16 pixels become one
    assert averaged == pytest.approx(3, rel=0.25)
    saved = D.visible(hr, [resize(32), noise(4.0), last, {"op": "jpeg", "quality": 15}])["noise"]
    assert saved < D.visible(hr, [resize(32), noise(4.0), last])["noise"]


def test_labels_by_replay_are_monotonous(hr):
    last = resize(32, final=True)
    blurs = [D.visible(hr, [gauss(s), last])["blur"] for s in (0.5, 2.0, 4.0, 6.0)]
    noises = [D.visible(hr, [last, noise(s)])["noise"] for s in (2, 6, 12, 24)]
    saves = [
        D.visible(hr, [last, {"op": "jpeg", "quality": q}])["compression"] for q in (95, 75, 45, 18)
    ]
    for values in (blurs, noises, saves):
        assert values == sorted(values) and values[0] < values[-1]
    assert D.label(hr, [last]) == {
        "blur": "no",
        "resize": "downsample",
        "noise": "no",
        "compression": "no",
        "final_resize": "downsample",
    }


def test_blur_on_a_flat_picture_cannot_be_seen():
    flat = torch.full((3, 128, 128), 0.4)
    assert D.visible(flat, [gauss(5.0), resize(32)])["blur"] < 0.05


def test_resizes_are_told_apart(hr):
    ops = [resize(160), resize(32, final=True)]
    assert D.label(hr, ops)["resize"] == "upsample"
    ops = [resize(24), resize(32, final=True)]
    assert (D.label(hr, ops)["resize"], D.label(hr, ops)["final_resize"]) == (
        "downsample",
        "upsample",
    )
    ops = [resize(128), resize(32, final=True)]
    assert D.label(hr, ops)["resize"] == "keep"


def test_every_level_of_every_label_is_frequent():
    """None is constant, none rarer than an eighth: no reward for saying always the same."""
    data = Pairs(load("train"), seed=11)
    labels = [D.from_words(data[i]["degradation"]) for i in range(160)]
    for name in D.LABELS:
        scale = D.RESIZES if "resize" in name else D.LEVELS
        share = Counter(x[name] for x in labels)
        assert all(share[level] >= 160 / 8 for level in scale), (name, share)


def test_severities_are_ordered(hr):
    batch = hr[None].expand(24, -1, -1, -1)
    off = [
        float((D.degrade(batch, f"nano-{s}").lr - D.apply(batch[:1], [[resize(32)]])).abs().mean())
        for s in ("light", "medium", "heavy")
    ]
    assert off == sorted(off) and off[2] > 1.5 * off[0]


def test_gray_poisson_noise_counts_8_bit_values():
    """Real-ESRGAN counts distinct values after rounding; on unrounded gray the counts explode and
    the noise all but vanishes."""
    x = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    op = {"op": "noise", "kind": "poisson", "scale": 2.0, "seed": 0}
    gray, color = (float(D.noise_for(x, op | {"gray": g}).std()) for g in (True, False))
    assert 0.5 < gray / color < 2


def test_the_final_sinc_filter_has_the_range_of_real_esrgan():
    g = torch.Generator().manual_seed(0)
    draws = [D.draw((128, 128), D.PRESETS["paper"], g) for _ in range(200)]
    omegas = [op["omega"] for d in draws for op in d if op["op"] == "sinc"]
    assert len(omegas) > 100 and min(omegas) >= torch.pi / 3


def test_words_and_back():
    labels = {
        "blur": "medium",
        "resize": "downsample",
        "noise": "heavy",
        "compression": "light",
        "final_resize": "upsample",
    }
    words = D.to_words(labels)
    assert words == "medium blur, downsample, heavy noise, light compression, upsample"
    assert D.from_words(words) == labels
    assert D.from_words("heavy blur, keep, no grain, light compression") == {
        "blur": "heavy",
        "resize": "keep",
        "compression": "light",
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: D.degrade(x, "worst"), "no preset 'worst'; choose one of paper"),
        (lambda x: D.degrade(x[..., :126]), "does not divide by 4"),
        (lambda x: D.apply(x, []), "1 images need as many draws, got 0"),
        (lambda x: D.degrade(x[0]), r"expected a tensor of images \(b, 3, h, w\)"),
        (lambda x: D.degrade(x[:0]), "expected a tensor of images"),
        (lambda x: D.degrade(x.numpy()), "torch.as_tensor"),
        (lambda x: D.degrade(x * 255), "scale the images first"),
        (lambda x: D.degrade(x * 2 - 1), "scale the images first"),
        (lambda x: D.degrade(x * torch.nan), "scale the images first"),
        (lambda x: D.degrade((x * 255).int()), "scale the images first"),
        (lambda x: D.apply(x, [[{"op": "melt"}]]), "unknown operation 'melt'"),
    ],
)
def test_bad_input_gets_one_sentence(call, message, hr):
    with pytest.raises(ValueError, match=message):
        call(hr[None])


def test_the_smallest_pictures_have_labels_too():
    for side in (4, 8):
        hr = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(side))
        found = D.degrade(hr, "nano", torch.Generator().manual_seed(0))
        assert found.lr.shape == (1, 3, side // 4, side // 4)
        assert set(found.labels[0]) == set(D.LABELS)


def test_bytes_are_divided_by_255(hr):
    pixels = (hr[None] * 255).round().byte()
    one, other = (D.degrade(x, "nano") for x in (pixels, pixels / 255))
    assert torch.equal(one.lr, other.lr)


def test_a_pick_is_torchs_multinomial():
    """The same numbers, so that what a seed draws stays what it was."""
    one, two = (torch.Generator().manual_seed(3) for _ in "ab")
    p, dice = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64), D._Dice(one)
    picked = [dice.pick("abcd", p.tolist()) for _ in range(500)]
    assert picked == ["abcd"[int(torch.multinomial(p, 1, generator=two))] for _ in range(500)]
    assert set(picked) == set("abd")


@pytest.mark.parametrize("size", [(37, 50), (128, 128)])
def test_blur_is_the_plain_convolution(size):
    """What wraps around in the spectrum must not show at any edge."""
    g = torch.Generator().manual_seed(0)
    x, k = torch.rand(2, 3, *size, generator=g), torch.rand(2, 21, 21, generator=g)
    padded = torch.nn.functional.pad(x, (10, 10, 10, 10), mode="replicate")
    want = [
        torch.nn.functional.conv2d(one[:, None], kernel[None, None])[:, 0]
        for one, kernel in zip(padded, k, strict=True)
    ]
    torch.testing.assert_close(D.blur(x, k), torch.stack(want), atol=1e-4, rtol=1e-5)
