"""A worker's round on chains with Jarzynski weights: from each chain's version to the current one.

A round has two steps. First the positions are fixed and the energy changes, over any number of
versions at once: A' = A + (E_recorded - E_now)/T. Then the energy is fixed and the chains move. A
kernel that keeps exp(-E/T) invariant changes no log-weight; an unadjusted Langevin step changes it
by the ratio of its forward and backward densities.

The learner gets the chains with their weights as they are between the two steps. If the weights
have degenerated, the chains are resampled there, and the moves of the round separate the copies
before anybody uses them. So all moves of a round lie between the positions that the learner used
and those where the next change of energy is measured. Measured at the positions where the learner
has just raised the energy, the change would be too low for every chain, and log Z would drift by
about lr * (variance of dE/dtheta that the moves leave) / capacity per update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_dist.core.events import energy_at
from ebm_dist.core.types import EnergyFn
from ebm_dist.jarzynski.weights import ula_step, weights_moved
from ebm_dist.samplers import Kernel, Langevin
from ebm_dist.samplers.continuous.gradient import GradientState

GAIN = "log_weight_gain"


@dataclass(frozen=True, slots=True)
class WeightedInfo:
    """Reported for each weighted Langevin move."""

    grad_norm: Tensor  # (B,)
    log_weight_gain: Tensor  # (B,), the change of A by the move


@dataclass(frozen=True, slots=True)
class WeightedLangevin:
    """`Langevin`, with the same moves bit for bit, that also reports the change of log-weights."""

    kernel: Langevin

    @property
    def temperature(self) -> float:
        return self.kernel.temperature

    def init(self, x: Tensor, energy: EnergyFn) -> GradientState:
        return self.kernel.init(x, energy)

    def step(
        self, state: GradientState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[GradientState, WeightedInfo]:
        new, info = self.kernel.step(state, energy, generator)
        gain = ula_step(
            torch.zeros_like(state.energy),
            state.position,
            state.energy,
            state.grad,
            new.position,
            new.energy,
            new.grad,
            step_size=self.kernel.step_size,
            temperature=self.kernel.temperature,
        )
        return new, WeightedInfo(info.grad_norm, gain)


def weighted(kernel: Kernel) -> Kernel:
    """`kernel`; if its moves change log-weights, then with that change in its info."""
    return WeightedLangevin(kernel) if isinstance(kernel, Langevin) else kernel


@torch.no_grad()
def carried(
    log_weight: Tensor, recorded: Tensor, x: Tensor, energy: EnergyFn, temperature: float
) -> tuple[Tensor, Tensor]:
    """Energies and log-weights, (M,) float64, of chains x (M, *event) under the current weights.

    Args:
        log_weight: (M,), A under the weights that each chain last moved under.
        recorded: (M,), the energies under those weights; 0 for a chain that has never moved.
        energy: has the current weights.
    """
    now = energy_at(energy, x).double().cpu()
    moved = weights_moved(log_weight.double(), recorded.double(), now, temperature=temperature)
    return now, moved
