"""Metropolis-adjusted Langevin: Langevin proposals, each accepted or rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from ebm_dist.core.events import sum_event
from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.continuous.gradient import GradientState, StartsWithGradient
from ebm_dist.samplers.kernel import FAMILY, KernelSection, normal, select, value_and_grad
from ebm_dist.samplers.metropolis import MetropolisInfo, decide


def log_proposal_ratio(
    noise: Tensor, grad: Tensor, grad_new: Tensor, step_size: float, temperature: float
) -> Tensor:
    """log q(x | x') - log q(x' | x), (B,), for x' = x - h g + sqrt(2 T h) xi.

    The move back has noise xi' with x = x' - h g' + sqrt(2 T h) xi', that is xi' = c - xi with
    c = h (g + g') / sqrt(2 T h). So the ratio is (|xi|^2 - |xi'|^2) / 2 = c . (xi - c/2), which
    avoids the difference of two large sums.
    """
    noise_std = (2 * temperature * step_size) ** 0.5
    c = (grad + grad_new).mul_(step_size / noise_std)
    return sum_event(c * noise.sub(c, alpha=0.5))


@dataclass(frozen=True, slots=True)
class Mala(StartsWithGradient):
    """x' = x - h dE/dx + sqrt(2 T h) xi, accepted or rejected by Metropolis-Hastings.

    Its law is exactly exp(-E/T) at any step size. Roberts & Tweedie (1996), Bernoulli 2(4).
    """

    step_size: float
    """h, in squared data units."""
    temperature: float = 1.0

    tunable: ClassVar[str] = "step_size"
    reversible: ClassVar[bool] = True
    leaves_invariant: ClassVar[bool] = True
    target_acceptance: ClassVar[float] = 0.574
    """Optimal in high dimension (Roberts & Rosenthal 1998)."""

    def step(
        self, state: GradientState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[GradientState, MetropolisInfo]:
        h, t = self.step_size, self.temperature
        noise = normal(state.position, generator)
        position = state.position.add(state.grad, alpha=-h).add_(noise, alpha=(2 * t * h) ** 0.5)
        new = GradientState(position, *value_and_grad(energy, position))
        log_ratio = (state.energy - new.energy) / t
        log_ratio = log_ratio + log_proposal_ratio(noise, state.grad, new.grad, h, t)
        accepted, info = decide(log_ratio, generator)
        return select(accepted, new, state), info


@FAMILY.register
class MalaSection(KernelSection):
    """Metropolis-adjusted Langevin: exact at any step size."""

    name: Literal["mala"] = "mala"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.5}

    step_size: PositiveFloat
    """h, in squared data units. Aim at an acceptance near .57."""

    temperature: PositiveFloat = 1.0
    """T of the law exp(-E/T)."""

    def build(self) -> Mala:
        return Mala(step_size=self.step_size, temperature=self.temperature)
