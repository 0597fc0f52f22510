"""Annealed Langevin dynamics: Langevin steps at a temperature that falls to its final value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import (
    FAMILY,
    KernelSection,
    noise_buffer,
    norm_event,
    start,
    value_and_grad,
)
from ebm_dist.samplers.traits import EulerMaruyama


@dataclass(frozen=True, slots=True)
class AnnealedLangevinState:
    """Chains, with the gradient that their next move follows and the number of moves so far."""

    position: Tensor  # (B, *event), float32
    energy: Tensor  # (B,), E(position)
    grad: Tensor  # (B, *event), dE/dx at position
    num_moves: int  # since `init`, which starts the cooling


@dataclass(frozen=True, slots=True)
class AnnealedLangevinInfo:
    """Reported for each move."""

    grad_norm: Tensor  # (B,), of the gradient that the move followed
    move_temperature: Tensor  # (B,), T_k of this move, the same for every chain


@dataclass(frozen=True, slots=True)
class AnnealedLangevin(EulerMaruyama):
    """x' = x - h dE/dx + sqrt(2 T_k h) xi, with T_k falling geometrically.

    T_k = T_0 (T / T_0)^(k / (K - 1)) for k < K, and T from then on. This applies the idea of
    Song & Ermon (2019), arXiv:1907.05600, to one energy, with temperatures in place of noise
    levels. The step size stays constant, since the stability of a step depends on h times the
    curvature and not on T. Cooling starts at `init`, hence anew in every round.
    """

    step_size: float
    """h, in squared data units."""
    temperature: float = 1.0
    """T, the final temperature."""
    start_temperature: float = 10.0
    """T_0, the temperature of the first move."""
    num_annealing_steps: int = 50
    """K, the number of moves until `temperature` is reached."""

    tunable: ClassVar[str] = "step_size"

    def temperature_at(self, num_moves: int) -> float:
        """T_k of the move after the first `num_moves`."""
        if num_moves >= self.num_annealing_steps - 1:
            return self.temperature
        fraction = num_moves / (self.num_annealing_steps - 1)
        return self.start_temperature * (self.temperature / self.start_temperature) ** fraction

    def init(self, x: Tensor, energy: EnergyFn) -> AnnealedLangevinState:
        position = start(x, energy)
        return AnnealedLangevinState(position, *value_and_grad(energy, position, first=True), 0)

    def step(
        self, state: AnnealedLangevinState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[AnnealedLangevinState, AnnealedLangevinInfo]:
        own = replace(state, position=state.position.clone())
        return self.step_(own, energy, generator, noise_buffer(state.position))

    def step_(
        self,
        state: AnnealedLangevinState,
        energy: EnergyFn,
        generator: torch.Generator,
        noise: Tensor,
    ) -> tuple[AnnealedLangevinState, AnnealedLangevinInfo]:
        t = self.temperature_at(state.num_moves)
        info = AnnealedLangevinInfo(
            grad_norm=norm_event(state.grad), move_temperature=torch.full_like(state.energy, t)
        )
        position = state.position.add_(state.grad, alpha=-self.step_size)
        noise.normal_(generator=generator)
        position.add_(noise, alpha=(2 * t * self.step_size) ** 0.5)
        new = AnnealedLangevinState(
            position, *value_and_grad(energy, position), state.num_moves + 1
        )
        return new, info


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
    """Number of moves until `temperature` is reached; keep it at or below num_steps."""

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
