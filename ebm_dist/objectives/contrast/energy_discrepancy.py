"""Energy discrepancy: data against their own noised neighbours, without chains or scores."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from einops import rearrange, repeat
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ebm_dist.core.types import Batch, EnergyFn, EventKind, EventSpec, Negatives
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energies_of,
    given,
    normal_like,
    uniform,
)


@FAMILY.register
class EnergyDiscrepancySection(ObjectiveSection):
    """Contrast each datum with points made from it by adding noise twice."""

    name: Literal["energy_discrepancy"] = "energy_discrepancy"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real", "image", "binary")
    example: ClassVar[dict[str, Any]] = {"noise_std": 0.5, "flips": False}
    far_modes: ClassVar[str] = (
        "seen where the noise (objective.noise_std, flip_prob) reaches from one to the next, "
        "not below"
    )

    noise_std: PositiveFloat = 0.5
    """Standard deviation of the noise on real data. Near 0 the loss is score matching; for large
    values it approaches likelihood, and its variance grows."""

    flip_prob: float = Field(default=0.1, gt=0.0, lt=0.5)
    """Probability that the noise flips a bit, on binary data."""

    flips: bool | None = None
    """Whether noise flips bits; taken from the data when left out."""

    num_samples: PositiveInt = 16
    """M, the number of contrasted points for each datum."""

    stabiliser: NonNegativeFloat = 1.0
    """w, the weight of the datum itself among these points. It bounds the loss from below at finite
    M."""

    @property
    def takes_negatives(self) -> bool:
        return False  # asked before the events are known, without which it cannot be built

    def bind(self, spec: EventSpec) -> Self:
        bound = super().bind(spec)
        flips = spec.kind == "binary"
        if bound.flips not in (None, flips):
            raise ValueError(
                f"objective.flips: {bound.flips}, but the data is {spec.kind}; leave it out"
            )
        return bound.model_copy(update={"flips": flips})

    def module(self) -> Objective:
        if self.flips is None:
            raise ValueError(
                "objective.flips: left to the data, but the section is not bound to any; give "
                "true for binary events, false for others"
            )
        return EnergyDiscrepancy(self, flips=self.flips)


class EnergyDiscrepancy(Objective):
    """mean over data of log( w/M + 1/M sum_j exp(U(x) - U(x_j)) ), U = E/T.

    x_j = x + s xi + s xi_j: all points of a datum share xi, and xi_j is drawn for each point. For
    bits both sums are random flips. Schroeder et al. (2023), arXiv:2307.06431, eq. 8.

    Sees the weights of far modes where the noise reaches from one to the next, not below.
    """

    needs_generator = True

    def __init__(self, config: EnergyDiscrepancySection, *, flips: bool) -> None:
        super().__init__()
        self.config = config
        self.flips = flips

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        x, num, generator = batch.x.detach(), self.config.num_samples, given(generator)
        noised = self.perturb(x, generator)
        others = self.perturb(repeat(noised, "b ... -> (b m) ...", m=num), generator)
        values = energies_of(energy, torch.cat([x, others])) / self.config.fitted_temperature
        here, there = values[: len(x)], rearrange(values[len(x) :], "(b m) -> b m", m=num)
        difference = rearrange(here, "b -> b 1") - there
        if self.config.stabiliser > 0:
            own = math.log(self.config.stabiliser)
            difference = torch.cat([difference, torch.full_like(difference[:, :1], own)], 1)
        loss = (difference.logsumexp(1) - math.log(num)).mean()
        return loss, {
            "energy/positive": here.detach().mean() * self.config.fitted_temperature,
            "loss/total": loss.detach(),
        }

    def perturb(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x with noise added once."""
        if not self.flips:
            return x + self.config.noise_std * normal_like(x, generator)
        flip = uniform(x.shape, x, generator) < self.config.flip_prob
        return torch.where(flip, 1 - x, x)
