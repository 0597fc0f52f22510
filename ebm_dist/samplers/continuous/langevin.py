"""Unadjusted Langevin dynamics on a batch of independent chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from ebm_dist.core.events import per_chain
from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.continuous.gradient import GradientState, MovesInPlace, StartsWithGradient
from ebm_dist.samplers.kernel import FAMILY, KernelSection, norm_event, value_and_grad
from ebm_dist.samplers.traits import EulerMaruyama


@dataclass(frozen=True, slots=True)
class LangevinInfo:
    """Reported for each move."""

    grad_norm: Tensor  # (B,), of the gradient that the move followed, before any clipping


@dataclass(frozen=True, slots=True)
class Langevin(StartsWithGradient, MovesInPlace[GradientState, LangevinInfo], EulerMaruyama):
    """x' = x - h dE/dx + sqrt(2 T h) xi, xi ~ N(0, I).

    The Euler-Maruyama step of overdamped Langevin dynamics. With no accept step the chain
    targets exp(-E/T) only as step_size -> 0: on a quadratic of curvature a its temperature
    is 2T/(2 - a h), and it diverges at a h >= 2. `mala` removes that bias. Clipping and
    clamping change the law further; published image models are trained with them.
    """

    step_size: float
    """h, in squared data units (over energy units at T = 1)."""
    temperature: float = 1.0
    grad_clip: float | None = None
    """Clamps every entry of the gradient to [-c, c] (IGEBM, arXiv:1903.08689: 0.01)."""
    grad_norm_clip: float | None = None
    """Scales each chain's gradient down to this norm."""
    clamp: tuple[float, float] | None = None
    """Clamps positions to the range of the data after each move."""

    tunable: ClassVar[str] = "step_size"

    @property
    def noise_std(self) -> float:
        """sqrt(2 T h), the standard deviation of the noise of one move."""
        return (2 * self.temperature * self.step_size) ** 0.5

    def step_(
        self, state: GradientState, energy: EnergyFn, generator: torch.Generator, noise: Tensor
    ) -> tuple[GradientState, LangevinInfo]:
        info = self._move_(state.position, state.grad, generator, noise)
        return GradientState(state.position, *value_and_grad(energy, state.position)), info

    def depart_(
        self,
        position: Tensor,
        energy: EnergyFn,
        generator: torch.Generator,
        noise: Tensor,
        *,
        first: bool = False,
    ) -> tuple[Tensor, LangevinInfo]:
        before, grad = value_and_grad(energy, position, first=first)
        return before, self._move_(position, grad, generator, noise)

    def _move_(
        self, position: Tensor, grad: Tensor, generator: torch.Generator, noise: Tensor
    ) -> LangevinInfo:
        info = LangevinInfo(grad_norm=norm_event(grad))
        position.add_(self._clipped(grad, info.grad_norm), alpha=-self.step_size)
        if self.temperature > 0:
            position.add_(noise.normal_(generator=generator), alpha=self.noise_std)
        if self.clamp is not None:
            position.clamp_(*self.clamp)
        return info

    def _clipped(self, grad: Tensor, norm: Tensor) -> Tensor:
        # Short-run energies are steep off the data; one such gradient throws a chain out
        # of the data's range, and it never returns.
        if self.grad_clip is not None:
            return grad.clamp(-self.grad_clip, self.grad_clip)
        if self.grad_norm_clip is not None:
            scale = (self.grad_norm_clip / norm.clamp(min=1e-12)).clamp(max=1.0)
            return grad * per_chain(scale, grad)
        return grad


@FAMILY.register
class LangevinSection(KernelSection):
    """Unadjusted Langevin dynamics: x' = x - h dE/dx + sqrt(2 T h) xi."""

    name: Literal["langevin"] = "langevin"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.05, "temperature": 1.0}

    step_size: PositiveFloat
    """h, in squared data units. No default: it depends on how the data is scaled."""

    temperature: NonNegativeFloat | None = None
    """T of the law exp(-E/T). Exactly one of this and noise_std."""

    noise_std: NonNegativeFloat | None = None
    """Standard deviation of the noise of one move; T = noise_std**2 / (2 * step_size)."""

    grad_clip: PositiveFloat | None = None
    """Clamp every entry of the gradient to plus or minus this (IGEBM: 0.01)."""

    grad_norm_clip: PositiveFloat | None = None
    """Scale each chain's gradient down to this norm."""

    clamp: tuple[float, float] | None = Field(default=None)
    """Clamp positions to this range after each move, e.g. [-1, 1] for images."""

    @model_validator(mode="after")
    def _one_of_each(self) -> LangevinSection:
        if (self.temperature is None) == (self.noise_std is None):
            raise ValueError(
                "give exactly one of temperature and noise_std; they are tied by "
                "T = noise_std**2 / (2 * step_size)"
            )
        if self.grad_clip is not None and self.grad_norm_clip is not None:
            raise ValueError("give grad_clip or grad_norm_clip, not both")
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise ValueError(f"clamp: the lower end comes first, got {list(self.clamp)}")
        return self

    def build(self) -> Langevin:
        temperature = self.temperature
        if temperature is None:
            assert self.noise_std is not None
            temperature = self.noise_std**2 / (2 * self.step_size)
        return Langevin(
            step_size=self.step_size,
            temperature=temperature,
            grad_clip=self.grad_clip,
            grad_norm_clip=self.grad_norm_clip,
            clamp=self.clamp,
        )
