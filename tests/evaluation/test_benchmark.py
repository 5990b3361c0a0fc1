import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from realsr_r1 import degradation, photographs, vlcot
from realsr_r1.cli import main
from realsr_r1.evaluation import benchmark, metrics
from realsr_r1.evaluation import tables as benchtable
from realsr_r1.evaluation.sets import BenchSet, Item
from realsr_r1.pipeline import RealSR, Restoration
from realsr_r1.sampling import Sampling

CHEAP = ["psnr_rgb", "ssim_rgb"]


def nearest(lr):
    return F.interpolate(lr, scale_factor=4, mode="nearest")


def gray(lr):
    return nearest(lr) * 0 + 0.5


@pytest.fixture
def data():
    """Six pairs of three photos: HR random, LR its mean over 4×4, so that `nearest` is far better
    than `gray`."""
    items = []
    for i in range(6):
        blocks = torch.rand(3, 8, 8 + 4 * (i > 3), generator=torch.Generator().manual_seed(i))
        hr = (F.interpolate(blocks[None], scale_factor=4, mode="bilinear")[0] * 255).round() / 255
        lr = F.avg_pool2d(hr[None], 4)[0]
        items.append(Item(f"i/{i}", lambda pair=(lr, hr): pair, group=f"photo {i // 2}"))
    return BenchSet("toy", items, True, "toys")


@pytest.fixture
def run(data, tmp_path):
    def go(methods=None, measures=CHEAP, **options):
        places = {"out": tmp_path / "out", "cache": tmp_path / "cache"}
        chosen, options = options.pop("data", data), {"baseline": "gray", "device": "cpu"} | options
        settings = benchmark.Settings(**places | options)
        return benchmark.run(
            chosen, methods or {"gray": gray, "nearest": nearest}, measures, settings
        )

    return go


@pytest.fixture(scope="module")
def model() -> RealSR:
    return RealSR.from_pretrained("nano", "cpu")


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    """Three shipped test photographs, damaged."""
    found = photographs.Pairs(photographs.load("test")[:3], "nano-medium", training=False)
    return [found[i] for i in range(3)]


def item(pair: dict, photo: photographs.Photograph | None = None) -> Item:
    lr, hr = (pair[k].float() / 255 for k in ("lr", "hr"))
    return Item("x", lambda: (lr, hr), degradation.from_words(pair["degradation"]), photo)


# ---------------------------------------------------------------- the numbers


def test_scores_are_those_of_the_8_bit_outputs_and_intervals_are_over_photos(run, data, tmp_path):
    record = run()
    psnr = metrics.load("psnr_rgb")
    by_hand = [
        float(psnr((nearest(i.read()[0][None]) * 255).round() / 255, i.read()[1][None]))
        for i in data.items
    ]
    assert record["methods"]["nearest"]["scores"]["psnr_rgb"] == pytest.approx(by_hand, abs=1e-4)
    assert (
        record["ids"] == [i.id for i in data.items]
        and json.loads((tmp_path / "out" / "benchmark-toy.json").read_text(encoding="utf-8"))
        == record
    )
    with (tmp_path / "out" / "benchmark-toy.csv").open(encoding="utf-8-sig") as f:
        rows = {(r["method"], r["measure"]): r for r in csv.DictReader(f)}
    photos = np.array(by_hand).reshape(3, 2).mean(1)
    row, base = rows["nearest", "psnr_rgb"], rows["gray", "psnr_rgb"]
    assert float(row["mean"]) == pytest.approx(
        photos.mean(), abs=1e-4
    ) and photos.min() - 1e-4 <= float(row["low"])
    assert (
        float(row["difference"])
        == pytest.approx(float(row["mean"]) - float(base["mean"]), abs=1e-6)
        and base["difference"] == ""
    )
    assert float(rows["gray", "seconds_per_megapixel"]["mean"]) > 0


def test_memory_is_each_methods_own(run, monkeypatch):
    def heavy(lr):
        torch.ones(120 * 2**18).sum()  # 120 MiB for a moment
        return nearest(lr)

    record = run({"nearest": nearest, "heavy": heavy, "gray": gray})
    used = {name: m["megabytes"] for name, m in record["methods"].items()}
    assert (
        115 < used["heavy"] < 400 and used["gray"] < 60
    )  # what one has left behind does not count for the next


def test_unlike_timing_and_niqe_of_one_block_are_remarked(run, data):
    assert run()["remarks"] == []
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        record = run({"gray": gray, "nearest": nearest, "again": nearest})
    finally:
        torch.set_num_threads(threads)
    assert (
        len(record["remarks"]) == 1
        and f"again {record['methods']['again']['timed'][0]}." in record["remarks"][0]
    )
    assert (
        f", {threads + 1} threads" in record["remarks"][0]
        and "were not measured alike" in record["remarks"][0]
    )
    items = [
        Item("a", lambda: (torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(1)), None))
    ]
    noisy = {"gray": nearest, "nearest": nearest}
    (remark,) = run(noisy, data=BenchSet("small", items, False), measures=["niqe"])["remarks"]
    assert remark.startswith("niqe: in pictures of 120 px a side there is one row of blocks")
    items = [
        Item("a", lambda: (torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(1)), None))
    ]
    assert run(noisy, data=BenchSet("large", items, False), measures=["niqe"])["remarks"] == []


def test_a_photo_that_cannot_be_read_is_no_methods_fault(run, data):
    def damaged():
        raise ValueError("photo x.png is damaged")

    data.items[3] = Item("x", damaged)
    with pytest.raises(ValueError, match=r"^photo x\.png is damaged$"):
        run()


def test_the_table_says_everything(run, tmp_path):
    run(measures=["psnr_rgb", "brisque", "fid", "niqe"])
    text = (tmp_path / "out" / "benchmark-toy.md").read_text(encoding="utf-8")
    assert (
        "| method | psnr_rgb ↑ | s / megapixel | peak MB |" in text
        and "| minus gray, paired | psnr_rgb ↑ |" in text
    )
    assert (
        "brisque: skipped, files are missing" in text
        and "put brisque_svm_weights.pth in HUB/pyiqa." in text
    )
    assert "fid: skipped, fid needs 100 pictures or more, got 6" in text
    assert "niqe: skipped, of 12 pictures 12 are smaller than 96 px." in text
    assert "6 items in 3 groups" in text and "/torch/hub" not in text


def test_means_differences_and_marks_by_hand():
    found = benchtable.mean([1.0, 3.0, 5.0, None], ["a", "a", "b", "b"])
    assert found.mean == 3.0 and (found.low, found.high) == (2.0, 5.0)  # a, a or b, b
    alone = benchtable.mean([1.0, 2.0], ["a", "a"])
    assert (alone.low, alone.mean, alone.high) == (1.5, 1.5, 1.5)
    assert benchtable.mean([None], ["a"]) is None and benchtable.cell(None) == "–"
    assert benchtable.difference([1.0, None, 2.0], [0.5, 1.0, None]) == [0.5, None, None]
    up, groups = np.array([0.1, 0.2, 0.1, 0.3, 0.2]), list("abcde")
    marks = [benchtable.mark(d, groups, higher) for d in (up, -up) for higher in (True, False)]
    assert marks == [" ▲", " ▼", " ▼", " ▲"]
    assert benchtable.mark(up - 0.18, groups, True) == ""  # over zero
    assert benchtable.mark(up[:4], groups[:4], True) == ""  # too few
    assert benchtable.mark(up, list("abcdd"), True) == ""


def test_digits_are_those_of_the_largest_number_of_any_method():
    for values in ([0.5], [12.5]), ([12.5], [0.5]):
        methods = {n: {"scores": {"lpips": v}} for n, v in zip("ab", values, strict=True)}
        assert benchtable.form_of("lpips", methods) == ".2f"


def test_pictures_without_a_number_are_left_out_and_counted(run, data, monkeypatch):
    monkeypatch.setitem(
        metrics.METRICS,
        "psnr_rgb",
        metrics.METRICS["psnr_rgb"].__class__("", "psnr", True, True, 33, options=metrics.RGB),
    )
    record = run()  # HR is 32 px high: all are too small
    assert (
        "psnr_rgb" not in record["methods"]["gray"]["scores"]
        and "12 are smaller than 33 px" in record["skipped"]["psnr_rgb"]
    )
    data.items[0] = Item("large", lambda: (torch.rand(3, 9, 9), torch.rand(3, 36, 36)))
    record = run()
    assert (
        record["methods"]["gray"]["scores"]["psnr_rgb"][1:] == [None] * 5
        and record["methods"]["gray"]["scores"]["psnr_rgb"][0] > 0
    )
    assert record["remarks"] == [
        "psnr_rgb: of 12 pictures 10 are smaller than 33 px, and are left out."
    ]


def test_a_set_without_originals_has_blind_scores_only(run):
    items = [
        Item(
            str(i),
            lambda i=i: (torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(i)), None),
        )
        for i in range(2)
    ]
    record = run(data=BenchSet("blind", items, False), measures=["psnr_y", "piqe"])
    assert list(record["methods"]["gray"]["scores"]) == ["piqe"]
    assert record["skipped"] == {"psnr_y": "skipped, it compares with originals and blind has none"}


def test_fid_is_computed_once_for_each_method_of_enough_pictures(run, data, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(metrics, "check_fid", lambda n: None)
    monkeypatch.setattr(
        metrics, "fid", lambda a, b, device: calls.append((a, b)) or float(len(calls))
    )
    record = run(measures=["psnr_rgb", "fid"])
    assert [m["fid"] for m in record["methods"].values()] == [1.0, 2.0] and "biased" in record[
        "remarks"
    ][0]
    outputs, originals = calls[1]
    assert [np.asarray(Image.open(f)).shape for f in outputs] == [
        np.asarray(Image.open(f)).shape for f in originals
    ]
    assert np.array_equal(
        np.asarray(Image.open(originals[2])),
        (data.items[2].read()[1] * 255).round().byte().permute(1, 2, 0).numpy(),
    )
    assert run(measures=["fid", "psnr_rgb"])["methods"]["nearest"]["fid"] == 2.0 and len(calls) == 2
    assert "| fid ↓ |" in (tmp_path / "out" / "benchmark-toy.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- going on


def test_an_interrupted_run_goes_on_and_does_nothing_twice(run, monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH", 2)
    seen = []

    def slow(lr):
        if len(seen) == 2:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append(len(lr))
        return nearest(lr)

    with pytest.raises(KeyboardInterrupt):
        run({"gray": gray, "slow": slow})
    record = run({"gray": gray, "slow": slow})
    assert seen == [2, 2, "stopped", 2]  # 4 pictures of one size, then 2 of another
    assert (
        record["methods"]["slow"]["scores"]
        == run({"gray": gray, "slow": nearest})["methods"]["slow"]["scores"]
        and len(seen) == 4
    )


def test_scores_are_kept_and_a_new_metric_does_not_restore_again(run, monkeypatch):
    run(measures=["psnr_rgb"])
    broken = {name: lambda lr: pytest.fail("restored again") for name in ("gray", "nearest")}
    loaded = []
    load = metrics.load
    monkeypatch.setattr(
        metrics, "load", lambda name, device: loaded.append(name) or load(name, device)
    )
    record = run(broken, ["psnr_rgb", "ssim_rgb"])
    assert loaded == ["ssim_rgb"] and set(record["methods"]["gray"]["scores"]) == {
        "psnr_rgb",
        "ssim_rgb",
    }


def test_other_pictures_another_seed_and_damaged_files_are_restored_again(run, data, tmp_path):
    calls = []

    def counted(lr):
        calls.append(len(lr))
        return nearest(lr)

    def again(**options):
        calls.clear()
        return run({"gray": gray, "counted": counted}, **options)["methods"]["counted"]["scores"][
            "psnr_rgb"
        ], sum(calls)

    first, n = again()
    assert (
        n == 6
        and again() == (first, 0)
        and again(seed=1) == (first, 6)
        and again(seed=1) == (first, 0)
    )
    lr, hr = data.items[5].read()
    data.items[5] = Item("i/5", lambda: (lr, 1 - hr), group="photo 2")
    changed, n = again(seed=1)
    assert n == 2 and changed[:5] == first[:5] and changed[5] != first[5]  # its batch of two
    picture = next((tmp_path / "cache" / "toy" / "counted").glob("00000_*.png"))
    picture.with_suffix(".json").write_text('{"key": "cut sh')
    assert again(seed=1) == (changed, 4)
    picture.unlink()
    assert again(seed=1) == (changed, 4)


def test_batches_hold_neighbors_of_one_small_size():
    shapes = [(8, 8)] * 3 + [(8, 9)] + [(64, 64)] * 2 + [(8, 8)]
    items = [Item(str(i), lambda s=s: (torch.zeros(3, *s), None)) for i, s in enumerate(shapes)]
    assert [
        (first, len(of), len(lr), len(hr)) for first, of, lr, hr in benchmark.batches(items)
    ] == [(0, 3, 3, 3), (3, 1, 1, 1), (4, 1, 1, 1), (5, 1, 1, 1), (6, 1, 1, 1)]


def test_every_batch_has_noise_of_its_own_that_depends_on_its_place_alone(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(benchmark, "BATCH", 2)
    seeds = []
    method = benchmark.Method(lambda lr, seed: seeds.append(seed) or (nearest(lr), None), "k")
    benchmark.restore_all(data, "m", lambda: method, tmp_path, seed=100)
    next(tmp_path.glob("00003_*.png")).unlink()
    benchmark.restore_all(data, "m", lambda: method, tmp_path, seed=100)
    assert seeds == [100, 102, 104, 102]


# ---------------------------------------------------------------- methods


def test_a_chain_says_what_it_sees_and_a_photo_is_restored_by_tiles(model, pairs):
    call = benchmark.chain_method(model, Sampling())
    lr = torch.stack([p["lr"] for p in pairs]).float() / 255
    out, chains = call(lr, 7)
    assert out.shape == (3, 3, 128, 128) and [len(c) for c in chains] == [1, 1, 1]
    assert torch.equal(out, call(lr, 7)[0]) and not torch.equal(out, call(lr, 8)[0])
    photo, tiles = call(torch.rand(1, 3, 33, 40, generator=torch.Generator().manual_seed(0)), 7)
    assert photo.shape == (1, 3, 132, 160) and [len(t) for t in tiles] == [4]


def test_the_controls_share_the_decoder(model, pairs):
    lr = torch.stack([p["lr"] for p in pairs]).float() / 255
    alone, said = benchmark.lr_alone(model)(lr, 0)
    assert said is None and torch.allclose(alone, model.decode(lr=lr).clamp(0, 1), atol=1e-5)
    odd, _ = benchmark.lr_alone(model)(torch.rand(1, 3, 33, 40), 0)
    assert odd.shape == (1, 3, 132, 160)
    plain, _ = benchmark.chain_method(model, plain=True)(lr, 0)
    assert not torch.equal(plain, benchmark.chain_method(model)(lr, 0)[0])
    with pytest.raises(ValueError, match="photos of one tile"):
        benchmark.chain_method(model, plain=True)(torch.rand(1, 3, 33, 40), 0)


def test_a_photo_that_was_interrupted_is_not_kept(model, monkeypatch):
    half = Restoration(Image.new("RGB", (160, 132)), vlcot.Chain(), [], {}, complete=False)
    monkeypatch.setattr(RealSR, "__call__", lambda *a, **k: half)
    with pytest.raises(KeyboardInterrupt):
        benchmark.chain_method(model)(torch.rand(1, 3, 33, 40), 0)


def test_said_is_the_share_of_tiles_that_are_right(pairs):
    photo, words = photographs.load("test")[0], pairs[0]["degradation"]
    right = vlcot.Chain(words, photo.captions[0], None, photo.captions[1])
    wrong = vlcot.Chain("nonsense", "nothing", None, "nothing")
    both = benchmark.said([right, wrong], item(pairs[0], photo))
    assert set(both.values()) == {0.5}
    assert set(both) == {*degradation.LABELS, "subject", "background", "color"}
    shares = benchmark.said([right, right, right, wrong], item(pairs[0]))
    assert shares == dict.fromkeys(degradation.LABELS, 0.75)
    assert benchmark.said([right], Item("x", None)) == {}


def test_accuracy_of_the_text_reaches_the_table(run, pairs, model, monkeypatch, tmp_path):
    items = [item(p, x) for p, x in zip(pairs, photographs.load("test")[:3], strict=True)]
    for i, x in enumerate(items):
        x.id = x.group = str(i)
    ours = benchmark.Method(benchmark.chain_method(model), "key")
    other = benchmark.Method(lambda lr, seed: (nearest(lr), None), "other")
    monkeypatch.setattr(
        benchmark, "load_method", lambda name, *_: ours if name == "chain-sft" else other
    )
    record = run(["bicubic", "chain-sft"], data=BenchSet("some", items, True), baseline="bicubic")
    said = record["methods"]["chain-sft"]["said"]
    assert record["methods"]["bicubic"]["said"] == {} and len(said["blur"]) == 3
    labels = [said[k] for k in degradation.LABELS]
    assert said["degradation"] == pytest.approx(np.mean(labels, axis=0).tolist())
    two = [said["subject"], said["background"]]
    assert said["understanding"] == pytest.approx(np.mean(two, axis=0).tolist())
    text = (tmp_path / "out" / "benchmark-some.md").read_text(encoding="utf-8")
    assert (
        "| the chain says rightly | subject |" in text and "| degradation | understanding |" in text
    )


def test_own_methods_are_loaded_by_name_from_a_folder(model, pairs, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    lr = torch.stack([p["lr"] for p in pairs[:2]]).float() / 255
    chain, alone = (
        benchmark.load_method(name, "cpu", str(tmp_path)) for name in ("chain-sft", "lr-alone")
    )
    with torch.no_grad():
        assert chain.call(lr, 0)[0].shape == alone.call(lr, 0)[0].shape == (2, 3, 128, 128)
        assert torch.equal(
            benchmark.load_method("bicubic", "cpu").call(lr, 0)[0],
            F.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1),
        )
    assert benchmark.load_method("chain-sft", "cpu", str(tmp_path)).key == chain.key
    with monkeypatch.context() as m:
        m.setattr(benchmark.pipeline, "__file__", __file__)  # photos are cut in another way
        assert benchmark.load_method("chain-sft", "cpu", str(tmp_path)).key != chain.key
    (tmp_path / "tokenizer" / "more").write_text("other weights, other outputs")
    assert benchmark.load_method("chain-sft", "cpu", str(tmp_path)).key != chain.key
    with pytest.raises(FileNotFoundError, match="policy-grpo"):
        benchmark.load_method("chain-grpo", "cpu", str(tmp_path))


def test_methods_that_cannot_be_had_are_named_and_the_others_go_on(run, tmp_path):
    def failing(lr):
        raise RuntimeError("no ncnn here.")

    record = run({"gray": gray, "failing": failing, "wrong size": lambda lr: lr})
    assert (
        list(record["methods"]) == ["gray"]
        and record["skipped"]["failing"] == "left out, no ncnn here"
    )
    assert (
        "wrong size made (3, 8, 8) of (3, 8, 8): a method must enlarge four times"
        in record["skipped"]["wrong size"]
    )
    record = run(
        {"gray": failing, "nearest": nearest}, cache=tmp_path / "second"
    )  # even the baseline
    assert list(record["methods"]) == ["nearest"] and "minus" not in (
        tmp_path / "out" / "benchmark-toy.md"
    ).read_text(encoding="utf-8")
    with pytest.raises(
        ValueError, match="none of the methods can be had here: gray, left out, no ncnn"
    ):
        run({"gray": failing}, cache=tmp_path / "third")


def test_where_memory_runs_out_the_run_stops_and_says_so(run):
    def large(lr):  # torch's words on a CPU, where it has no kind of its own
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        )

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run({"gray": gray, "large": large})


def test_wrong_names_are_refused_before_any_work(run, tmp_path):
    with pytest.raises(ValueError, match="no method 'bilinear'; choose among bicubic, lanczos"):
        run(["bilinear", "bicubic"], baseline="bicubic")
    with pytest.raises(ValueError, match="no metric 'psnr'"):
        run(measures=["psnr"])
    with pytest.raises(
        ValueError, match="the baseline bicubic is not among the methods gray, nearest"
    ):
        run(baseline="bicubic")
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- the command


def test_the_command_measures_a_folder_and_says_errors_in_a_sentence(tmp_path, capsys):
    for i in range(2):
        for side, size in (("lr", (24, 24)), ("hr", (96, 96))):
            folder = tmp_path / "mine" / side
            folder.mkdir(parents=True, exist_ok=True)
            Image.effect_noise(size, 20 + i).convert("RGB").save(folder / f"{i}.png")
    rest = ["--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    what = ["--methods", "bicubic", "lanczos", "--metrics", "psnr_y", "niqe"]
    assert main(["eval", "benchmark", "--data", str(tmp_path / "mine"), *what, *rest]) == 0
    assert "| lanczos |" in capsys.readouterr().out
    (table,) = (tmp_path / "out").glob("benchmark-mine-*.csv")
    record = json.loads(table.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["baseline"] == "bicubic"
    assert all(len(m["scores"]["niqe"]) == 2 for m in record["methods"].values())
    assert main(["eval", "benchmark", "--data", "nowhere", *rest]) == 2
    errors = capsys.readouterr().err
    assert "error: no set and no folder 'nowhere'" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "out"), "out cannot be used, Permission denied"),
        (OSError(28, "No space left on device"), "the system refused, No space left on device"),
        (OSError("no such model,\n  check its name"), "no such model, check its name"),
        (
            FileNotFoundError("folder a does not exist: check the path"),
            "folder a does not exist: check the path",
        ),
    ],
)
def test_an_error_of_the_system_is_one_sentence(monkeypatch, capsys, tmp_path, error, said):
    def refuse(*a, **k):
        raise error

    monkeypatch.setattr(benchmark, "run", refuse)
    assert main(["eval", "benchmark", "--cache", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
