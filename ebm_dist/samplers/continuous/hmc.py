"""Hamiltonian Monte Carlo: leapfrog trajectories, each accepted or rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from ebm_dist.core.events import sum_event
from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.continuous.gradient import GradientState, StartsWithGradient
from ebm_dist.samplers.kernel import FAMILY, KernelSection, normal, select, value_and_grad
from ebm_dist.samplers.metropolis import MetropolisInfo, decide


@dataclass(frozen=True, slots=True)
class Hmc(StartsWithGradient):
    """L leapfrog steps of size e from a fresh momentum p ~ N(0, T I), then accept or reject.

    With H(x, p) = E(x) + |p|^2 / 2 the acceptance probability is min(1, exp(-(H' - H) / T)), so
    the law is exactly exp(-E/T). T scales the momentum and not the force, so the same e is stable
    at every T. Neal (2011), arXiv:1206.1901.
    """

    step_size: float
    """e, in data units over momentum; a quadratic of curvature a is stable below 2/sqrt(a)."""
    num_leapfrog_steps: int = 10
    """L; a step computes as many gradients."""
    temperature: float = 1.0

    tunable: ClassVar[str] = "step_size"
    reversible: ClassVar[bool] = True
    leaves_invariant: ClassVar[bool] = True
    target_acceptance: ClassVar[float] = 0.8

    def step(
        self, state: GradientState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[GradientState, MetropolisInfo]:
        e, t = self.step_size, self.temperature
        momentum = normal(state.position, generator).mul_(t**0.5)
        kinetic = 0.5 * sum_event(momentum.square())
        position, grad = state.position.clone(), state.grad
        value = state.energy
        momentum.add_(grad, alpha=-0.5 * e)
        for k in range(self.num_leapfrog_steps):
            position.add_(momentum, alpha=e)
            value, grad = value_and_grad(energy, position)
            last = k + 1 == self.num_leapfrog_steps
            momentum.add_(grad, alpha=-0.5 * e if last else -e)
        new = GradientState(position, value, grad)
        change = value - state.energy + 0.5 * sum_event(momentum.square()) - kinetic
        accepted, info = decide(-change / t, generator)
        return select(accepted, new, state), info


@FAMILY.register
class HmcSection(KernelSection):
    """Hamiltonian Monte Carlo: long moves along leapfrog trajectories, exact at any step size."""

    name: Literal["hmc"] = "hmc"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.3, "num_leapfrog_steps": 5}

    step_size: PositiveFloat
    """Size of a leapfrog step. Aim at an acceptance near .8."""

    num_leapfrog_steps: PositiveInt = Field(default=10, le=10_000)
    """Leapfrog steps in one step of the chain; each computes one gradient."""

    temperature: PositiveFloat = 1.0
    """T of the law exp(-E/T)."""

    def build(self) -> Hmc:
        return Hmc(
            step_size=self.step_size,
            num_leapfrog_steps=self.num_leapfrog_steps,
            temperature=self.temperature,
        )
