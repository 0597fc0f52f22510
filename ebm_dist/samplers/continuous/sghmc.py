"""Underdamped Langevin dynamics, known as stochastic gradient Hamiltonian Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from ebm_dist.core.events import per_chain
from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.continuous.gradient import GradientState, MovesInPlace
from ebm_dist.samplers.kernel import FAMILY, KernelSection, norm_event, start, value_and_grad


@dataclass(frozen=True, slots=True)
class SghmcState(GradientState):
    """Chains in phase space."""

    velocity: Tensor  # (B, *event)


@dataclass(frozen=True, slots=True)
class SghmcInfo:
    """Reported for each move."""

    grad_norm: Tensor  # (B,), of the gradient that the move followed
    kinetic: Tensor  # (B,), mean of v^2 over the event after the move; T as h -> 0


@dataclass(frozen=True, slots=True)
class Sghmc(MovesInPlace[SghmcState, SghmcInfo]):
    """v' = (1 - gamma h) v - h dE/dx + sqrt(2 gamma T h) xi, x' = x + h v'.

    Chen, Fox & Guestrin (2014), arXiv:1402.4102. Momentum carries chains across flat
    valleys that Langevin diffuses through. Chains start at rest. No accept step: on a
    quadratic of curvature a the variance is (T/a) / (1 - a h^2 / (2 (2 - gamma h))).
    """

    step_size: float
    """h, in data units over velocity."""
    friction: float
    """gamma, per unit of time; gamma h < 1."""
    temperature: float = 1.0

    tunable: ClassVar[str] = "step_size"
    overwrites: ClassVar[tuple[str, ...]] = ("position", "velocity")
    temperature_ratio_formula: ClassVar[str] = "1 - a h² / (2 (2 - γ h))"

    def temperature_ratio(self, curvature: float) -> float:
        """T / T_eff of the chains on a quadratic of that curvature."""
        return 1 - curvature * self.step_size**2 / (2 * (2 - self.friction * self.step_size))

    def init(self, x: Tensor, energy: EnergyFn) -> SghmcState:
        position = start(x, energy)
        value, grad = value_and_grad(energy, position, first=True)
        return SghmcState(position, value, grad, torch.zeros_like(position))

    def step_(
        self, state: SghmcState, energy: EnergyFn, generator: torch.Generator, noise: Tensor
    ) -> tuple[SghmcState, SghmcInfo]:
        h, gamma = self.step_size, self.friction
        noise_std = (2 * gamma * self.temperature * h) ** 0.5
        velocity = state.velocity.mul_(1 - gamma * h).add_(state.grad, alpha=-h)
        velocity.add_(noise.normal_(generator=generator), alpha=noise_std)
        position = state.position.add_(velocity, alpha=h)
        info = SghmcInfo(
            grad_norm=norm_event(state.grad), kinetic=velocity.square().flatten(1).mean(1)
        )
        return SghmcState(position, *value_and_grad(energy, position), velocity), info

    def exchanged(self, state: SghmcState, scale: Tensor) -> SghmcState:
        """`state` after an exchange with another temperature.

        Velocities are rescaled to the new temperature. The kinetic energies then cancel, and the
        acceptance of the exchange depends on the energies alone.

        Args:
            scale: (B,), sqrt(T_here / T_there); 1 for a chain that was not exchanged.
        """
        return replace(state, velocity=state.velocity * per_chain(scale, state.velocity))


@FAMILY.register
class SghmcSection(KernelSection):
    """Underdamped Langevin: momentum carries chains across flat valleys faster than diffusion."""

    name: Literal["sghmc"] = "sghmc"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.1, "friction": 1.0}

    step_size: PositiveFloat
    """h. A step moves by h times the velocity, so h**2 compares to langevin's step_size."""

    friction: PositiveFloat
    """gamma; step_size * friction must be below 1. Less friction keeps more momentum."""

    temperature: NonNegativeFloat = 1.0
    """T of the law exp(-E/T)."""

    @model_validator(mode="after")
    def _damped(self) -> SghmcSection:
        if self.step_size * self.friction >= 1:
            raise ValueError(
                f"step_size * friction must be below 1, got {self.step_size * self.friction:g}; "
                "the velocity would change sign at every step"
            )
        return self

    def build(self) -> Sghmc:
        return Sghmc(step_size=self.step_size, friction=self.friction, temperature=self.temperature)
