import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import load_from_disk
from torch.distributed.fsdp import FSDPModule

from realsr_r1.first import grpo, policy, sft
from realsr_r1.first.grpo import GrpoSettings
from realsr_r1.reference import qwen as middle

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "realsr_r1" / "configs"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# accelerate shards on GPUs alone; told that these two processes are such, it does the same with
# gloo.
AS_GPUS = """
import torch
from accelerate import state
torch.distributed.init_process_group("gloo")
gpus = state.DistributedType.MULTI_GPU
state.PartialState._prepare_backend = lambda self, *a, **k: ("gloo", gpus)
state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
"""
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_distributed import run
{first}
if __name__ == "__main__":
    run(Path({folder!r}), {name!r}, 2, {optimizer!r})
"""


def code_share(completions, **_):
    """Planted reward: share of low codes among all image codes."""
    codes = [[int(w[2:-1]) for w in t.split() if w.startswith("<c")] for t in completions]
    return [sum(c < 32 for c in row) / max(1, len(row)) for row in codes]


def run(folder: Path, name: str, n: int, optimizer: str) -> None:
    """SFT, then GRPO, each on `n` processes with the same total batch. In float64, which has no
    autocast: Muon and AdamW turn rounding into whole steps where gradients vanish."""
    scale = sft.Scale(dtype=torch.float64, optimizer=optimizer)
    table = load_from_disk(str(folder / "data")).with_format("numpy")
    sft.train_sft(
        table,
        None,
        folder / f"{name}-sft",
        None,
        None,
        batch=4 // n,
        lr=1e-2,
        max_steps=3,
        device="cpu",
        init=folder / "start",
        scale=scale,
    )
    settings = GrpoSettings(
        steps=2, prompts=2, group=4, micro_batch=4, lr=1e-2, beta=0.05, save_steps=100, words=40
    )
    data = load_from_disk(str(folder / "prompts"))
    trainer = grpo.train_grpo(
        folder / "start",
        data,
        [code_share],
        folder / f"{name}-grpo",
        settings,
        device="cpu",
        scale=scale,
    )
    assert trainer.accelerator.num_processes == n
    assert any(isinstance(m, FSDPModule) for m in trainer.model.modules()) == sft.sharded()


@pytest.fixture(scope="module")
def start(tiny, pairs, words, tmp_path_factory):
    """A folder with a tiny policy, its chains (with texts of different lengths) and prompts."""
    folder = tmp_path_factory.mktemp("distributed")
    config = policy.PolicyConfig(
        hidden=32, layers=2, heads=2, mlp=64, codes=64, lr_codes=32, sizes=(2, 3, 4), max_words=6
    )
    policy.save(policy.build(config, seed=3), folder / "start")

    # Half of the rows have far fewer words to learn than the others.
    def short(row, i):
        keep = np.arange(len(row["labels"])) < 330 + 400 * (i % 2)
        return {"labels": np.where(keep, row["labels"], -100)}

    sft.chains(pairs, tiny[0], tiny[1], words).map(short, with_indices=True).save_to_disk(
        folder / "data"
    )
    grpo.prompts(range(500_000, 500_004), tiny[1], words).save_to_disk(folder / "prompts")
    return folder


def launch(folder: Path, name: str, optimizer: str, first: str = "", **more: str) -> None:
    """Two processes by torchrun, as `accelerate launch` starts several GPUs; on a CPU it starts
    one, whatever it is told."""
    script = folder / f"{name}.py"
    script.write_text(
        SCRIPT.format(
            tests=str(ROOT / "tests" / "first"),
            folder=str(folder),
            name=name,
            optimizer=optimizer,
            first=first,
        )
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(29000 + os.getpid() % 900),
        str(script),
    ]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        **more,
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def apart(one: Path, two: Path) -> float:
    a, b = (policy.load(f).state_dict() for f in (one, two))
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize(
    "name, optimizer, more",
    (("data", "muon", {}), ("fsdp", "sgd", {"first": AS_GPUS} | FSDP2)),
    ids=("data parallel", "FSDP2"),
)
def test_two_processes_agree_with_one(start, name, optimizer, more):
    """SFT (also where the halves of a batch have different numbers of text words) and GRPO (each
    process samples its half)."""
    run(start, f"{name}-one", 1, optimizer)
    launch(start, f"{name}-two", optimizer, **more)
    for phase in ("sft", "grpo"):
        one, two = (start / f"{name}-{n}-{phase}" for n in ("one", "two"))
        assert apart(one, two) < 0.05 * apart(one, start / "start"), phase
        assert one.with_suffix(".csv").read_text().count("\n") == two.with_suffix(
            ".csv"
        ).read_text().count("\n")


def test_adapters_cannot_be_sharded(monkeypatch, words):
    how = middle.lora(words)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="cannot be sharded: train all weights"):
        sft.Scale(how)
    assert not sft.Scale().muon  # transformers makes the optimizer itself there


@pytest.mark.parametrize("name", ("one_gpu", "fsdp2", "zero3", "zero3_offload"))
def test_accelerate_reads_the_configurations(name):
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kind = {"one_gpu": "NO", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert (
        str(found.distributed_type).split(".")[-1] == kind
        and found.num_processes >= 1
        and not found.use_cpu
    )
    if kind == "DEEPSPEED":
        where = "cpu" if "offload" in name else "none"
        c = found.deepspeed_config
        assert (
            c["zero_stage"] == 3
            and c["offload_optimizer_device"] == c["offload_param_device"] == where
        )
    if kind == "FSDP":
        # What the test above sets by hand is what accelerate makes of this file.
        c = {k.removeprefix("fsdp_").upper(): str(v).lower() for k, v in found.fsdp_config.items()}
        ours = {
            k.removeprefix("FSDP_").replace("TRANSFORMER_CLS", "TRANSFORMER_LAYER_CLS"): v.lower()
            for k, v in FSDP2.items()
            if k.startswith("FSDP_")
        }
        assert ours.items() <= c.items()


def test_the_slurm_example_is_a_script_that_starts_every_machine():
    script = CONFIGS / "slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    # With stand-ins for SLURM's commands: what would each machine run?
    fakes = (
        'scontrol() { printf "node1\\nnode2\\n"; }; srun() { shift; SLURM_NODEID=1 "$@"; }; '
        'accelerate() { echo "$@"; }; export -f accelerate; '
    )
    env = os.environ | {
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    said = subprocess.run(
        ["bash", "-c", fakes + f". {script} train grpo --size middle"],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    ).stdout
    assert (
        "--num_machines 2 --num_processes 8 --machine_rank 1 --main_process_ip node1 "
        "--main_process_port 20007" in said
    )
    assert said.strip().endswith("-m realsr_r1.first train grpo --size middle")
    config = re.search(r"--config_file (\S+)", said)[1]
    assert (ROOT / config).is_file()


def test_the_configurations_are_shipped():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["realsr_r1"]
    assert "configs/*" in shipped and len(list(CONFIGS.glob("*"))) == 5
