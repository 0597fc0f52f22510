"""Noise-contrastive estimation: classifies data against noise of known density; learns log Z."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_dist.core.events import sum_event
from ebm_dist.core.types import Batch, EnergyFn, EventSpec, Negatives
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energies_of,
    given,
    integers,
    normal_like,
    uniform,
)

NoiseLaw = Literal["gaussian", "uniform", "coins", "classes"]


@FAMILY.register
class NoiseContrastiveSection(ObjectiveSection):
    """Logistic regression of data against noise with log p(x) = -E(x)/T - log Z, log Z learnt."""

    name: Literal["noise_contrastive"] = "noise_contrastive"
    example: ClassVar[dict[str, Any]] = {"noise": "gaussian"}
    far_modes: ClassVar[str] = "seen, where the noise covers all of them"

    noise: NoiseLaw | None = None
    """Law of the noise. When left out it follows the data: gaussian for real events, uniform for
    images, coins (fair bits) for binary, classes (uniform over them) for categorical events."""

    noise_mean: float = 0.0
    """Mean of gaussian noise, the same in every coordinate."""

    noise_std: PositiveFloat = 1.0
    """Standard deviation of gaussian noise. It should exceed the data's, or the variance of the
    estimate is infinite."""

    low: float = -1.0
    """Lower end of uniform noise."""

    high: float = 1.0
    """Upper end of uniform noise; data must lie inside."""

    noise_ratio: PositiveInt = 1
    """Noise events for each datum."""

    log_z: float = 0.0
    """Initial value of the learnt log Z."""

    @field_validator("high")
    @classmethod
    def _above_low(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("low", -math.inf):
            raise ValueError(f"must lie above low, {info.data['low']}")
        return value

    @property
    def takes_negatives(self) -> bool:
        return False  # asked before the events are known, without which it cannot be built

    def bind(self, spec: EventSpec) -> Self:
        natural: dict[str, NoiseLaw] = {
            "real": "gaussian",
            "image": "uniform",
            "binary": "coins",
            "categorical": "classes",
        }
        bound = super().bind(spec)
        noise = bound.noise or natural[spec.kind]
        continuous = noise in ("gaussian", "uniform")
        if continuous == spec.discrete or (not continuous and noise != natural[spec.kind]):
            raise ValueError(
                f"objective.noise: {noise} has no density on {spec.kind} events; use "
                f"{natural[spec.kind]}"
            )
        return bound.model_copy(update={"noise": noise})

    def module(self) -> Objective:
        if self.noise is None:
            raise ValueError(
                "objective.noise: left to the data, but the section is not bound to any; give "
                "gaussian, uniform, coins or classes"
            )
        return NoiseContrastive(self, self.noise)


class NoiseContrastive(Objective):
    """-mean log sigmoid(G(x)) - nu * mean log sigmoid(-G(noise)).

        G(x) = -E(x)/T - log Z - log q(x) - log nu

    There are nu noise events for each datum, of density q. At the optimum E and log Z are those of
    the data's law, for any q that covers it. Gutmann & Hyvarinen (2012), JMLR 13, eq. 8.

    Sees the weights of far modes where the noise covers all of them.
    """

    needs_generator = True
    estimates_log_z = True

    def __init__(self, config: NoiseContrastiveSection, noise: NoiseLaw) -> None:
        super().__init__()
        self.config = config
        self.noise: NoiseLaw = noise
        # Not 0-d: partitioned optimisers split parameters along their first dim.
        self.log_z = nn.Parameter(torch.full((1,), config.log_z))

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        data, ratio = batch.x.detach(), self.config.noise_ratio
        noise = self.draw(data.repeat(ratio, *([1] * (data.ndim - 1))), given(generator))
        x = torch.cat([data, noise])
        log_p = -energies_of(energy, x) / self.config.fitted_temperature - self.log_z
        logit = log_p - self.log_density(x) - math.log(ratio)
        on_data, on_noise = logit[: len(data)], logit[len(data) :]
        # Sum over the noise of a datum, mean over data: nu times the mean over noise.
        loss = F.softplus(-on_data).mean() + ratio * F.softplus(on_noise).mean()
        # Accuracy at equal odds: with nu noise events for each datum, a classifier that always
        # answers noise is right in nu of nu + 1 cases.
        fair = -math.log(ratio)
        balanced = 0.5 * ((on_data > fair).float().mean() + (on_noise < fair).float().mean())
        return loss, {
            "energy/positive": ((-log_p - self.log_z)[: len(data)]).detach().mean()
            * self.config.fitted_temperature,
            "likelihood/log_z": self.log_z.detach().float().mean(),
            "likelihood/log_prob": log_p[: len(data)].detach().mean(),
            "objective/accuracy": balanced,
            "loss/total": loss.detach(),
        }

    def draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Noise shaped like `like`."""
        if self.noise == "gaussian":
            return self.config.noise_mean + self.config.noise_std * normal_like(like, generator)
        if self.noise == "uniform":
            width = self.config.high - self.config.low
            return self.config.low + width * uniform(like.shape, like, generator)
        if self.noise == "coins":
            return integers(2, like.shape, like, generator).to(like.dtype)
        index = integers(like.shape[-1], like.shape[:-1], like, generator)
        return F.one_hot(index, like.shape[-1]).to(like.dtype)

    def log_density(self, x: Tensor) -> Tensor:
        """log q(x) (B,), in nats; a log probability for discrete noise."""
        size = x[0].numel()
        if self.noise == "gaussian":
            std = self.config.noise_std
            square = sum_event(((x - self.config.noise_mean) / std).square())
            return -0.5 * square - size * (math.log(std) + 0.5 * math.log(2 * math.pi))
        if self.noise == "uniform":
            # Constant outside the support too: it must not be -inf for a datum on the border.
            return x.new_full(x.shape[:1], -size * math.log(self.config.high - self.config.low))
        if self.noise == "coins":
            return x.new_full(x.shape[:1], -size * math.log(2))
        return x.new_full(x.shape[:1], -(size // x.shape[-1]) * math.log(x.shape[-1]))
