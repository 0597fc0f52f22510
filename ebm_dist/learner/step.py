"""The module that DeepSpeed wraps: its forward computes the whole loss.

Gradients with respect to x are wrong if they pass through a DeepSpeed engine: its output hooks
divide them by the accumulation steps (silently at stages 1 and 3, with an error at 0 and 2). So the
objective runs inside this forward, with every inner `autograd.grad` that it needs, and returns a
scalar loss only. `tests/distributed/test_engine_deepspeed_facts.py` tests both facts.
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
            autocast_dtype: the dtype in which networks compute; None means float32. Weights stay
                float32 either way, and so do buffers such as spectral norm's vectors.
            keep_gathered: keep the weights gathered for the forward (ZeRO-3) in memory until the
                backward has used them. Optimiser state and gradients remain sharded.
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
        # Seeding takes a CPU .18 ms right after an update: 1% of a small network's update.
        draws = not isinstance(self.objective, Objective) or self.objective.needs_generator
        generator = seeded(seed, device) if draws else None
        autocast = torch.autocast(
            device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        )
        # ZeRO-3 empties a parameter when its module's forward ends. Convolutions save the parameter
        # itself for the second backward; a detached alias keeps its storage alive.
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
