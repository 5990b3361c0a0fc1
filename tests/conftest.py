import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads

import pytest
import torch

from realsr_r1.first import policy, scenes, tokenizer, vlcot
from realsr_r1.first.reader import LRReader, ReaderConfig

torch.manual_seed(0)


@pytest.fixture(scope="session")
def pairs():
    return scenes.pairs(range(1_000_000, 1_000_012), "val")


@pytest.fixture(scope="session")
def tiny():
    """Random tiny tokenizer, reader and policy of the shipped layout: (vq, reader, policy)."""
    torch.manual_seed(0)
    vq = tokenizer.VQModel(
        tokenizer.TokenizerConfig(codes=64, base=32, multiplier=(1, 1), latent=32)
    ).eval()
    reader = LRReader(ReaderConfig(codes=24, summary_codes=8, width=8, heads={"noise": 4})).eval()
    config = policy.PolicyConfig(hidden=32, layers=2, heads=2, mlp=64, codes=64, lr_codes=32)
    return vq, reader, policy.build(config).eval()


@pytest.fixture(scope="session")
def words():
    return vlcot.Vocabulary(64, 32)


@pytest.fixture(scope="session")
def shipped():
    from realsr_r1.first.restore import load_models

    return load_models("cpu")
