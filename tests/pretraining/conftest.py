"""What the tests of the trainings share: pairs of few photographs, and models of a tiny shape."""

from collections.abc import Callable

import pytest
import torch

from realsr_r1 import photographs
from realsr_r1.policy import ChainPolicy, PolicyConfig
from realsr_r1.tokenizer import TokenizerConfig, VQModel


@pytest.fixture(scope="module")
def data() -> photographs.Pairs:
    return photographs.Pairs(photographs.load("train")[:8])


@pytest.fixture
def tiny() -> Callable[[], tuple[VQModel, ChainPolicy]]:
    """Makes a tokenizer and a policy, the same at each call."""

    def make() -> tuple[VQModel, ChainPolicy]:
        torch.manual_seed(0)
        shape = {"codes": 64, "hidden_size": 32, "layers": 1, "heads": 2, "mlp": 32}
        narrow = {"encoder": (16, 16), "decoder": (16, 16, 16, 16), "lr_width": 16, "blocks": 1}
        vq = VQModel(TokenizerConfig(codes=64, **narrow))
        return vq, ChainPolicy(PolicyConfig(eye_blocks=1, eye_width=16, **shape))

    return make
