"""Annealed Langevin dynamics: Langevin steps at a temperature that falls to its final value.

The temperature depends on the age of each chain. `run_chain` starts every chain at age 0, or at the
`clock` that it is given: a schedule of 200 steps is one round of 200, or twenty rounds of ten on
chains that carry a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from ebm_dist.core.events import per_chain
from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.continuous.gradient import GradientState, MovesInPlace
from ebm_dist.samplers.kernel import FAMILY, KernelSection, norm_event, start, value_and_grad
from ebm_dist.samplers.traits import EulerMaruyama, KernelTraits


@dataclass(frozen=True, slots=True)
class ClockedState(GradientState):
    """Chains, with their ages."""

    clock: Tensor  # (B,), int64, moves since the chain started


@dataclass(frozen=True, slots=True)
class ClockedInfo:
    """Reported for each move."""

    grad_norm: Tensor  # (B,), of the gradient that the move followed
    move_temperature: Tensor  # (B,), T(k) of this move


class ClockedLangevin(MovesInPlace[ClockedState, ClockedInfo], EulerMaruyama, KernelTraits):
    """x' = x - h dE/dx + sqrt(2 T(k) h) xi, where k is the number of moves that the chain has made.

    The step size stays constant, since the stability of a step depends on h times the curvature
    and not on T.
    """

    __slots__ = ()

    reads_clock: ClassVar[bool] = True
    tunable: ClassVar[str] = "step_size"

    def temperature_at(self, clock: Tensor) -> Tensor:
        """T(k), float64, of the move after the first `clock` (B,)."""
        raise NotImplementedError

    def init(self, x: Tensor, energy: EnergyFn, clock: Tensor | None = None) -> ClockedState:
        """Start chains at `x`.

        Args:
            clock: (B,) int64, moves that each chain has made; none where left out.
        """
        position = start(x, energy)
        if clock is None:
            clock = torch.zeros(len(position), dtype=torch.int64, device=position.device)
        return ClockedState(position, *value_and_grad(energy, position, first=True), clock)

    def step_(
        self, state: ClockedState, energy: EnergyFn, generator: torch.Generator, noise: Tensor
    ) -> tuple[ClockedState, ClockedInfo]:
        t = self.temperature_at(state.clock)
        info = ClockedInfo(norm_event(state.grad), t.to(state.energy.dtype))
        position = state.position.add_(state.grad, alpha=-self.step_size)
        noise.normal_(generator=generator)
        scale = (2 * t * self.step_size).sqrt().to(position.dtype)
        position.add_(noise.mul_(per_chain(scale, noise)))
        return ClockedState(position, *value_and_grad(energy, position), state.clock + 1), info


@dataclass(frozen=True, slots=True)
class AnnealedLangevin(ClockedLangevin):
    """x' = x - h dE/dx + sqrt(2 T_k h) xi, with T_k falling geometrically.

    T_k = T_0 (T / T_0)^(k / (K - 1)) for k < K, and T from then on. This applies the idea of
    Song & Ermon (2019), arXiv:1907.05600, to one energy, with temperatures in place of noise
    levels. Chains with `buffer.context.clock` cool once, over many rounds; others anew in every
    round.
    """

    step_size: float
    """h, in squared data units."""
    temperature: float = 1.0
    """T, the final temperature."""
    start_temperature: float = 10.0
    """T_0, the temperature of the first move."""
    num_annealing_steps: int = 50
    """K, the number of moves until `temperature` is reached."""

    def temperature_at(self, clock: Tensor) -> Tensor:
        if self.num_annealing_steps == 1:
            return torch.full_like(clock, self.temperature, dtype=torch.float64)
        fraction = (clock.double() / (self.num_annealing_steps - 1)).clamp(max=1.0)
        return self.start_temperature * (self.temperature / self.start_temperature) ** fraction


@FAMILY.register
class AnnealedLangevinSection(KernelSection):
    """Langevin steps at a temperature that falls geometrically to its final value."""

    name: Literal["annealed_langevin"] = "annealed_langevin"
    example: ClassVar[dict[str, Any]] = {
        "step_size": 0.05,
        "start_temperature": 4.0,
        "num_annealing_steps": 10,
    }

    step_size: PositiveFloat
    """h, in squared data units."""

    temperature: PositiveFloat = 1.0
    """T, the final temperature."""

    start_temperature: PositiveFloat = 10.0
    """Temperature of the first move; not below `temperature`."""

    num_annealing_steps: PositiveInt = 50
    """Number of moves until `temperature` is reached; at most num_steps, unless chains carry
    buffer.context.clock."""

    @model_validator(mode="after")
    def _falls(self) -> AnnealedLangevinSection:
        if self.start_temperature < self.temperature:
            raise ValueError(
                f"start_temperature must be at least temperature, got {self.start_temperature:g} "
                f"below {self.temperature:g}"
            )
        return self

    def build(self) -> AnnealedLangevin:
        return AnnealedLangevin(
            step_size=self.step_size,
            temperature=self.temperature,
            start_temperature=self.start_temperature,
            num_annealing_steps=self.num_annealing_steps,
        )
