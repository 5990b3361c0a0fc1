"""GRPO with credit by place."""

import torch

from realsr_r1 import grpo, perceptual, photographs, vlcot
from realsr_r1.grpo import GrpoSettings
from realsr_r1.pipeline import RealSR
from realsr_r1.pretraining import placed


def test_errors_are_lpips_place_by_place_and_lie_where_the_picture_is_wrong(data):
    hr = torch.stack([data[i]["hr"] for i in range(2)]).float() / 255
    wrong = hr.clone()
    wrong[:, :, 64:96, 32:64] = 1 - wrong[:, :, 64:96, 32:64]
    error = placed.errors(wrong, hr)
    assert error.shape == (2, 128, 128)
    expected = perceptual.distance(wrong, hr) + (wrong - hr).abs().mean((1, 2, 3))
    torch.testing.assert_close(error.mean((1, 2)), expected, atol=2e-3, rtol=0)
    assert error[:, 64:96, 32:64].mean() > 5 * error[:, :, 96:].mean()
    assert not perceptual.lpips_alex("cpu").spatial  # the metric itself is as before


def test_a_code_answers_for_what_lies_around_it():
    """One group of two; the second chain is worse in the square of code (1, 2) of 4 × 4."""
    error = torch.zeros(2, 128, 128)
    error[1, 32:64, 64:96] = 1.0
    a = placed.credit(error, 4, 2).view(2, 4, 4)
    torch.testing.assert_close(a.sum(0), torch.zeros(4, 4))
    assert a[1].argmin() == 1 * 4 + 2 and a[0, 1, 2] > 0
    assert a[0, 1, 1] > 0 and a[0, 0, 2] > 0 and a[0, 3, 3] == 0  # neighbors see its rim
    # The mean of a window in the picture: 32 of 48 pixels each way at the code itself.
    torch.testing.assert_close(a[0, 1, 2] / a[0, 1, 1], torch.tensor(32 / 8))


def test_the_trainer_rewards_codes_and_no_words(data, tiny, tmp_path):
    start = RealSR(*tiny())
    rows = grpo.prompts(photographs.load("train"), 2, seed=4)
    settings = GrpoSettings(steps=1, prompts=1, group=4, micro_batch=4, beta=0.0)
    before = {k: v.half().float() for k, v in start.policy.state_dict().items()}
    seen = {}

    class Watched(placed.PlacedTrainer):
        def _generate_and_score_completions(self, inputs):
            seen.update(super()._generate_and_score_completions(inputs))
            return seen

    grpo.finish(Watched(start, rows, tmp_path, settings, "cpu"))
    codes = seen["completion_ids"] >= start.policy.vocabulary.first_code
    assert codes.sum() == 4 * sum(n * n for n in vlcot.GRIDS)
    assert (seen["advantages"][~codes] == 0).all() and seen["advantages"][codes].std() > 0.5
    # Its own codes, at their places: the first image's are judged by windows of 48 pixels.
    chains = [vlcot.parse(start.policy.vocabulary.decode(row)) for row in seen["completion_ids"]]
    hr = torch.as_tensor(rows[0]["hr"]).float()[None].expand(4, -1, -1, -1) / 255
    error = placed.errors(start.finish(chains, seen["pixel_values"]), hr)
    alone = start.decode(torch.stack([c.final_image for c in chains]))
    expected = placed.credit(error + placed.ALONE * placed.errors(alone, hr), 16, 4)
    torch.testing.assert_close(seen["advantages"][codes].view(4, -1)[:, -256:], expected)
    after = start.policy.state_dict()  # in half precision, as it is saved
    assert not all(torch.equal(v, after[k]) for k, v in before.items())
