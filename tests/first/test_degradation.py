import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realsr_r1.first import degradation as D


def photo(n=2, size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(
        torch.rand((n, 3, 8, 8), generator=g), size=size, mode="bicubic"
    ).clamp(0, 1)


def test_isotropic_kernel_by_hand():
    k = D.gaussian_kernel(3, 1.0, 1.0, 0.0)
    e = math.exp(-0.5)
    total = 1 + 4 * e + 4 * e * e
    assert torch.allclose(
        k, torch.tensor([[e * e, e, e * e], [e, 1, e], [e * e, e, e * e]]) / total, atol=1e-6
    )


@pytest.mark.parametrize("kind", D.KERNELS)
def test_kernels_sum_to_one_and_turn_with_theta(kind):
    k = D.gaussian_kernel(21, 3.0, 1.0, 0.0, kind, 1.3)
    assert float(k.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(D.gaussian_kernel(21, 3.0, 1.0, math.pi / 2, kind, 1.3), k.T, atol=1e-6)


def test_sinc_rings_and_narrows_with_its_cutoff():
    k = D.sinc_kernel(21, math.pi / 3)
    assert float(k.min()) < 0 and float(k.sum()) == pytest.approx(1, abs=1e-5)
    assert D.sinc_kernel(21, 2.5)[10, 10] > k[10, 10]


def test_blur_equals_direct_convolution():
    x = photo()
    k = torch.stack([D.gaussian_kernel(7, 2, 1, 0.4), D.sinc_kernel(7, 2.0)])
    padded = torch.nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")
    direct = torch.stack(
        [
            torch.nn.functional.conv2d(p[:, None], w[None, None])[:, 0]
            for p, w in zip(padded, k, strict=True)
        ]
    )
    assert torch.allclose(D.blur(x, k), direct, atol=1e-5)


def test_radius_of_a_wide_gaussian_is_its_sigma():
    op = {
        "op": "blur",
        "kernel": "iso",
        "size": 21,
        "sigma_x": 2.0,
        "sigma_y": 2.0,
        "theta": 0.0,
        "beta": 1.0,
    }
    assert D.kernel_radius(op) == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize("preset", D.PRESETS)
def test_recorded_draw_replays_bit_for_bit(preset):
    hr = photo(6)
    first = D.degrade(hr, preset, torch.Generator().manual_seed(3))
    assert first.lr.shape == (6, 3, 16, 16)
    stored = json.loads(json.dumps(first.draws))
    assert torch.equal(D.apply(hr, stored), first.lr)
    # ... also alone, out of its batch
    assert torch.equal(D.apply(hr[4:5], [json.loads(json.dumps(first.draws[4]))])[0], first.lr[4])
    again = D.degrade(hr, preset, torch.Generator().manual_seed(3))
    assert torch.equal(again.lr, first.lr) and again.labels == first.labels
    assert not torch.equal(D.degrade(hr, preset, torch.Generator().manual_seed(4)).lr, first.lr)


def test_no_global_random_state_is_used():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    D.degrade(photo(), "paper", torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_lr_is_eight_bit():
    lr = D.degrade(photo(), "paper").lr * 255
    assert torch.allclose(lr, lr.round(), atol=1e-4) and lr.min() >= 0 and lr.max() <= 255


def chain(sigma=0.1, noise=0.0, quality=None, mid=(16, 16)):
    ops = [
        {
            "op": "blur",
            "kernel": "iso",
            "size": 41,
            "sigma_x": sigma,
            "sigma_y": sigma,
            "theta": 0.0,
            "beta": 1.0,
        },
        {"op": "resize", "size": list(mid), "mode": "area"},
    ]
    ops.append(
        {"op": "noise", "kind": "gaussian", "sigma": noise, "gray": False, "seed": 1, "std": noise}
    )
    if quality is not None:
        ops.append({"op": "jpeg", "quality": quality})
    return [*ops, {"op": "resize", "size": [16, 16], "mode": "area", "final": True}]


@pytest.mark.parametrize(
    ("args", "label", "value"),
    [
        ({"sigma": 0.4}, "blur", "no"),
        ({"sigma": 2.0}, "blur", "light"),  # 2 px at 64 px is 0.5 px at 16 px
        ({"sigma": 3.6}, "blur", "medium"),
        ({"sigma": 6.0}, "blur", "heavy"),
        ({"noise": 1.0}, "noise", "no"),
        ({"noise": 5.0}, "noise", "light"),
        ({"noise": 18.0}, "noise", "medium"),
        ({"noise": 40.0}, "noise", "heavy"),
        ({"noise": 40.0, "mid": (64, 64)}, "noise", "light"),  # averaged away by the later ×1/4: 10
        ({}, "compression", "no"),
        ({"quality": 80}, "compression", "light"),
        ({"quality": 40}, "compression", "medium"),
        ({"quality": 10}, "compression", "heavy"),
        ({"mid": (16, 16)}, "final_resize", "keep"),
        ({"mid": (12, 12)}, "final_resize", "upsample"),
        ({"mid": (24, 24)}, "final_resize", "downsample"),
        ({"mid": (96, 96)}, "resize", "upsample"),
        ({"mid": (64, 64)}, "resize", "keep"),
    ],
)
def test_label_thresholds(args, label, value):
    assert D.label(chain(**args), (64, 64))[label] == value


def test_nano_levels_are_about_balanced():
    labels = D.degrade(photo(400, 32), "nano", torch.Generator().manual_seed(0)).labels
    for name in ("blur", "noise", "compression"):
        for level in D.LEVELS:
            assert 0.12 < sum(x[name] == level for x in labels) / 400 < 0.4, (name, level)


def test_severe_is_worse_than_mild():
    hr = photo(16)
    small = torch.nn.functional.interpolate(hr, size=16, mode="area")
    error = {
        p: float((D.degrade(hr, p, torch.Generator().manual_seed(0)).lr - small).abs().mean())
        for p in ("mild", "severe")
    }
    assert error["severe"] > 1.5 * error["mild"]


def test_words_as_in_the_paper():
    text = "medium blur, downsample, heavy noise, light compression, upsample"
    labels = {
        "blur": "medium",
        "resize": "downsample",
        "noise": "heavy",
        "compression": "light",
        "final_resize": "upsample",
    }
    assert D.to_words(labels) == text and D.from_words(text) == labels


@given(
    st.lists(st.sampled_from(D.LEVELS), min_size=3, max_size=3),
    st.sampled_from(D.RESIZES),
    st.sampled_from(D.RESIZES),
)
def test_words_round_trip(levels, first, last):
    labels = dict(zip(D.LABELS, (levels[0], first, levels[1], levels[2], last), strict=True))
    assert D.from_words(D.to_words(labels)) == labels


@given(st.text(max_size=60))
@settings(max_examples=60)
def test_nonsense_words_never_raise(text):
    assert set(D.from_words(text)) <= set(D.LABELS)


def test_swapped_words_do_not_count():
    assert "blur" not in D.from_words(
        "heavy noise, downsample, medium blur, light compression, upsample"
    )


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="no preset 'papre'"):
        D.degrade(photo(), "papre")
    with pytest.raises(ValueError, match="does not divide by the scale 4"):
        D.degrade(torch.rand(1, 3, 30, 30))
    with pytest.raises(ValueError, match="unknown operation"):
        D.apply(photo(1), [[{"op": "melt"}]])
