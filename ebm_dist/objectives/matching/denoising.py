"""Score matching, denoising: the gradient at a noisy datum points along the noise."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn

from ebm_dist.core.events import per_chain, sum_event
from ebm_dist.core.types import Batch, EnergyFn, EventKind, Negatives
from ebm_dist.energies.context import trait
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energy_and_grad,
    given,
    integers,
    normal_like,
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

    noise_std: PositiveFloat | tuple[PositiveFloat, ...] | None = None
    """Standard deviation s of the noise in data units; if several are given, one is drawn for each
    datum. No default: the fitted law is the data blurred by s, so s depends on the data's scale.
    Left out under conditioning: level, where the energy has its own."""

    conditioning: Literal["none", "scale", "level"] = "none"
    """The energy at several levels. none: E at every level, a compromise between the blurred laws;
    scale: E/s at level s (Song & Ermon 2020, technique 3); level: E(x, level), an energy with
    num_levels and noise_stds, which learns the blurred law of each level."""

    level_weight: Literal["equal", "edm"] = "equal"
    """Weight of a level in the loss. edm: 1 + s^2 / d^2 with the energy's data_std d, which is the
    weight (s^2 + d^2) / (s d)^2 of EDM on the denoised event."""

    log_noise: tuple[float, PositiveFloat] | None = None
    """Mean and standard deviation: a level of noise s is drawn in proportion to the normal density
    at log s, as in EDM (-1.2 and 1.2, for data of scale .5); when left out, all alike."""

    @model_validator(mode="after")
    def _noise_is_named_once(self) -> Self:
        if self.conditioning == "level":
            if self.noise_std is not None:
                raise ValueError(
                    "noise_std: conditioning: level takes the noise from energy.noise_stds; leave "
                    "it out"
                )
        elif self.noise_std is None:
            raise ValueError("noise_std: missing; give the noise in data units")
        elif self.level_weight != "equal" or self.log_noise is not None:
            raise ValueError("level_weight, log_noise: only with conditioning: level")
        return self

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset({"label", "level"} if self.conditioning == "level" else ())

    def module(self) -> Objective:
        return Denoising(self)


class Denoising(Objective):
    """mean[ 1/2 |s dU/dx(x + s xi) - xi|^2 ], xi ~ N(0, 1), U = E/T, or E/(T s) under `scale`.

    Under `level` U(x) = E(x, level)/T, so that each level fits its own blurred law, up to a
    constant for each. An energy that needs a label as well is given the datum's.

    This is s^2 * (Fisher divergence to the blurred data); the factor gives all levels equal weight.
    Vincent (2011), eq. 11; several levels: Song & Ermon (2019), arXiv:1907.05600, eq. 6.

    Does not see the weights of far modes unless the noise reaches from one to the next.
    """

    needs_generator = True

    def __init__(self, config: DenoisingSection) -> None:
        super().__init__()
        std = config.noise_std
        self.config = config
        self.noise_stds = std if isinstance(std, tuple) else () if std is None else (std,)

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        x = batch.x
        by_level = self.config.conditioning == "level"
        stds = noise_stds_of(energy) if by_level else self.noise_stds
        level, std = draw_levels(stds, x, given(generator), self._level_law(stds))
        at_level = partial(energy, **context_of(energy, level, batch)) if by_level else energy
        wide_std = per_chain(std, x)
        noise = normal_like(x, generator)
        _, _, grad = energy_and_grad(at_level, x + wide_std * noise)
        with torch.enable_grad():
            factor = wide_std if self.config.conditioning != "scale" else torch.ones_like(wide_std)
            residual = factor / self.config.fitted_temperature * grad - noise
            loss = 0.5 * (self._weight(energy, std) * sum_event(residual.square())).mean()
        # No energy/positive: the energies computed here are those of blurred data.
        return loss, {"loss/total": loss.detach()}

    def _level_law(self, stds: tuple[float, ...]) -> Tensor | None:
        """Weight of each level when one is drawn; None for equal ones."""
        if self.config.log_noise is None:
            return None
        mean, std = self.config.log_noise
        log_density = -0.5 * ((torch.tensor(stds).log() - mean) / std).square()
        return log_density.softmax(0)

    def _weight(self, energy: nn.Module | EnergyFn, std: Tensor) -> Tensor:
        """Weight (B,) of each datum in the loss."""
        if self.config.level_weight == "equal":
            return torch.ones_like(std)
        data_std = getattr(energy, "data_std", None)
        if data_std is None:
            raise ValueError(
                "energy.data_std: not set, but objective.level_weight: edm reads it; set it to the "
                "standard deviation of the data, or objective.level_weight: equal"
            )
        return 1 + (std / data_std).square()


def noise_stds_of(energy: nn.Module | EnergyFn) -> tuple[float, ...]:
    """The noise of each level of the energy."""
    stds = trait(energy, "noise_stds")
    if stds is None:
        raise ValueError(
            "energy.num_levels: not set, but objective.conditioning: level draws levels of the "
            "energy; set energy.num_levels and energy.noise_stds"
        )
    return stds


def context_of(energy: nn.Module | EnergyFn, level: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What the energy is given with each datum: its level, and its label if it needs one."""
    if "label" not in trait(energy, "needs_context"):
        return {"level": level}
    if batch.label is None:
        raise ValueError(
            "batch.label: the energy needs the label of each event (energy.classes: embedding), "
            "got None; use labelled data"
        )
    return {"level": level, "label": batch.label}


def draw_levels(
    stds: tuple[float, ...],
    x: Tensor,
    generator: torch.Generator,
    law: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Level (B,) int64 and its noise (B,) for each datum, drawn in proportion to `law`.

    Args:
        law: weight of each level; None for equal ones.
    """
    if law is not None:
        law = law.to(generator.device)
        level = torch.multinomial(law, len(x), replacement=True, generator=generator).to(x.device)
    elif len(stds) == 1:
        level = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    else:
        level = integers(len(stds), x.shape[:1], x, generator)
    return level, torch.tensor(stds, dtype=x.dtype).to(x.device)[level]
