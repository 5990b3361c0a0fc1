import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import realsr_r1.first.restore as R
from realsr_r1.first import policy, scenes, tokenizer, vlcot
from realsr_r1.first import weights as weights_io
from realsr_r1.first.__main__ import main


@pytest.fixture(scope="module")
def models(tiny):
    return R.Models(tiny[0], tiny[1], tokenizer.GuidedDecoder(width=16, blocks=1).eval(), tiny[2])


def noise_photo(w, h, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (h, w, 3), np.uint8))


def smooth_photo(w, h):
    return noise_photo(4, 4).resize((w, h), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 56, 57, 100, 1024])
def test_tiles_cover_everything_and_overlap(length):
    starts = R.tile_origins(max(length, 32))
    assert starts[0] == 0 and starts[-1] + 32 == max(length, 32)
    assert all(0 < b - a <= R.STRIDE for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (32, 32), (50, 37)])
def test_any_size_comes_out_four_times_larger(models, size):
    out, trace = R.restore(noise_photo(*size), models, progress=False)
    assert out.size == (4 * size[0], 4 * size[1]) and out.mode == "RGB" and trace["complete"]
    for tile in trace["tiles"]:
        assert all(tile[t] is not None for t in vlcot.TAGS)
        assert [len(tile[t]) for t in vlcot.IMAGE_TAGS] == [4, 8, 16]
    json.dumps(trace)


def test_same_seed_same_picture_whatever_the_batch_before(models):
    photo = noise_photo(40, 40)
    a, b, c = (np.asarray(R.restore(photo, models, seed=s, progress=False)[0]) for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_tiles_blend_without_seams(models, monkeypatch):
    # A decoder that returns the upsampled tile must give the upsampled photo, whatever the weights
    # of the blend.
    photo = smooth_photo(75, 60)
    monkeypatch.setattr(
        R,
        "decode_final",
        lambda m, c, lr, d: torch.nn.functional.interpolate(lr, scale_factor=4, mode="nearest"),
    )
    out, _ = R.restore(photo, models, progress=False)
    nearest = photo.resize((300, 240), Image.Resampling.NEAREST)
    assert np.abs(np.asarray(out).astype(int) - np.asarray(nearest)).max() <= 1


def test_wavelet_fix_takes_colour_from_the_reference_and_detail_from_the_restored():
    detail = torch.rand(1, 3, 64, 64)
    reference = torch.full((1, 3, 64, 64), 0.5)
    fixed = R.wavelet_color_fix(detail * 0.2 + 0.7, reference)
    assert abs(float(fixed.mean()) - 0.5) < 0.01
    assert torch.corrcoef(torch.stack([fixed.flatten(), detail.flatten()]))[0, 1] > 0.95


def test_ctrl_c_keeps_what_is_done(models, monkeypatch):
    real, calls = R.think, []

    def interrupted(*a, **k):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(R, "think", interrupted)
    monkeypatch.setattr(R, "workers_on", lambda device: 1)
    out, trace = R.restore(smooth_photo(60, 60), models, batch=2, progress=False)
    assert out.size == (240, 240) and not trace["complete"] and len(trace["tiles"]) == 2
    assert np.asarray(out)[-40:, -40:].std() > 0  # the rest is the bicubic picture, not black


def test_out_of_memory_halves_the_batch(models, monkeypatch):
    real, seen = R.think, []

    def small_only(m, lr, how, g, direct=False):
        seen.append(len(lr))
        if len(lr) > 1:
            raise torch.OutOfMemoryError("too much")
        return real(m, lr, how, g)

    monkeypatch.setattr(R, "think", small_only)
    out, trace = R.restore(smooth_photo(40, 40), models, batch=8, progress=False)
    assert trace["complete"] and sorted(seen) == [1, 1, 1, 1, 2, 2] and out.size == (160, 160)


def test_batches_are_even_cover_all_and_come_in_twos():
    for n, most in itertools.product((1, 2, 9, 25, 81, 100), (1, 16, 48)):
        jobs = R.even_batches(n, most)
        assert [i for a, b in jobs for i in range(a, b)] == list(range(n))
        sizes = [b - a for a, b in jobs]
        assert (
            max(sizes) <= most
            and max(sizes) - min(sizes) <= 1
            and (len(jobs) % 2 == 0 or n == 1 or len(jobs) == n)
        )


def test_two_workers_make_what_one_makes(models, monkeypatch):
    photo, made = noise_photo(60, 60), []
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # so that only the workers differ, not the order in which a matrix product is summed
    for workers in (1, 2):
        monkeypatch.setattr(R, "workers_on", lambda device, workers=workers: workers)
        made.append(R.restore(photo, models, batch=1, progress=False))
    torch.set_num_threads(threads)
    assert made[0][1] == made[1][1] and np.array_equal(*(np.asarray(m[0]) for m in made))


def test_too_large_a_photo_is_refused_with_an_estimate(models):
    with pytest.raises(ValueError, match=r"8000x6000 pixels needs \d+ tiles \(about \d+ minutes"):
        R.restore(Image.new("RGB", (8000, 6000)), models)


def test_package_name_can_be_called(models):
    from realsr_r1.first import restore

    assert restore(noise_photo(8, 8), models, progress=False)[0].size == (32, 32)


@pytest.fixture
def weights(models, tmp_path):
    for name in ("tokenizer", "reader", "guided"):
        weights_io.save(getattr(models, name), tmp_path / "w" / f"{name}.safetensors")
    policy.save(models.policy, tmp_path / "w" / "policy-sft")
    return tmp_path / "w"


def test_command_line(weights, tmp_path, capsys):
    noise_photo(20, 12).save(tmp_path / "x.png")

    def go(*a):
        return main(["restore", *map(str, a), "--weights", str(weights), "--device", "cpu"])

    assert (
        go(
            tmp_path / "x.png",
            "-o",
            tmp_path / "y.png",
            "--trace",
            tmp_path / "t.json",
            "--seed",
            3,
        )
        == 0
    )
    trace = json.loads((tmp_path / "t.json").read_text())
    assert (
        Image.open(tmp_path / "y.png").size == (80, 48)
        and trace["settings"]["seed"] == 3
        and set(vlcot.TAGS) < set(trace["tiles"][0])
    )

    def fails(sentence, *a):
        capsys.readouterr()
        assert go(*a) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1 and "Traceback" not in err

    fails("output folder", tmp_path / "x.png", "-o", tmp_path / "no" / "y.png")
    fails("no picture suffix", tmp_path / "x.png", "-o", tmp_path / "y.doc")
    (tmp_path / "bad.png").write_bytes(b"GIF89a??")
    fails("not an image", tmp_path / "bad.png", "-o", tmp_path / "y.png")
    Image.new("L", (8000, 6000)).save(tmp_path / "large.png")
    fails("scale it down", tmp_path / "large.png", "-o", tmp_path / "y.png")
    (weights / "reader.safetensors").unlink()
    fails("reader.safetensors are missing", tmp_path / "x.png", "-o", tmp_path / "y.png")


def test_read_only_folder(tmp_path, monkeypatch, models):
    noise_photo(8, 8).save(tmp_path / "x.png")

    def refuse(*a, **k):
        raise PermissionError(
            "read-only"
        )  # as for a folder without write permission; a test as root would not see one

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(ValueError, match="cannot be written"):
        R.restore_file(tmp_path / "x.png", tmp_path / "y.png", models=models)


def test_tokenizer_and_policy_must_belong_together(weights, tiny):
    other = tokenizer.VQModel(
        tokenizer.TokenizerConfig(codes=48, base=32, multiplier=(1, 1), latent=32)
    )
    weights_io.save(other, weights / "tokenizer.safetensors")
    with pytest.raises(ValueError, match="do not belong together"):
        R.load_models("cpu", weights)


@pytest.mark.parametrize("command", [[], ["restore"], ["train"]])
def test_help(command):
    done = subprocess.run(
        [sys.executable, "-m", "realsr_r1.first", *command, "--help"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0 and "usage:" in done.stdout


def test_shipped_weights_think_and_beat_bicubic(shipped):
    data = scenes.pairs(range(2_000_000, 2_000_016), "test")
    hr, lr = data.hr.float() / 255, data.lr.float() / 255
    chains = R.think(shipped, lr, generator=torch.Generator().manual_seed(0))
    assert all(c.complete for c in chains)
    from realsr_r1 import perceptual

    with torch.no_grad():
        ours = R.decode_final(shipped, torch.stack([c.final_image for c in chains]), lr)
    up = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert perceptual.distance(ours, hr).mean() < 0.75 * perceptual.distance(up, hr).mean()
