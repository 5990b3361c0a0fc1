"""GRPO on two processes: with copies of the policy, with its weights sharded by FSDP2, and with
credit by place."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import load_from_disk
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parameters_to_vector

from realsr_r1 import grpo, photographs
from realsr_r1.grpo import GrpoSettings
from realsr_r1.pipeline import RealSR
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.pretraining.placed import PlacedTrainer
from realsr_r1.pretraining.sharded import ShardedTrainer
from realsr_r1.rewards import degradation_reward
from realsr_r1.tokenizer import TokenizerConfig, VQModel

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
from test_distributed import train
{first}
train(Path({folder!r}), {name!r})
"""


def low_codes(completions, **_):
    """Planted reward: the share of low codes among all image codes."""
    codes = [[int(t[2:-1]) for t in c.split() if t.startswith("<c")] for c in completions]
    return [sum(c < 32 for c in row) / max(1, len(row)) for row in codes]


def start() -> ChainPolicy:
    """In float64: AdamW turns rounding into whole steps where gradients vanish."""
    torch.manual_seed(3)
    shape = {"codes": 64, "hidden_size": 32, "layers": 2, "heads": 2, "mlp": 48, "eye_width": 16}
    return ChainPolicy(PolicyConfig(eye_blocks=1, **shape)).double()


def train(folder: Path, name: str) -> None:
    """Two steps of GRPO on however many processes there are; the total batch is the same."""
    was = grpo.ChainGRPOTrainer._rollouts

    def rollouts(self, *args):
        found = any(isinstance(m, FSDPModule) for m in self.policy.modules())
        assert found == ("ACCELERATE_USE_FSDP" in os.environ)
        return was(self, *args)

    grpo.ChainGRPOTrainer._rollouts = rollouts
    settings = GrpoSettings(2, 2, 4, 4, lr=1e-2, beta=0.05, save_steps=1)
    data, rewards = load_from_disk(str(folder / "prompts")), [low_codes, degradation_reward]
    if name.startswith("placed"):
        shape = {"encoder": (16, 16), "decoder": (16,) * 4, "lr_width": 16, "blocks": 1}
        policy = start()  # it sets the seed for both
        model = RealSR(VQModel(TokenizerConfig(codes=64, **shape)), policy)
        grpo.finish(PlacedTrainer(model, data, folder / name, settings, "cpu"))
        return
    grpo.finish(ShardedTrainer(start(), data, rewards, folder / name, settings, "cpu"))


def launch(folder: Path, name: str, first: str = "", **more: str) -> None:
    """Two processes by torchrun, as `accelerate launch` starts several GPUs; on a CPU it starts
    one, whatever it is told."""
    script = folder / f"{name}.py"
    names = {"tests": str(Path(__file__).parent), "folder": str(folder), "name": name}
    script.write_text(SCRIPT.format(first=first, **names))
    port = str(29_000 + os.getpid() % 900)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*run, "--master_port", port, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | env | more,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def weights(folder: Path) -> torch.Tensor:
    return parameters_to_vector(ChainPolicy.from_pretrained(folder).double().parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos for two steps, and what one process makes of them."""
    out = tmp_path_factory.mktemp("distributed")
    grpo.prompts(photographs.load("train"), 4, seed=4).save_to_disk(out / "prompts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.ChainGRPOTrainer, "_rollouts", grpo.ChainGRPOTrainer._rollouts)
        train(out, "one")
        train(out, "placed-one")
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, alone, more",
    (
        ("copies", "one", {}),
        ("fsdp2", "one", {"first": AS_GPUS} | FSDP2),
        ("placed", "placed-one", {}),
    ),
)
def test_two_processes_agree_with_one(folder, name, alone, more):
    launch(folder, name, **more)
    one, two = (pd.read_csv(folder / n / "log.csv") for n in (alone, name))
    for column in ("loss", "kl", "reward", "entropy"):
        torch.testing.assert_close(
            *(torch.tensor(x[column][:2].to_numpy()) for x in (one, two)), rtol=1e-3, atol=1e-5
        )
    with torch.no_grad():
        a, b, before = weights(folder / alone), weights(folder / name), start()
        moved = (a - parameters_to_vector(before.parameters())).norm()
    assert moved > 0.1 and (a - b).norm() < 0.01 * moved


def test_processes_take_whole_groups(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cannot be shared by 2 processes"):
        grpo.arguments(tmp_path, GrpoSettings(1, 3, 4, 4), "cpu", 9)


@pytest.mark.parametrize("name", ("one_gpu", "fsdp2", "zero3", "zero3_offload"))
def test_accelerate_reads_the_configurations(name):
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kind = {"one_gpu": "NO", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert str(found.distributed_type).split(".")[-1] == kind
    assert found.num_processes >= 1 and not found.use_cpu
    if kind == "DEEPSPEED":
        c, where = found.deepspeed_config, "cpu" if "offload" in name else "none"
        places = {c["offload_optimizer_device"], c["offload_param_device"]}
        assert c["zero_stage"] == 3 and places == {where}
    if kind == "FSDP":
        # What the test above sets by hand is what accelerate makes of this file.
        c = {k.removeprefix("fsdp_").upper(): str(v).lower() for k, v in found.fsdp_config.items()}
        ours = {
            k.removeprefix("FSDP_").replace("TRANSFORMER_CLS", "TRANSFORMER_LAYER_CLS"): v.lower()
            for k, v in FSDP2.items()
            if k.startswith("FSDP_")
        }
        assert ours.items() <= c.items()


def test_the_slurm_example_starts_every_machine():
    script = CONFIGS / "slurm.sh"
    # With stand-ins for SLURM's commands: what would each machine run?
    fakes = (
        'scontrol() { printf "node1\\nnode2\\n"; }; srun() { shift; SLURM_NODEID=1 "$@"; }; '
        'accelerate() { echo "$@"; }; export -f accelerate; '
    )
    slurm = {"NNODES": "2", "GPUS_ON_NODE": "4", "JOB_ID": "7", "JOB_NODELIST": "node[1-2]"}
    said = subprocess.run(
        ["bash", "-c", fakes + f". {script} train grpo --model FOLDER"],
        capture_output=True,
        text=True,
        env=os.environ | {f"SLURM_{k}": v for k, v in slurm.items()},
        check=True,
    ).stdout
    where = "--num_machines 2 --num_processes 8 --machine_rank 1 --main_process_ip node1"
    assert f"{where} --main_process_port 20007" in said
    assert said.strip().endswith("-m realsr_r1 train grpo --model FOLDER")
    assert (ROOT / re.search(r"--config_file (\S+)", said)[1]).is_file()


def test_the_configurations_are_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "configs/*" in project["tool"]["setuptools"]["package-data"]["realsr_r1"]
    assert len(list(CONFIGS.glob("*"))) == 5
