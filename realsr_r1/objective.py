"""The formulas of GRPO (Shao et al. 2024, arXiv 2402.03300; RealSR-R1, section 3.3), by name.

TRL's trainer computes the same inside; a test holds the two together. Lesson 05 builds them up.
"""

import torch
from torch import Tensor

EPSILON = 1e-4  # added to the group's standard deviation, as TRL does


def group_advantages(rewards: Tensor, group: int, scale: bool = True) -> Tensor:
    """Advantages (n,) of rewards (n,), the completions of a prompt adjacent in groups of `group`.

    A = (r - mean of the group) / (standard deviation of the group + 1e-4): how much better than its
    siblings a completion is (GRPO, eq. 3). `scale=False` leaves the division out (Dr. GRPO, Liu et
    al. 2025, arXiv 2503.20783): a group that hardly differs is then not blown up."""
    if group < 2 or len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group} (at least 2)")
    r = rewards.view(-1, group)
    centered = r - r.mean(1, keepdim=True)
    return (centered / (r.std(1, keepdim=True) + EPSILON) if scale else centered).flatten()


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float = 0.2
) -> Tensor:
    """What to maximize for each token (b, n): min(ρ·A, clip(ρ, 1 - ε, 1 + ε)·A).

    ρ = exp(logprobs - old_logprobs) is the ratio to the policy that sampled (PPO, arXiv 1707.06347,
    eq. 7; GRPO, eq. 3); `advantages` (b,) or (b, n). Beyond ε no gradient carries further away."""
    ratio = (logprobs - old_logprobs).exp()
    a = advantages if advantages.ndim == 2 else advantages[:, None]
    return torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a)


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy ‖ reference) for each token, from a token that the policy drew:
    exp(Δ) - Δ - 1 with Δ = reference - policy (Schulman 2020; GRPO, eq. 4).

    Never negative, and right on average. -Δ alone is right on average, too, but of either sign and
    noisy."""
    delta = reference_logprobs - logprobs
    return delta.exp() - delta - 1


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (b, n) where mask (b, n) is set, of each completion first, then over completions:
    all count the same. (DAPO, arXiv 2503.14476, averages all tokens: long ones count more.)"""
    mask = mask.to(x.dtype)
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    beta: float = 0.02,
) -> Tensor:
    """GRPO's loss (): -(clipped surrogate - β · KL), averaged over tokens that were chosen.

    All but `advantages` (b,) are (b, n); `mask` leaves out padding and tokens that the grammar
    forced, which carry no choice."""
    gain = clipped_surrogate(logprobs, old_logprobs, advantages)
    return -masked_mean(gain - beta * kl_k3(logprobs, reference_logprobs), mask)
