"""Scheduled sampling (Bengio et al. 2015): chains whose image codes the policy has drawn itself."""

import torch
from torch import Tensor

from realsr_r1.policy import CELLS, ChainPolicy
from realsr_r1.vlcot import GRIDS, PAD


@torch.no_grad()
def redraw(
    policy: ChainPolicy,
    ids: Tensor,
    lr: Tensor,
    temperature: float = 1.0,
    share: float | Tensor = 1.0,
) -> Tensor:
    """Chains (b, n) whose image codes the policy has drawn anew, each given the true tokens before
    it, in one forward pass; `share` of them, one number or (b, 1), the others stay."""
    first = policy.vocabulary.first_code
    here = policy.cells(ids)[:, :-1] >= 0
    logits = policy(ids, lr).logits[:, :-1][here][:, first:].float()
    drawn = ids[:, 1:].clone()
    drawn[here] = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0] + first
    out, new = ids.clone(), torch.rand(drawn.shape, device=ids.device) < share
    out[:, 1:] = torch.where(new, drawn, ids[:, 1:])
    return out


def blank_codes(policy: ChainPolicy, ids: Tensor) -> Tensor:
    """Chains (b, n) that show none of their codes: whoever reads them has the LR photo alone."""
    return torch.where(ids >= policy.vocabulary.first_code, policy.vocabulary.ids[PAD], ids)


def final_codes(policy: ChainPolicy, ids: Tensor) -> Tensor:
    """Codes (b, 16, 16) of the final images of chains (b, n) that have one."""
    grid = GRIDS[-1]
    here = policy.cells(ids)[:, :-1] >= CELLS - grid * grid
    return (ids[:, 1:][here] - policy.vocabulary.first_code).view(len(ids), grid, grid)
