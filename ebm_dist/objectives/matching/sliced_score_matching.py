"""Score matching, sliced: the Laplacian through random projections."""

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
    given,
    input_grad,
    integers,
    normal_like,
)


@FAMILY.register
class SlicedScoreMatchingSection(ObjectiveSection):
    """Match the score of the data along random directions: two backward passes a direction."""

    name: Literal["sliced_score_matching"] = "sliced_score_matching"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real", "image")
    example: ClassVar[dict[str, Any]] = {}
    far_modes: ClassVar[str] = "not seen: the score within a mode does not depend on its weight"

    num_projections: PositiveInt = 1
    """Directions for each datum."""

    projection: Literal["rademacher", "gaussian"] = "rademacher"
    """Law of a direction. Both have unit covariance; random signs give the smaller variance."""

    variance_reduced: bool = True
    """Use |dU/dx|^2 itself in place of the squared slope along the direction."""

    def module(self) -> Objective:
        return SlicedScoreMatching(self)


class SlicedScoreMatching(Objective):
    """mean[ 1/2 |dU/dx|^2 - v.(Hessian U).v ], E[v v^T] = 1, U = E/T.

    Its mean over v is the explicit loss. Song et al. (2019), arXiv:1905.07088, eq. 7 and 8
    (variance reduced).

    Does not see the weights of far modes: the score within a mode does not depend on its weight.
    """

    needs_generator = True

    def __init__(self, config: SlicedScoreMatchingSection) -> None:
        super().__init__()
        self.config = config

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        config = self.config
        leaf, values, grad = energy_and_grad(energy, batch.x)
        total = batch.x.new_zeros(batch.x.shape[:1])
        with torch.enable_grad():
            for _ in range(config.num_projections):
                if config.projection == "gaussian":
                    v = normal_like(leaf.detach(), generator)
                else:
                    v = 2.0 * integers(2, leaf.shape, leaf, given(generator)).to(leaf.dtype) - 1.0
                along = sum_event(v * grad)
                curvature = sum_event(v * input_grad(along, leaf)) / config.fitted_temperature
                slope = sum_event(grad.square()) if config.variance_reduced else along.square()
                total = total + 0.5 * slope / config.fitted_temperature**2 - curvature
            loss = total.mean() / config.num_projections
        return loss, {"energy/positive": values.detach().mean(), "loss/total": loss.detach()}
