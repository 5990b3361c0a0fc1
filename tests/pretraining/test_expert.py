import pytest
import torch

from realsr_r1 import photographs
from realsr_r1.evaluation.experts import load_expert
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining import expert as E
from realsr_r1.pretraining.loop import FitConfig


@pytest.fixture(scope="module")
def bank():
    model = RealSR.from_pretrained("nano", "cpu")
    data = photographs.Pairs(photographs.load("val"), training=False)
    return E.make_bank(model, data, 4)


def test_a_bank_begins_with_the_original_and_ends_with_chains(bank):
    assert bank.pictures.dtype == torch.uint8 and len(bank.pictures) == 4
    assert (bank.away[:, 0] == 0).all() and (bank.away[:, 1:] > 0).all()
    drawn = bank.pictures[:, -E.DRAWN :].float()
    assert drawn.std(1).mean() > 1  # eight chains are eight pictures


def test_ranking_loss_by_hand():
    logits, away = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.505]])
    # the first must lead the second by 3.2 and does by 1, the third by 3.23 and does by 2; the
    # second and the third are too close to be known
    loss, right = E.ranking_loss(logits, away)
    assert float(loss) == pytest.approx((2.2 + 1.23) / 2, abs=1e-4) and float(right) == 1
    assert float(E.ranking_loss(-logits, away)[1]) == 0


def test_training_writes_a_file_that_loads(bank, tmp_path):
    fit = FitConfig(steps=2, warmup=1, log_every=1)
    trained = E.train_expert(bank, tmp_path, fit, width=3)
    again = load_expert(path=tmp_path / "expert.safetensors")
    x = bank.pictures[:, 0].float() / 255
    with torch.no_grad():
        assert torch.allclose(trained(x), again(x), atol=2e-2)  # the file is in half precision


def test_agreement_knows_a_perfect_judge(bank):
    away = iter(bank.away[:, -E.DRAWN :])
    assert torch.allclose(E.agreement(lambda x: -next(away), bank), -torch.ones(4).double())


def test_pairs_in_order_know_a_perfect_judge_and_its_opposite(bank):
    for sign, share in ((-1, 1.0), (1, 0.0)):
        away = iter(bank.away)
        found = E.in_order(lambda x, away=away, sign=sign: sign * next(away), bank)
        assert torch.allclose(found, torch.full((4,), share))
