"""Score matching, denoising: the gradient at a noisy datum points along the noise."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ebm_dist.core.types import Batch, EnergyFn, EventKind, Negatives
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energy_and_grad,
    expand_like,
    given,
    integers,
    normal_like,
    sum_event,
)


@FAMILY.register
class DenoisingSection(ObjectiveSection):
    """Match the score of the data blurred by Gaussian noise; no second derivative in x."""

    name: Literal["denoising_score_matching"] = "denoising_score_matching"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real", "image")
    example: ClassVar[dict[str, Any]] = {"noise_std": 0.3}
    far_modes: ClassVar[str] = (
        "seen only where objective.noise_std reaches from one to the next, and the fitted law is "
        "then that of the data blurred by as much"
    )

    noise_std: PositiveFloat | tuple[PositiveFloat, ...] = Field()
    """Standard deviation s of the noise in data units; if several are given, one is drawn for each
    datum. No default: the fitted law is the data blurred by s, so s depends on the data's scale."""

    conditioning: Literal["none", "scale"] = "none"
    """The energy at several levels. none: E at every level, a compromise between the blurred laws;
    scale: E/s at level s (Song & Ermon 2020, technique 3)."""

    def module(self) -> Objective:
        return Denoising(self)


class Denoising(Objective):
    """mean[ 1/2 |s dU/dx(x + s xi) - xi|^2 ], xi ~ N(0, 1), U = E/T, or E/(T s) under `scale`.

    This is s^2 * (Fisher divergence to the blurred data); the factor gives all levels equal weight.
    Vincent (2011), eq. 11; several levels: Song & Ermon (2019), arXiv:1907.05600, eq. 6.

    Does not see the weights of far modes unless the noise reaches from one to the next.
    """

    needs_generator = True

    def __init__(self, config: DenoisingSection) -> None:
        super().__init__()
        stds = config.noise_std if isinstance(config.noise_std, tuple) else (config.noise_std,)
        self.config = config
        self.noise_stds = stds

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        x = batch.x
        std = draw_levels(self.noise_stds, x, given(generator))[1]
        wide_std = expand_like(std, x)
        noise = normal_like(x, generator)
        _, _, grad = energy_and_grad(energy, x + wide_std * noise)
        with torch.enable_grad():
            factor = wide_std if self.config.conditioning == "none" else torch.ones_like(wide_std)
            residual = factor / self.config.fitted_temperature * grad - noise
            loss = 0.5 * sum_event(residual.square()).mean()
        # No energy/positive: the energies computed here are those of blurred data.
        return loss, {"loss/total": loss.detach()}


def draw_levels(
    stds: tuple[float, ...], x: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Level (B,) int64 and its noise (B,) for each datum, uniform over levels."""
    if len(stds) == 1:
        level = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    else:
        level = integers(len(stds), x.shape[:1], x, generator)
    return level, torch.tensor(stds, dtype=x.dtype).to(x.device)[level]
