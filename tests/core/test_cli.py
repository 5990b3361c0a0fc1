import os
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from realsr_r1 import __version__
from realsr_r1.cli import main, one_sentence, parser
from realsr_r1.sampling import Sampling


def leaves(p=None, path=()) -> list[tuple[str, ...]]:
    """Every command of the tree."""
    p = p or parser()
    groups = [a for a in p._actions if hasattr(a, "choices") and isinstance(a.choices, dict)]
    if not groups:
        return [path]
    return [x for name, q in groups[0].choices.items() for x in leaves(q, (*path, name))]


@pytest.mark.parametrize("path", leaves(), ids=" ".join)
def test_every_option_says_what_it_is(path, capsys):
    with pytest.raises(SystemExit) as e:
        main([*path, "--help"])
    assert e.value.code == 0
    p = parser()
    for name in path:
        p = next(a for a in p._actions if isinstance(a.choices, dict)).choices[name]
    assert all(a.help for a in p._actions)


@pytest.mark.parametrize("command", ["restore a.png -o o.png", "eval table", "eval chains"])
def test_commands_draw_as_the_library_does(command):
    """The parser names the temperature itself, so that `--help` need not load torch."""
    assert parser().parse_args(command.split()).temperature == Sampling().image_temperature


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"realsr {__version__}"


@pytest.mark.parametrize(
    "command", ["restore a.png --steps 3", "train policy --vgg x", "eval table --trace x", "train"]
)
def test_an_option_of_another_leaf_is_refused(command, capsys):
    with pytest.raises(SystemExit) as e:
        main(command.split())
    assert e.value.code == 2 and "usage: realsr" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "restore {p} -o o.png --batch -1",
        "restore {p} -o o.png --batch 0",
        "restore {p} -o o.png --batch 1.5",
        "restore {p} -o o.png --temperature 0",
        "restore {p} -o o.png --temperature nan",
        "restore {p} -o o.png --temperature inf",
        "restore {p} -o o.png --guidance -1",
        "restore {p} -o o.png --max-megapixels 0",
        "restore {p} -o o.png --seed x",
        "restore {p} -o ''",
        "restore '' -o o.png",
        "train tokenizer --steps 0",
        "train tokenizer --lr 0",
        "train policy --minutes -1",
        "train policy --photographs ''",
        "train grpo --group 0",
        "train grpo --micro-batch 0",
        "train grpo --prompts 0",
        "train grpo --steps -1",
        "train grpo --beta nan",
        "train grpo --beta -0.1",
        "eval table -n 0",
        "eval table --seed -1",
        "eval benchmark --data ''",
        "ablate chain --seeds 0",
    ],
)
def test_a_number_out_of_range_is_refused_in_one_sentence(command, capsys):
    with pytest.raises(SystemExit) as e:
        main(shlex.split(command.format(p="photo.png")))
    said = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and "error: argument" in said


@pytest.mark.parametrize("locale", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", ["peers", "restore ☃1.jpg ☃2.jpg -o ."])
def test_any_locale_will_do(locale, command, tmp_path):
    """A terminal that lacks a sign of what is printed must not end a run."""
    env = os.environ | {"PYTHONIOENCODING": locale, "PYTHONUTF8": "0", "LC_ALL": "C"}
    code = f"import sys; from realsr_r1.cli import main; sys.exit(main({command.split()!a}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, cwd=tmp_path)
    assert done.returncode == (2 if "restore" in command else 0)
    assert b"Traceback" not in done.stderr
    assert done.stdout.count(b"left out: ?") == (2 if "restore" in command else 0)


def test_help_loads_no_torch():
    code = "import sys; from realsr_r1.cli import parser; parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_pipeline_loads_no_trainer():
    code = (
        "import sys, realsr_r1.pipeline, realsr_r1.evaluation.nano; "
        "print([m for m in ('trl', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("restore no.png -o {tmp}/out.png", "does not exist"),
        ("restore {photo} -o {tmp}/no/out.png", "does not exist: create it first"),
        ("restore {photo} -o {tmp}/out.xyz", "Pillow cannot write out.xyz"),
        ("restore {photo} -o {tmp}/out.png --model {tmp}", "weights tokenizer are missing"),
        ("restore {photo} {photo}x.png -o {tmp}/o.png", "need a folder that exists for -o"),
        ("restore {photo} -o {photo}", "would replace the photo"),
        ("restore {photo} -o {tmp}", "would replace the photo"),
        ("restore {photo} -o {tmp}/o.png --trace {photo}", "would replace the photo"),
        ("train grpo --words --rewards format degradation", "words alone cannot earn format"),
        ("train grpo --rewards place format", "ask for it alone"),
        ("restore {photo} {tmp}/b/photo.jpg -o {tmp}", "would get one name"),
        ("restore {photo} {tmp}/b/PHOTO.jpg -o {tmp}", "would get one name"),
        ("restore {tmp}/photo.jpg -o {tmp}", "exists beside photo.jpg and would be replaced"),
        ("annotate {tmp} --model qwen2.5-vl --masks {tmp}/../m", "need boxes"),
        ("restore {photo} -o {tmp}/o.png --trace {tmp}/o.png", "give two names"),
        ("eval table --photographs {tmp}", "none of the annotated photographs"),
        ("train decoder --out {tmp}/none --device cpu", "holds no tokenizer"),
        ("train tokenizer --init {tmp} --out {tmp}/x --device cpu", "holds no tokenizer"),
        ("restore {photo} -o {tmp}/o.png --max-megapixels 0.0001", "allow larger photos"),
        ("ablate names --table {photo}", "is no table"),
        ("ablate names --table {tmp}/no.csv", "no.csv cannot be used, No such file"),
        ("ablate chain --variants chains --device cpu", "no variant 'chains'"),
    ],
)
def test_errors_are_one_sentence(command, message, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32)).save(photo)
    assert main(command.format(tmp=tmp_path, photo=photo).split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "said",
    [
        RuntimeError("CUDA out of memory. Tried"),
        RuntimeError("can't allocate memory: you tried"),
        RuntimeError("not enough memory: you"),
        MemoryError(),
    ],
)
def test_too_little_memory_gets_one_sentence(said, tmp_path, monkeypatch, capsys):
    def full(a):
        raise said

    monkeypatch.setattr("realsr_r1.files.commands.model_of", full)
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    assert main(["restore", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out.png")]) == 2
    assert "too little memory: take smaller photos, a lower --batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "said", "printed"),
    [
        (
            ValueError,
            "Caught ValueError in DataLoader worker process 0.\n at x\nValueError: a: b\n",
            "a: b",
        ),
        (
            PermissionError,
            "Caught PermissionError in DataLoader worker process 0.\n at x\n"
            "PermissionError: [Errno 13] Permission denied: 'f'",
            "[Errno 13] Permission denied: 'f'",
        ),
        (ValueError, "Caught ValueError in pin memory thread.\nValueError: one\ntwo", "two"),
        (
            RuntimeError,
            "DataLoader worker (pid(s) 1) exited unexpectedly",
            "DataLoader worker (pid(s) 1) exited unexpectedly",
        ),
    ],
)
def test_an_error_of_a_loaders_worker_is_its_last_line(kind, said, printed):
    assert one_sentence(kind(said)) == printed


@pytest.mark.slow
def test_a_training_leaves_weights_that_restore(tmp_path, capsys):
    """The four stages in their order, a step each, on the photographs that ship."""
    out = tmp_path / "nano"
    train = f"train all --steps 1 --batch 2 --out {out} --device cpu --teacher bicubic".split()
    assert main(train) == 0
    for part in ("tokenizer/model", "tokenizer/clean", "policy-sft/model"):
        assert (out / f"{part}.safetensors").exists()
    assert (out / "policy" / "preview.png").exists() and not list(out.rglob("checkpoint*.pt"))
    weights = (out / "tokenizer" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(train) == 0
    assert capsys.readouterr().out.count("passed over") == 4
    assert weights == (out / "tokenizer" / "model.safetensors").read_bytes()
    photo = tmp_path / "photo.png"
    Image.effect_noise((40, 32), 50).convert("RGB").save(photo)
    made, trace = tmp_path / "out.png", tmp_path / "trace.json"
    command = f"restore {photo} -o {made} --trace {trace} --model {out} --device cpu"
    assert main(command.split()) == 0
    assert Image.open(made).size == (160, 128) and trace.exists()


def test_grpo_starts_from_a_folder_of_weights(tmp_path, capsys):
    """A step on two groups of two, and the policy can be restored with."""
    import torch

    from realsr_r1.corpus.folders import alone
    from realsr_r1.pipeline import RealSR
    from realsr_r1.policy import ChainPolicy, PolicyConfig
    from realsr_r1.tokenizer import TokenizerConfig, VQModel

    torch.manual_seed(0)
    small = {"codes": 64, "hidden_size": 32, "layers": 2, "heads": 2, "mlp": 48, "eye_width": 16}
    widths = {"encoder": (16, 16), "decoder": (16, 16, 16, 16), "lr_width": 16}
    model = RealSR(VQModel(TokenizerConfig(codes=64, **widths)), ChainPolicy(PolicyConfig(**small)))
    model.save_pretrained(tmp_path / "start")
    out = tmp_path / "run"
    command = f"train grpo --model {tmp_path / 'start'} --out {out} --steps 1 --prompts 2 --group 2"
    assert main([*command.split(), "--micro-batch", "4", "--device", "cpu"]) == 0
    again = RealSR.from_pretrained(out, "cpu", policy="policy-grpo")
    assert (out / "policy-grpo" / "log.csv").exists() and again.policy.config.codes == 64
    assert main([*command.split(), "--micro-batch", "2", "--device", "cpu"]) == 2
    assert "holds a run of other settings" in capsys.readouterr().err
    with alone(out, "training"):  # as the stages before: they may put this policy aside
        assert main([*command.split(), "--micro-batch", "4", "--device", "cpu"]) == 2
    assert "another run is at work" in capsys.readouterr().err


@pytest.mark.slow
def test_several_photos_and_one_that_cannot_be_read(tmp_path, capsys):
    for name in "ab":
        Image.new("RGB", (32, 32), "gray").save(tmp_path / f"{name}.jpg")
    (tmp_path / "bad.jpg").write_text("no picture")
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (90, 80), "gray").save(tmp_path / "large.jpg")
    photos = " ".join(str(tmp_path / f"{n}.jpg") for n in ("a", "bad", "large", "b"))
    assert main(f"restore {photos} -o {out} --max-megapixels 0.005".split()) == 2
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.png"]
    assert "left out: " in (said := capsys.readouterr().out) and "bad.jpg" in said
    assert "left out: large.jpg, 90x80 pixels" in said
