import pytest
import torch

from realsr_r1.ablations.rewards import combined_advantages
from realsr_r1.objective import clipped_surrogate, group_advantages, grpo_loss, kl_k3, masked_mean


def test_advantages_compare_siblings_only():
    r = torch.tensor([1.0, 2.0, 3.0, 100.0, 100.0, 103.0])
    a = group_advantages(r, 3).view(2, 3)
    torch.testing.assert_close(a.sum(1), torch.zeros(2), atol=1e-5, rtol=0)
    assert a[0, 2] == pytest.approx(1.0, abs=1e-3) and a[1, 0] < 0 < a[1, 2]
    torch.testing.assert_close(group_advantages(r + 50, 3), a.flatten(), atol=1e-3, rtol=1e-3)
    assert (group_advantages(torch.ones(4), 4) == 0).all()
    assert group_advantages(r, 3, scale=False).tolist()[:3] == [-1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="6 rewards do not make groups of 4"):
        group_advantages(r, 4)


def test_a_wide_reward_drowns_a_narrow_one_unless_each_is_normalized():
    wide, narrow = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.1, 0.1, 0.0, 0.0])
    rewards, weights = torch.stack([wide, narrow], 1), torch.ones(2)
    summed = combined_advantages(rewards, weights, 4)
    each = combined_advantages(rewards, weights, 4, normalize_first=True)
    assert summed[0] < 0 < summed[3]  # the narrow reward has no say
    assert each[0] == pytest.approx(float(each[3]), abs=0.01)  # both have the same


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(1.0, 1.0, True), (1.3, 1.0, False), (0.7, 1.0, True), (1.3, -1.0, True), (0.7, -1.0, False)],
)
def test_clipping_stops_what_leads_away(ratio, advantage, gradient):
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    out = clipped_surrogate(logp, torch.zeros(1, 1), torch.tensor([advantage]))
    out.sum().backward()
    assert (logp.grad.abs().sum() > 0) == gradient
    limits = {(1.3, 1.0): 1.2, (0.7, -1.0): -0.8}
    assert out.item() == pytest.approx(limits.get((ratio, advantage), ratio * advantage))


def test_k3_is_unbiased_and_never_negative():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=g)
    p, q = logits.softmax(0), (logits + 0.4 * torch.randn(5, generator=g)).softmax(0)
    exact = (p * (p / q).log()).sum()
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=g)
    k3 = kl_k3(p.log()[drawn], q.log()[drawn])
    assert (k3 >= -1e-7).all() and k3.mean() == pytest.approx(float(exact), rel=0.03)
    assert k3.std() < (p.log() - q.log())[drawn].std()  # less noise than the plain difference


def test_every_completion_counts_the_same():
    x = torch.tensor([[1.0, 9.0, 9.0], [2.0, 4.0, 6.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert float(masked_mean(x, mask)) == 2.5


def test_a_first_step_is_plain_policy_gradient():
    """At ratio 1 without KL the gradient is that of -A · log π: REINFORCE with a group baseline."""
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 6, generator=g)
    logp, a = old.clone().requires_grad_(), torch.tensor([1.0, -1.0, 0.5, -0.5])
    mask = torch.rand(4, 6, generator=g) > 0.3
    grpo_loss(logp, old, old, a, mask).backward()
    want = -(a[:, None] * mask / mask.sum(1, keepdim=True)) / 4
    torch.testing.assert_close(logp.grad, want)
    assert (logp.grad[~mask] == 0).all()
