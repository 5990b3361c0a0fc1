import itertools

import pytest
import torch
from safetensors.torch import save_file

from realsr_r1 import perceptual
from realsr_r1.common import SEEDS, SEEDS_EACH, device_of, seed_of
from realsr_r1.files.writable import append_row


def test_no_use_has_a_seed_of_another():
    ranges = sorted((seed_of(use), seed_of(use, SEEDS_EACH - 1)) for use in SEEDS)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("seed", [-1, SEEDS_EACH])
def test_a_seed_beyond_its_range_is_refused(seed):
    with pytest.raises(ValueError, match="out of range: take one from 0 to"):
        seed_of("policy", seed)


def test_an_absent_or_unknown_device_is_refused():
    assert device_of("cpu").type == "cpu"
    with pytest.raises(ValueError, match="choose cpu, cuda or mps"):
        device_of("tpu")
    absent = "mps" if device_of(None).type != "mps" else "cuda"
    with pytest.raises(ValueError, match="torch finds none here"):
        device_of(absent)


def test_a_column_that_comes_late_leaves_the_rows_whole(tmp_path):
    path = tmp_path / "log.csv"
    append_row(path, {"step": 50, "loss": 1.5})
    append_row(path, {"step": 100, "loss": 0.25, "critic": 2.0})
    assert path.read_text(encoding="utf-8") == "step,loss,critic\n50,1.5,\n100,0.25,2.0\n"


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    for name in ("other", "broken"):
        with pytest.raises(ValueError, match=r"holds no weights conv0\.weight"):
            perceptual.load_convolutions(perceptual.lpips_alex(), tmp_path / f"{name}.safetensors")
