"""Score matching, explicit: the Laplacian of the energy, one dimension at a time."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ebm_dist.core.events import sum_event
from ebm_dist.core.types import Batch, EnergyFn, EventKind, Negatives
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energy_and_grad,
    input_grad,
)


@FAMILY.register
class ScoreMatchingSection(ObjectiveSection):
    """Match dE/dx/T to minus the score of the data, with the exact Laplacian."""

    name: Literal["score_matching"] = "score_matching"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real", "image")
    example: ClassVar[dict[str, Any]] = {}
    far_modes: ClassVar[str] = "not seen: the score within a mode does not depend on its weight"

    max_event_size: PositiveInt = 1024
    """Refuse larger events: the Laplacian costs one backward pass for each of their numbers."""

    def module(self) -> Objective:
        return ScoreMatching(self.fitted_temperature, self.max_event_size)


class ScoreMatching(Objective):
    """mean[ 1/2 |dU/dx|^2 - Laplacian U ] over the data, U = E/T.

    The Fisher divergence to the data, minus a constant that depends on the data alone.
    Hyvarinen (2005), JMLR 6, eq. 4.

    Does not see the weights of far modes: the score within a mode does not depend on its weight.
    """

    def __init__(self, temperature: float, max_event_size: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.max_event_size = max_event_size

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        size = batch.x[0].numel()
        if size > self.max_event_size:
            raise ValueError(
                f"batch.x: events of {size} numbers, objective.max_event_size is "
                f"{self.max_event_size}; use objective.name: sliced_score_matching, or raise it"
            )
        leaf, values, grad = energy_and_grad(energy, batch.x)
        with torch.enable_grad():
            trace = laplacian(leaf, grad) / self.temperature
            slope = sum_event(grad.square()) / self.temperature**2
            loss = (0.5 * slope - trace).mean()
        return loss, {"energy/positive": values.detach().mean(), "loss/total": loss.detach()}


def laplacian(leaf: Tensor, grad: Tensor) -> Tensor:
    """Trace (B,) of the Hessian, from the gradient (B, *event) at the leaf."""
    flat = grad.flatten(1)
    # Events do not interact, so the gradient of a sum over the batch gives each one's own Hessian.
    rows = [input_grad(flat[:, i], leaf).flatten(1)[:, i] for i in range(flat.shape[1])]
    return torch.stack(rows, 1).sum(1)
