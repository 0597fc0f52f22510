"""Simulated tempering over noise levels: chains that move in x and between levels.

The chains sample p(x, t) proportional to exp(-E(x, t)/T) over events and levels together. At high
noise the modes meet, so a chain crosses there and comes down in another mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import FAMILY, Kernel, per_chain, select, uniform
from ebm_dist.samplers.metropolis import decide
from ebm_dist.samplers.tempering.ladder import InnerSection
from ebm_dist.samplers.tempering.levels import at_level, level_of, stds_of
from ebm_dist.samplers.traits import KernelTraits


@dataclass(frozen=True, slots=True)
class SimulatedTemperingState:
    """Chains at their levels. The inner kernel moves u = x / unit."""

    inner: Any  # the state of the inner kernel, under the energy of each chain's level
    level: Tensor  # (B,), int64
    unit: Tensor  # (B,), the length in units of which a chain of this level moves

    @property
    def position(self) -> Tensor:
        """(B, *event), x."""
        return per_chain(self.unit, self.inner.position) * self.inner.position

    @property
    def energy(self) -> Tensor:
        """(B,), E(x, level)."""
        return self.inner.energy


@dataclass(frozen=True, slots=True)
class SimulatedTemperingInfo:
    """Reported for each move."""

    acceptance: Tensor  # (B,), of the move in x; 1 for a kernel without an accept step
    level_acceptance: Tensor  # (B,), acceptance probability of the move between levels


@dataclass(frozen=True, slots=True)
class SimulatedTempering(KernelTraits):
    """Each step moves x by `kernel` at the chain's level, and then the level with x fixed.

    The level above or below is proposed, each with probability 1/2, and accepted with probability
    min(1, exp((E(x, t) - E(x, t'))/T)); there is none beyond the ends. Both moves leave
    p(x, t) = exp(-E(x, t)/T)/Z invariant if `kernel` is exact: Marinari & Parisi (1992), Geyer &
    Thompson (1995). Their weights of the levels are part of E here: the contrast of data and chains
    at all levels trains them (`contrastive_levels`), so nothing has to be adapted beside.

    At level t the inner kernel moves in units of sqrt(d^2 + s_t^2), d the width of a mode and s_t
    the noise, over that of level 0, so that one step size serves every level. Energies without
    levels have one, and the chains move by `kernel` alone.
    """

    kernel: Kernel[Any]
    data_std: float = 0.0
    """d, in data units."""

    moves_level: ClassVar[bool] = True

    @property
    def temperature(self) -> float:
        return self.kernel.temperature

    @property
    def coldest(self) -> Kernel[Any]:
        """The kernel that moves x, whose bias the law of the chains has."""
        return self.kernel

    def init(self, x: Tensor, energy: EnergyFn) -> SimulatedTemperingState:
        level = level_of(energy)
        if level is None:
            level = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self._at(x, energy, level)

    def step(
        self, state: SimulatedTemperingState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[SimulatedTemperingState, SimulatedTemperingInfo]:
        unit = state.unit
        here = at_level(energy, state.level, unit)
        inner, told = self.kernel.step(state.inner, here, generator)
        moved = SimulatedTemperingState(inner, state.level, unit)
        acceptance = getattr(told, "acceptance", torch.ones_like(inner.energy))
        if (num := len(stds_of(energy))) == 1:
            return moved, SimulatedTemperingInfo(acceptance, torch.ones_like(inner.energy))
        up = uniform(inner.energy, generator) < 0.5
        wanted = state.level + torch.where(up, 1, -1)
        there = self._at(moved.position, energy, wanted.clamp(0, num - 1))
        log_ratio = (inner.energy - there.energy) / self.temperature
        accepted, decision = decide(
            torch.where(wanted == there.level, log_ratio, -torch.inf), generator
        )
        new = SimulatedTemperingState(
            select(accepted, there.inner, inner),
            torch.where(accepted, there.level, state.level),
            torch.where(accepted, there.unit, unit),
        )
        return new, SimulatedTemperingInfo(acceptance, decision.acceptance)

    def _at(self, x: Tensor, energy: EnergyFn, level: Tensor) -> SimulatedTemperingState:
        """Chains that stand at x at those levels."""
        stds = torch.tensor(stds_of(energy), dtype=torch.float64)
        width = (self.data_std**2 + stds.square()).sqrt()
        unit = (width / width[0]).float().to(x.device)[level]
        u = x / per_chain(unit, x)
        return SimulatedTemperingState(
            self.kernel.init(u, at_level(energy, level, unit)), level, unit
        )


@FAMILY.register
class SimulatedTemperingSection(InnerSection):
    """Chains that move in x and between the noise levels of the energy."""

    name: Literal["simulated_tempering"] = "simulated_tempering"
    example: ClassVar[dict[str, Any]] = {"kernel": {"name": "mala", "step_size": 0.5}}

    data_std: NonNegativeFloat = 0.0
    """Width d of the narrowest mode in data units. kernel.step_size is that of level 0; at level t
    it is multiplied by (d^2 + s_t^2) / (d^2 + s_0^2), s_t the noise of energy.noise_stds."""

    @model_validator(mode="after")
    def _moves_positions_alone(self) -> Self:
        built = self.inner()
        for trait_, what in (("reads_clock", "a schedule"), ("exchanged", "a momentum")):
            if getattr(built, trait_, False):
                raise ValueError(
                    f"kernel: has {what}, which a move to another level would break; use mala, "
                    "hmc or langevin"
                )
        return self

    def build(self) -> SimulatedTempering:
        return SimulatedTempering(kernel=self.inner(), data_std=self.data_std)
