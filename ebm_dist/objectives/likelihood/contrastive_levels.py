"""Contrastive likelihood of events and noise levels together, p(x, level)."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ebm_dist.core.events import per_chain
from ebm_dist.core.types import Batch, EnergyFn, EventKind, Negatives
from ebm_dist.energies.context import trait
from ebm_dist.objectives.likelihood.weighted_gap import weighted_gap
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energies_of,
    given,
    integers,
    normal_like,
)
from ebm_dist.objectives.weighting import Truncation


@FAMILY.register
class ContrastiveLevelsSection(ObjectiveSection):
    """mean E(x+, t) - weighted mean E(x-, t): chains of p(x, level), whose level moves too."""

    name: Literal["contrastive_levels"] = "contrastive_levels"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real", "image")
    example: ClassVar[dict[str, Any]] = {}
    far_modes: ClassVar[str] = (
        "seen with sampler.name simulated_tempering, where the largest of energy.noise_stds "
        "reaches from one to the next: chains cross at the noisy levels"
    )

    energy_l2: NonNegativeFloat = 0.0
    """Weight of mean E(x+)^2 + mean E(x-)^2, which bounds the free additive constant of E."""

    truncation: Truncation = None
    """Largest weight of a stale negative in units of the mean one, `inf` for no limit; sqrt(M)
    when left out."""

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset({"level"})

    def reads_temperature(self, *, reweights: bool) -> bool:
        return reweights

    def chain_energy(self, energy: nn.Module) -> nn.Module:
        if "level" not in trait(energy, "context"):
            raise ValueError(
                "energy.num_levels: not set, but objective.name contrastive_levels fits "
                "E(x, level); set energy.num_levels and energy.noise_stds, or objective.name: "
                "contrastive"
            )
        return energy

    def module(self) -> Objective:
        return ContrastiveLevels(self)


class ContrastiveLevels(Objective):
    """Surrogate whose gradient is that of -T * log-likelihood of p(x, t) = exp(-E(x, t)/T)/Z.

        mean E(x+ + s_t xi, t) - sum_i w_i E(x-_i, t_i) + energy_l2 * (mean E+^2 + mean E-^2)

    Data are spread evenly over the levels t and get their noise s_t, xi ~ N(0, I). So p(t) of the
    data is uniform, and the fitted law has equal mass at every level: the contrast trains the
    weights that simulated tempering (Marinari & Parisi 1992) needs, as a part of E. With chains
    that stay at their level, those weights stay undetermined. An energy without levels is fitted to
    the data as they are.

    Sees the weights of far modes if chains cross at the noisy levels.
    """

    needs_negatives = True
    needs_generator = True

    def __init__(self, config: ContrastiveLevelsSection) -> None:
        super().__init__()
        self.config = config

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        assert negatives is not None
        config, data, stds = self.config, batch.x.detach(), trait(energy, "noise_stds")
        chains = negatives.x.to(data.dtype)
        extra: Metrics = {}
        if stds is None:  # one level without noise
            values = energies_of(energy, torch.cat([data, chains]))
        else:
            if (of_chains := negatives.context.get("level")) is None:
                raise ValueError(
                    "negatives.context: no level, which contrastive_levels reads; set "
                    "buffer.context.level: stratified"
                )
            noisy, level = with_noise(data, stds, given(generator))
            at_level = partial(energy, level=torch.cat([level, of_chains]))
            values = energies_of(at_level, torch.cat([noisy, chains]))
            occupied = one_hot(of_chains, len(stds)).float().mean(0)
            extra["chain/level_occupancy"] = occupied.amin() * len(stds)
        energy_pos, energy_neg = values[: len(data)], values[len(data) :]
        loss, _, metrics = weighted_gap(
            self,
            negatives,
            energy_pos,
            energy_neg,
            temperature=config.fitted_temperature,
            truncation=config.truncation,
            l2=config.energy_l2,
        )
        return loss, metrics | extra | {"loss/total": loss.detach()}


def with_noise(
    x: Tensor, stds: tuple[float, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Events (B, *event) with the noise of their levels, and the levels (B,), evenly spread."""
    first = integers(len(stds), (1,), x, generator)
    level = (first + torch.arange(len(x), device=x.device)) % len(stds)
    std = torch.tensor(stds, dtype=x.dtype).to(x.device)[level]
    return x + per_chain(std, x) * normal_like(x, generator), level
