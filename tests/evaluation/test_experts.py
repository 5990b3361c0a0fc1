import pytest
import torch

from realsr_r1 import perceptual, photographs
from realsr_r1.degradation import blur, gaussian_kernel
from realsr_r1.evaluation import experts
from realsr_r1.pipeline import RealSR


@pytest.fixture(scope="module")
def nano():
    return experts.load_expert()


@pytest.fixture(scope="module")
def hr():
    data = photographs.Pairs(photographs.load("val"), training=False)
    return torch.stack([data[i]["hr"] for i in range(8)]).float() / 255


def soft(x, sigma):
    return blur(x, gaussian_kernel(15, sigma, sigma, 0.0).expand(len(x), -1, -1)).clamp(0, 1)


def test_one_number_a_picture_whatever_the_batch(nano, hr):
    score = nano(hr)
    assert score.shape == (8,) and ((score > 0) & (score < 1)).all()
    assert torch.allclose(score, torch.cat([nano(x) for x in hr.split(1)]), atol=1e-5)
    assert sum(p.numel() for p in nano.parameters()) < 600_000


def test_bytes_are_refused(nano):
    with pytest.raises(ValueError, match="takes floats"):
        nano(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(16, 16), (37, 50), (128, 200)])
def test_pictures_of_any_size_and_flat_ones(nano, size):
    x = torch.cat([torch.rand(2, 3, *size), torch.full((1, 3, *size), 0.5)])
    assert torch.isfinite(nano(x)).all()


def test_the_shipped_expert_knows_better_from_worse(nano, hr):
    """Blur, noise, and confetti: more wrong codes, a lower score. The first expert fell for that
    last one."""
    g = torch.Generator().manual_seed(0)
    model = RealSR.from_pretrained("nano", "cpu")
    codes = model.tokenizer.encode(hr)
    other = torch.randint(2048, codes.shape, generator=g)
    dice = torch.rand(codes.shape, generator=g)
    ladders = {
        "blur": [soft(hr, s) for s in (0.6, 1.5, 2.5)],
        "noise": [hr + torch.randn(hr.shape, generator=g) * s / 255 for s in (20, 30, 45)],
        "confetti": [model.decode(torch.where(dice < s, other, codes)) for s in (0, 0.3, 0.9)],
    }
    for kind, steps in ladders.items():
        scores = [float(nano(x.clamp(0, 1)).mean()) for x in (hr, *steps)]
        assert scores == sorted(scores, reverse=True), f"{kind}: {scores}"


def test_what_is_missing_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors are missing"):
        experts.load_expert(path=tmp_path / "none.safetensors")
    broken = tmp_path / "expert.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged"):
        experts.load_expert(path=broken)
    with pytest.raises(ValueError, match="not the nano expert's"):
        experts.load_expert(path=perceptual.ALEX)
