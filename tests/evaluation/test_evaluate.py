import numpy as np
import pytest
import torch

import realsr_r1.first.restore as R
from realsr_r1 import images as viz
from realsr_r1 import perceptual
from realsr_r1.evaluation import results as evaluate
from realsr_r1.first import degradation, probe, scenes, tokenizer, vlcot


def test_bootstrap_of_a_constant_and_of_a_coin():
    assert evaluate.bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    mean, lo, hi = evaluate.bootstrap(np.array([0.0, 1.0] * 200))
    assert (
        mean == 0.5
        and lo == pytest.approx(0.45, abs=0.015)
        and hi == pytest.approx(0.55, abs=0.015)
    )
    assert evaluate.bootstrap([1.0, 0.0, 1.0]) == evaluate.bootstrap([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="non-empty"):
        evaluate.bootstrap([])


def test_psnr_by_hand():
    x = torch.zeros(1, 3, 4, 4)
    assert float(perceptual.psnr(x, x + 0.1)) == pytest.approx(20.0, abs=1e-4)


def test_text_scores_of_a_true_and_a_false_chain(pairs):
    scene, labels = pairs.scenes[0], pairs.labels[0]
    rough, middle, final = scene.captions
    from realsr_r1.first import degradation

    true = vlcot.Chain(degradation.to_words(labels), rough, None, middle, None, final, None)
    assert set(evaluate.text_scores(true, scene, labels).values()) == {1.0}
    false = vlcot.Chain("nonsense", "a thing", None, None, None, None, None)
    assert set(evaluate.text_scores(false, scene, labels).values()) == {0.0}


def test_first_results_end_to_end_in_small(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.weights, "WEIGHTS", tmp_path / "none")
    models = R.Models(tiny[0], tiny[1], tokenizer.GuidedDecoder(width=16, blocks=1).eval(), tiny[2])
    record = evaluate.first_results(models, tmp_path, n=6, cnn_pairs=24, cnn_steps=2)
    table = (tmp_path / "results.md").read_text()
    assert "| bicubic |" in table and "| category |" in table and "95% bootstrap" in table
    assert len(record["pictures"]["bicubic"]["LPIPS"]) == 6 and record["valid"] == [0.0] * 6
    assert (tmp_path / "contact_sheet.webp").exists() and (tmp_path / "results.json").exists()


def test_labelnet_learns_what_pixels_show():
    # Grey pictures with four plain strengths of noise, labelled by it: a few steps must name it on
    # pictures never seen.
    def grey(n, seed):
        g = torch.Generator().manual_seed(seed)
        level = torch.arange(n) % 4
        lr = (
            (128 + 12 * level.view(-1, 1, 1, 1) * torch.randn(n, 3, 32, 32, generator=g))
            .clamp(0, 255)
            .byte()
        )
        labels = [
            {
                k: (degradation.RESIZES if "resize" in k else degradation.LEVELS)[0]
                for k in degradation.LABELS
            }
            | {"noise": degradation.LEVELS[i]}
            for i in level
        ]
        return scenes.Pairs(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), lr, labels, [])

    net = probe.train_labelnet(grey(64, 0), steps=80, batch=32, device="cpu")
    assert probe.label_accuracy(net, grey(40, 1))["noise"].mean() > 0.9


def test_grid_places_every_image():
    picture = viz.grid(
        [[torch.ones(3, 8, 8), torch.zeros(3, 8, 16)]],
        ["one", "two with a long heading that wraps"],
        side=32,
    )
    assert picture.size == (2 * 38 + 6, 26 + 38 + 6)
    assert picture.getpixel((6 + 38 + 16, 26 + 6 + 16)) == (0, 0, 0)
