"""A worker's round on chains with Jarzynski weights: from each chain's version to today's.

Two steps. The chains stand and the weights move, in one jump however many versions it skips:
A' = A + (E_recorded - E_now)/T. Then the weights stand and the chains move: a kernel that keeps
exp(-E/T) changes no weight; an unadjusted Langevin step changes it by the ratio of its forward
and backward densities.

The learner is shown the chains between the two, weighted, and they are resampled there where the
weights have degenerated, so that copies part again before anybody sees them. All the moves of the
round then lie between what the learner saw and where the next jump is measured. A jump measured
at the very places where the learner has just raised the energy is too low for every chain, and
log Z drifts off by about lr * (variance of dE/dtheta that the moves leave) / capacity an update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_dist.core.energy_call import energy_at
from ebm_dist.core.types import EnergyFn
from ebm_dist.jarzynski.weights import ula_step, weights_moved
from ebm_dist.samplers import Kernel, Langevin
from ebm_dist.samplers.continuous.langevin import LangevinState

GAIN = "log_weight_gain"


@dataclass(frozen=True, slots=True)
class WeightedInfo:
    """What one weighted Langevin move reports."""

    grad_norm: Tensor  # (B,)
    log_weight_gain: Tensor  # (B,), what the move adds to A


@dataclass(frozen=True, slots=True)
class WeightedLangevin:
    """Langevin moves, the same bit for bit, that report what they add to the log-weight."""

    kernel: Langevin

    @property
    def temperature(self) -> float:
        return self.kernel.temperature

    def init(self, x: Tensor, energy: EnergyFn) -> LangevinState:
        return self.kernel.init(x, energy)

    def step(
        self, state: LangevinState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[LangevinState, WeightedInfo]:
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
    """`kernel` with the gain in its info where its moves change weights."""
    return WeightedLangevin(kernel) if isinstance(kernel, Langevin) else kernel


@torch.no_grad()
def carried(
    log_weight: Tensor, recorded: Tensor, x: Tensor, energy: EnergyFn, temperature: float
) -> tuple[Tensor, Tensor]:
    """Energies and log-weights, (M,) float64, of chains x (M, *event) under today's weights.

    Args:
        log_weight: (M,), A under the weights that moved each chain last.
        recorded: (M,), the energies under those; 0 for a chain that nothing has moved.
        energy: holds today's weights.
    """
    now = energy_at(energy, x).double().cpu()
    moved = weights_moved(log_weight.double(), recorded.double(), now, temperature=temperature)
    return now, moved
