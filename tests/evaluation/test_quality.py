"""pyiqa's metrics as experts."""

import pytest
import torch

from realsr_r1 import photographs
from realsr_r1.degradation import blur, gaussian_kernel
from realsr_r1.evaluation import quality


@pytest.fixture(scope="module")
def hr():
    data = photographs.Pairs(photographs.load("val"), training=False)
    return torch.stack([data[i]["hr"] for i in range(3)]).float() / 255


def test_piqe_needs_no_file_and_prefers_the_sharp_picture(hr):
    soft = blur(hr, gaussian_kernel(15, 2.0, 2.0, 0.0).expand(3, -1, -1)).clamp(0, 1)
    piqe = quality.expert("piqe")
    score = piqe(torch.cat([hr, soft, torch.zeros(1, 3, 128, 128)]))
    assert (score[:3] > score[3:6]).all() and score[6] == 0
    assert torch.allclose(score[:3], 1 - piqe.raw(hr)["piqe"] / 100)


@pytest.mark.filterwarnings("ignore:cov")
def test_niqe_and_a_flat_picture_that_does_not_take_the_batch(hr):
    niqe = quality.expert("niqe")
    score = niqe(torch.cat([hr[:2], torch.full((1, 3, 128, 128), 0.5)]))
    assert (score[:2] > 0).all() and score[2] == 0
    with pytest.raises(ValueError, match="NIQE needs pictures of 96 px or more, got 64x64"):
        niqe(torch.rand(1, 3, 64, 64))


def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing is downloaded, so put") as e:
        quality.expert("paper")
    assert "musiq_koniq_ckpt-e95806b9.pth" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no expert 'best'; choose one of nano, niqe"):
        quality.expert("best")
