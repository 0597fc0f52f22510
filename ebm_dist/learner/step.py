"""One loss: the module that DeepSpeed wraps.

Gradients in x taken through a DeepSpeed engine are wrong: its output hooks divide them by the
accumulation steps (stages 1 and 3 silently, 0 and 2 with an error). So the objective, with every
inner `autograd.grad` that it needs, runs inside this one forward, and only a scalar loss leaves it.
`tests/distributed/test_engine_deepspeed_facts.py` keeps both sides of that.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ebm_dist.core.generators import seeded
from ebm_dist.core.types import Batch, Negatives
from ebm_dist.objectives.objective import Objective


class LearningStep(nn.Module):
    """`forward(batch, negatives, seed) -> (loss, metrics)` of an energy and its objective."""

    def __init__(
        self,
        energy: nn.Module,
        objective: nn.Module,
        *,
        autocast_dtype: torch.dtype | None = None,
        keep_gathered: bool = False,
    ) -> None:
        """
        Args:
            energy: (B, *event) -> (B,).
            objective: `objective(energy, batch, negatives, generator) -> (loss, metrics)`.
            autocast_dtype: networks compute in it; None leaves them in float32. Weights stay
                float32 either way, so spectral norm's vectors, which are buffers, do too.
            keep_gathered: hold on to weights that are gathered for the forward (ZeRO-3) until the
                backward has used them. The sharding of optimiser state and gradients remains.
        """
        super().__init__()
        self.energy = energy
        self.objective = objective
        self.autocast_dtype = autocast_dtype
        self.keep_gathered = keep_gathered

    def forward(
        self, batch: Batch, negatives: Negatives | None, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and detached scalar metrics with `loss/total` among them."""
        device = batch.x.device
        # Behind an update to seed one takes a CPU .18 ms, a hundredth of a small network's next.
        draws = not isinstance(self.objective, Objective) or self.objective.needs_generator
        generator = seeded(seed, device) if draws else None
        autocast = torch.autocast(
            device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        )
        # Under ZeRO-3 a parameter is emptied when its module's forward ends. Convolutions save
        # the parameter itself for the second backward; a detached alias keeps the numbers.
        kept = (
            torch.autograd.graph.saved_tensors_hooks(_keep_storage, _unchanged)
            if self.keep_gathered
            else nullcontext()
        )
        with autocast, kept:
            loss, metrics = self.objective(self.energy, batch, negatives, generator)
        if loss.ndim != 0:
            raise ValueError(
                f"objective {type(self.objective).__name__} returned a loss of shape "
                f"{tuple(loss.shape)}; expected a scalar"
            )
        loss = loss.float()
        return loss, {
            **{
                name: torch.as_tensor(value, device=device).detach()
                for name, value in metrics.items()
            },
            "loss/total": loss.detach(),
        }


def _keep_storage(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
