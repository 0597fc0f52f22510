"""Preconditioned Langevin dynamics: every coordinate moves on the scale of its own variance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.samplers.chain import run_chain
from ebm_dist.samplers.continuous.gradient import GradientState, MovesInPlace
from ebm_dist.samplers.continuous.langevin import LangevinInfo
from ebm_dist.samplers.kernel import (
    FAMILY,
    KernelSection,
    norm_event,
    start,
    value_and_grad,
)
from ebm_dist.samplers.traits import EulerMaruyama


@dataclass(frozen=True, slots=True)
class PreconditionedLangevin(MovesInPlace[GradientState, LangevinInfo], EulerMaruyama):
    """x' = x - h P dE/dx + sqrt(2 T h P) xi, with P = diag(scales).

    This is Langevin in the coordinates x / sqrt(P), so its law is exp(-E/T) for every P as
    h -> 0: a P that does not change with x needs no correction term (Girolami & Calderhead 2011,
    section 5). A coordinate of curvature a and scale p has the variance 2T / (a (2 - a p h)) and
    contracts by 1 - a p h per step. So with scales near the variances all coordinates mix at one
    rate, also in a narrow valley, where a single step size cannot achieve that.

    P is fixed. A P estimated from the gradients during sampling (Li et al. 2016,
    arXiv:1512.07666) samples another law unless the derivative of P is added. `adapt_scales`
    measures P during warm-up.
    """

    step_size: float
    """h; if the scales are variances it has no unit and must be below 2."""
    scales: tuple[float, ...] = (1.0,)
    """The diagonal of P in squared data units: one scale for each number of the event, in memory
    order, or a single one for all."""
    temperature: float = 1.0

    tunable: ClassVar[str] = "step_size"

    def init(self, x: Tensor, energy: EnergyFn) -> GradientState:
        position = start(x, energy)
        self._scales(position)
        return GradientState(position, *value_and_grad(energy, position, first=True))

    def step_(
        self, state: GradientState, energy: EnergyFn, generator: torch.Generator, noise: Tensor
    ) -> tuple[GradientState, LangevinInfo]:
        info = LangevinInfo(grad_norm=norm_event(state.grad))
        scales = self._scales(state.position)
        position = state.position.sub_(state.grad * (self.step_size * scales))
        noise_std = (2 * self.temperature * self.step_size * scales) ** 0.5
        position.add_(noise.normal_(generator=generator).mul_(noise_std))
        return GradientState(position, *value_and_grad(energy, position)), info

    def _scales(self, position: Tensor) -> Tensor:
        """`scales` in the shape of one event."""
        size = math.prod(position.shape[1:])
        if len(self.scales) not in (1, size):
            raise ValueError(
                f"scales: {len(self.scales)} of them, but an event {tuple(position.shape[1:])} has "
                f"{size} numbers; give one for each, or a single one for all"
            )
        scales = position.new_tensor(self.scales)
        return scales if len(self.scales) == 1 else scales.reshape(position.shape[1:])


K = TypeVar("K", bound=PreconditionedLangevin)


def adapt_scales(
    kernel: K, x: Tensor, energy: EnergyFn, num_steps: int, generator: torch.Generator
) -> K:
    """The kernel with `scales` set to the variances of its chains, divided by T.

    Runs `num_steps` warm-up steps from `x` (B, *event) and measures over the chains and the last
    half of the steps. The chains are discarded and the scales are then fixed, for the same reason
    as in `adapt_step_size`.

    Raises:
        ValueError: fewer than 2 steps, or a coordinate that does not vary.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps: expected at least 2, got {num_steps!r}")
    trace = run_chain(kernel, x, energy, num_steps, generator, record_every=1).trace
    assert trace is not None
    variance = trace[num_steps // 2 :].flatten(0, 1).flatten(1).double().var(0)
    if not bool((variance > 0).all()):
        raise ValueError(
            "scales: a coordinate of the chains does not vary; give more chains in x, or a larger "
            "step_size or num_steps"
        )
    return replace(kernel, scales=tuple((variance / kernel.temperature).tolist()))


@FAMILY.register
class PreconditionedLangevinSection(KernelSection):
    """Langevin with a step size for each coordinate: x' = x - h P dE/dx + sqrt(2 T h P) xi."""

    name: Literal["preconditioned_langevin"] = "preconditioned_langevin"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.1, "scales": (0.5,)}

    step_size: PositiveFloat
    """h. If the scales are variances it has no unit, is stable below 2, and biases the variances by
    about h/2 of their value."""

    scales: tuple[PositiveFloat, ...] = Field(default=(1.0,), min_length=1)
    """The diagonal of P in squared data units: about the variance of each number of the event, or
    one value for all."""

    temperature: NonNegativeFloat = 1.0
    """T of the law exp(-E/T)."""

    def bind(self, spec: EventSpec) -> Self:
        size = math.prod(spec.shape)
        if len(self.scales) not in (1, size):
            raise ValueError(
                f"sampler.scales: {len(self.scales)} of them, but the data's events {spec.shape} "
                f"have {size} numbers; give one for each, or a single one for all"
            )
        return super().bind(spec)

    def build(self) -> PreconditionedLangevin:
        return PreconditionedLangevin(
            step_size=self.step_size, scales=self.scales, temperature=self.temperature
        )
