"""Random-walk Metropolis: Gaussian steps, no gradient needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import FAMILY, KernelSection, normal, select, start, value
from ebm_dist.samplers.metropolis import MetropolisInfo, decide


@dataclass(frozen=True, slots=True)
class RandomWalkState:
    """Chains and their energies."""

    position: Tensor  # (B, *event), float32
    energy: Tensor  # (B,), E(position)


@dataclass(frozen=True, slots=True)
class RandomWalk:
    """x' = x + s xi, accepted with probability min(1, exp(-(E(x') - E(x)) / T)).

    Metropolis et al. (1953). The energy need not be differentiable.
    """

    proposal_std: float
    """s, in data units."""
    temperature: float = 1.0

    tunable: ClassVar[str] = "proposal_std"
    reversible: ClassVar[bool] = True
    leaves_invariant: ClassVar[bool] = True
    target_acceptance: ClassVar[float] = 0.234
    """Optimal in high dimension (Roberts, Gelman & Gilks 1997); the optimum in one is .44."""

    def init(self, x: Tensor, energy: EnergyFn) -> RandomWalkState:
        position = start(x, energy)
        return RandomWalkState(position, value(energy, position, first=True))

    def step(
        self, state: RandomWalkState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[RandomWalkState, MetropolisInfo]:
        noise = normal(state.position, generator)
        position = state.position.add(noise, alpha=self.proposal_std)
        new = RandomWalkState(position, value(energy, position))
        accepted, info = decide((state.energy - new.energy) / self.temperature, generator)
        return select(accepted, new, state), info


@FAMILY.register
class RandomWalkSection(KernelSection):
    """Random-walk Metropolis: Gaussian steps, no gradient needed."""

    name: Literal["random_walk"] = "random_walk"
    example: ClassVar[dict[str, Any]] = {"proposal_std": 1.0}

    proposal_std: PositiveFloat
    """Standard deviation of a proposed step, in data units."""

    temperature: PositiveFloat = 1.0
    """T of the law exp(-E/T)."""

    def build(self) -> RandomWalk:
        return RandomWalk(proposal_std=self.proposal_std, temperature=self.temperature)
