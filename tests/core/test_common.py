import itertools

import pytest

from realsr_r1.common import SEEDS, SEEDS_EACH, device_of, seed_of


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
