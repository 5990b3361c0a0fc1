"""GRPO with the weights of one policy spread over several devices (FSDP2, ZeRO-3)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from trl.models import prepare_fsdp, unwrap_model_for_generation

from realsr_r1.grpo import ChainGRPOTrainer
from realsr_r1.policy import ChainPolicy


@contextmanager
def gathered(policy: ChainPolicy, lr: Tensor) -> Iterator[None]:
    """Keeps all weights of a sharded policy (FSDP2) on this device: `decoding` reads them itself.
    A forward pass on photos (b, 3, 32, 32) gathers them."""
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    if units:
        policy(torch.tensor([policy.vocabulary.prompt], device=lr.device), lr[:1])
    yield
    for unit in units:
        unit.reshard()
        if unit in policy.model.layers:  # the embedding's weights stay: the head reads them, too
            unit.set_reshard_after_forward(True, recurse=False)


class ShardedTrainer(ChainGRPOTrainer):
    """The same trainer under `accelerate launch`, whichever way it spreads the policy, if any."""

    def reference(self, policy: ChainPolicy) -> ChainPolicy:
        policy = super().reference(policy)
        return prepare_fsdp(policy, self.accelerator) if self.is_fsdp_enabled else policy

    @torch.no_grad()
    def _rollouts(self, prompts: list[str], trainer: ChainGRPOTrainer) -> dict[str, list]:
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator) as policy,
            gathered(policy, self.lr),
        ):
            return super()._rollouts(prompts, trainer)

    def whole(self) -> ChainPolicy:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return self.policy
        state = self.accelerator.get_state_dict(self.model_wrapped)  # whole in the main process
        trained = ChainPolicy(self.policy.config)
        trained.load_state_dict(state or {}, strict=self.accelerator.is_main_process)
        return trained
