"""Muon for matrices, AdamW for the rest: meant to need fewer steps than AdamW alone (not compared
here).

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found by a
few Newton–Schulz iterations, so that every direction learns at the same pace. torch.optim.Muon
exists, but iterates in bfloat16, which CPUs without such units emulate hundreds of times slower;
and a trainer wants one optimizer, not two.
"""

import torch
from torch import Tensor, nn


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix to (rows, columns) m, roughly: singular values end in
    about 0.7–1.2.

    The quintic's coefficients are Jordan's.
    """
    x = m / (m.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon with Nesterov momentum on matrices of the body, AdamW on embeddings, norms and biases;
    one object.

    `lr` is AdamW's; a Muon update is scaled to AdamW's usual size (0.2·√max(rows, columns),
    Moonlight, arXiv 2502.16982), so both share it and one schedule serves both.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
    ):
        embedding = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        params = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in params if p.ndim == 2 and id(p) not in embedding]
        rest = [p for p in params if p.ndim != 2 or id(p) in embedding]
        groups = [{"params": matrices, "muon": True}, {"params": rest, "muon": False}]
        super().__init__(
            [g for g in groups if g["params"]],
            {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["first"] = torch.zeros(()), torch.zeros_like(p)
                    if not group["muon"]:
                        state["second"] = torch.zeros_like(p)
                state["step"] += 1
                if p.ndim == 2:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                if group["muon"]:
                    state["first"].lerp_(p.grad, 1 - group["momentum"])
                    update = orthogonalise(torch.lerp(p.grad, state["first"], group["momentum"]))
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
                else:
                    b1, b2 = group["betas"]
                    state["first"].lerp_(p.grad, 1 - b1)
                    state["second"].lerp_(p.grad.square(), 1 - b2)
                    n = float(state["step"])
                    p.addcdiv_(
                        state["first"] / (1 - b1**n),
                        (state["second"] / (1 - b2**n)).sqrt() + 1e-8,
                        value=-group["lr"],
                    )
        return loss
