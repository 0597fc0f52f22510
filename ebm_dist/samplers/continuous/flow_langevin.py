"""The chains of energy matching: they flow from noise towards the data, then heat to T and stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from ebm_dist.samplers.continuous.annealed_langevin import ClockedLangevin
from ebm_dist.samplers.kernel import FAMILY, KernelSection


@dataclass(frozen=True, slots=True)
class FlowLangevin(ClockedLangevin):
    """x' = x - h dE/dx + sqrt(2 T(t) h) xi at the time t = k h of the chain's k-th move.

    T(t) is 0 before the cutoff tau, rises linearly to T at time 1, and stays there: the chain
    first follows the flow that -dE/dx is trained to be, and then samples exp(-E/T). Balcerak et al.
    (2025), arXiv:2504.10612, section 3 and algorithm 2, where T is epsilon_max.
    """

    step_size: float
    """h, the step of time and in squared data units."""
    temperature: float = 1.0
    """T, from time 1 on."""
    time_cutoff: float = 0.9
    """tau, the time until which the chain flows without noise."""

    def temperature_at(self, clock: Tensor) -> Tensor:
        # A nudge far below h: 1 is reached at the move that it is meant for, whatever the rounding.
        time = clock.double() * self.step_size + 1e-9
        if self.time_cutoff == 1:
            ramp = (time >= 1).double()
        else:
            ramp = (time - self.time_cutoff) / (1 - self.time_cutoff)
        return self.temperature * ramp.clamp(0.0, 1.0)


@FAMILY.register
class FlowLangevinSection(KernelSection):
    """Langevin steps, first without noise and then at a temperature that rises to its end."""

    name: Literal["flow_langevin"] = "flow_langevin"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.1, "time_cutoff": 0.2}

    step_size: PositiveFloat
    """h, in squared data units, and the step of time: a chain has flowed after 1 / h steps. Energy
    matching: 0.01."""

    temperature: PositiveFloat = 1.0
    """T, the temperature from time 1 on. Energy matching: 0.01 (epsilon_max)."""

    time_cutoff: float = Field(default=0.9, gt=0.0, le=1.0)
    """Time until which a chain flows without noise; objective.time_cutoff of energy matching."""

    @property
    def num_scheduled_steps(self) -> int:
        return math.ceil(1 / self.step_size - 1e-9)

    def build(self) -> FlowLangevin:
        return FlowLangevin(
            step_size=self.step_size,
            temperature=self.temperature,
            time_cutoff=self.time_cutoff,
        )
