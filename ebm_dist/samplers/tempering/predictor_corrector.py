"""Chains that go down the noise levels of an energy: to the next level, then Langevin steps there.

This draws from an energy E(x, level) that was trained on all levels, by `denoising_score_matching`
with `conditioning: level`: chains begin as noise at the highest level and end at the lowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ebm_dist.core.events import per_chain
from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.continuous.gradient import GradientState
from ebm_dist.samplers.kernel import (
    FAMILY,
    KernelSection,
    norm_event,
    normal,
    start,
    value_and_grad,
)
from ebm_dist.samplers.tempering.levels import at_level, level_of, stds_of
from ebm_dist.samplers.traits import KernelTraits


@dataclass(frozen=True, slots=True)
class PredictorCorrectorState(GradientState):
    """Chains at their levels; energy and gradient are those of E(x, level)."""

    level: Tensor  # (B,), int64


@dataclass(frozen=True, slots=True)
class PredictorCorrectorInfo:
    """Reported for each move."""

    grad_norm: Tensor  # (B,), of the gradient where the chain ends, which its next move follows


@dataclass(frozen=True, slots=True)
class PredictorCorrector(KernelTraits):
    """A step from noise s to the noise s' of the level below, then n corrections at that level.

        predict   x' = x - (s^2 - s'^2) dE(x, s)/dx / T + s' sqrt(1 - s'^2 / s^2) xi
        correct   x' = x - c s'^2 dE(x, s')/dx / T + s' sqrt(c (2 - c)) xi

    Song et al. (2021), arXiv:2011.13456, algorithm 2: the prediction is that of ancestral sampling
    (its appendix F), the correction a Langevin step. Plain Langevin steps of this size would leave
    the noise of the level too large by c/4, which stays in the image as grain; this step keeps it
    exactly where E has the curvature T / s'^2 of the noise alone. At level 0 a chain stays, and the
    corrections go on. An energy without levels has one, with s = 1.
    """

    step_size: float = 0.3
    """c, in units of s^2."""
    num_corrections: int = 1
    """n, Langevin steps at each level."""
    temperature: float = 1.0

    moves_level: ClassVar[bool] = True
    descends: ClassVar[bool] = True

    def init(self, x: Tensor, energy: EnergyFn) -> PredictorCorrectorState:
        level = level_of(energy)
        if level is None:
            level = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        position = start(x, energy)
        return PredictorCorrectorState(
            position, *value_and_grad(energy, position, first=True), level
        )

    def step(
        self, state: PredictorCorrectorState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[PredictorCorrectorState, PredictorCorrectorInfo]:
        x, c, t = state.position, self.step_size, self.temperature
        stds = torch.tensor(stds_of(energy), dtype=x.dtype, device=x.device)
        level = (state.level - 1).clamp(min=0)
        before, std = per_chain(stds[state.level], x), per_chain(stds[level], x)
        removed = before.square() - std.square()
        x = x - removed / t * state.grad + std * removed.sqrt() / before * normal(x, generator)
        here = at_level(energy, level)
        value, grad = value_and_grad(here, x)
        for _ in range(self.num_corrections):
            x = x - c / t * std.square() * grad
            x = x + (c * (2 - c)) ** 0.5 * std * normal(x, generator)
            value, grad = value_and_grad(here, x)
        return PredictorCorrectorState(x, value, grad, level), PredictorCorrectorInfo(
            norm_event(grad)
        )


@FAMILY.register
class PredictorCorrectorSection(KernelSection):
    """Chains that go down the noise levels of an energy, from noise to data."""

    name: Literal["predictor_corrector"] = "predictor_corrector"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.2}

    step_size: PositiveFloat = Field(default=0.3, lt=2.0)
    """c, of the Langevin steps in units of the squared noise of the level."""

    num_corrections: PositiveInt = Field(default=1, le=1000)
    """n, Langevin steps at each level."""

    temperature: PositiveFloat = 1.0
    """T of the law exp(-E/T) of each level."""

    def build(self) -> PredictorCorrector:
        return PredictorCorrector(
            step_size=self.step_size,
            num_corrections=self.num_corrections,
            temperature=self.temperature,
        )
