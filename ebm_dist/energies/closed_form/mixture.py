"""A mixture of isotropic Gaussians, normalised: log Z = 0 at temperature 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.energies.closed_form.gaussian import constant_or_parameter
from ebm_dist.energies.closed_form.quadrature import log_integral
from ebm_dist.energies.family import FAMILY, AnalyticEnergy, Energy, EnergySection


class GaussianMixture(AnalyticEnergy):
    """E(x) = -log sum_k w_k N(x; mean_k, std_k^2 I), x of shape (B, D).

    Args:
        means: (K, D).
        stds: (K,), or one for all.
        weights: (K,), positive, normalised here; equal when left out.
        learnable: make means, log-stds and logits parameters.
        noise_stds: (L,), rising: the energy is E(x, level), that of x with this noise, normalised
            at each level. Its own moments and samples stay those without noise.
    """

    means: Tensor
    log_stds: Tensor
    logits: Tensor

    def __init__(
        self,
        means: Sequence[Sequence[float]] | Tensor,
        stds: float | Sequence[float] | Tensor = 1.0,
        weights: Sequence[float] | Tensor | None = None,
        *,
        learnable: bool = False,
        noise_stds: Sequence[float] | None = None,
    ) -> None:
        centre = torch.as_tensor(means, dtype=torch.float32).detach().clone()
        if centre.ndim != 2 or not len(centre):
            raise ValueError(
                f"energy.means: shape {tuple(centre.shape)}, expected (num_components, num_dims)"
            )
        num, size = centre.shape
        std = torch.as_tensor(stds, dtype=torch.float32)
        weight = torch.ones(num) if weights is None else torch.as_tensor(weights).float()
        for key, value in (("stds", std), ("weights", weight)):
            if value.ndim and value.shape != (num,):
                raise ValueError(f"energy.{key}: {len(value)} of them, but {num} means")
            if not (value > 0).all():
                raise ValueError(f"energy.{key}: every one must be positive")
        super().__init__((size,))
        self.event = EventSpec((size,), "real")
        for name, value in (
            ("means", centre),
            ("log_stds", std.expand(num).log()),
            ("logits", weight.log()),
        ):
            constant_or_parameter(self, name, value.clone(), learnable)
        if noise_stds is not None:
            self.context = self.needs_context = frozenset({"level"})
            self.noise_stds = tuple(noise_stds)
            self.register_buffer("noise", torch.tensor(self.noise_stds), persistent=False)

    def energy(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        log_std = self.log_stds.to(x.dtype)
        if level is not None:
            noise = self.get_buffer("noise").to(x.dtype)[level][:, None]
            log_std = 0.5 * ((2 * log_std).exp() + noise.square()).log()
        distance = (x[:, None] - self.means.to(x.dtype)).square().sum(2)
        size = x.shape[1]
        log_prob = -0.5 * distance * (-2 * log_std).exp() - size * log_std
        log_weight = self.logits.to(x.dtype).log_softmax(0)
        return 0.5 * size * math.log(2 * math.pi) - (log_weight + log_prob).logsumexp(1)

    def mean(self) -> Tensor:
        """Mean (D,) at temperature 1."""
        return self._weights() @ self.means.detach().double()

    def covariance(self) -> Tensor:
        """Covariance (D, D) at temperature 1."""
        weight, means = self._weights(), self.means.detach().double()
        within = (weight * (2 * self.log_stds.detach().double()).exp()).sum()
        apart = means - self.mean()
        between = (weight[:, None] * apart).T @ apart
        return within * torch.eye(means.shape[1], dtype=torch.float64) + between

    def log_z(self, temperature: float = 1.0) -> float:
        """0 at temperature 1; at others by quadrature, in one or two dimensions."""
        if temperature == 1.0:
            return 0.0
        means = self.means.detach().double().cpu()
        std = self.log_stds.detach().double().exp().cpu()
        if means.shape[1] > 2:
            return super().log_z(temperature)
        reach = std.max().item() * math.sqrt(90 * max(temperature, 1.0))
        step = std.min().item() * math.sqrt(min(temperature, 1.0))
        edges = []
        for low, high in zip(means.amin(0).tolist(), means.amax(0).tolist()):
            num_panels = min(2000 // len(means[0]) ** 2, math.ceil((high - low + 2 * reach) / step))
            edges.append(np.linspace(low - reach, high + reach, num_panels + 1))
        return log_integral(self.energy, edges, temperature, order=8)

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        if temperature != 1.0:
            return super().sample(num, generator, temperature)
        means = self.means.detach()
        weight = self.logits.detach().softmax(0)
        which = torch.multinomial(weight, num, replacement=True, generator=generator)
        noise = torch.empty(num, means.shape[1], device=means.device).normal_(generator=generator)
        return means[which] + self.log_stds.detach().exp()[which, None] * noise

    def _weights(self) -> Tensor:
        return self.logits.detach().double().softmax(0)


@FAMILY.register
class GaussianMixtureSection(EnergySection):
    """A normalised mixture of isotropic Gaussians; by default eight of them on a circle."""

    name: Literal["gaussian_mixture"] = "gaussian_mixture"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real",)

    means: tuple[tuple[float, ...], ...] = Field(
        default=tuple(
            (round(4 * math.cos(k * math.pi / 4), 6), round(4 * math.sin(k * math.pi / 4), 6))
            for k in range(8)
        ),
        min_length=1,
    )
    """Means of the components, (num_components, num_dims)."""

    stds: PositiveFloat | tuple[PositiveFloat, ...] = 0.5
    """Standard deviations: one for all components, or one for each."""

    weights: tuple[PositiveFloat, ...] | None = None
    """Weights of the components, which need not sum to 1; equal when left out."""

    learnable: bool = False
    """Train means, stds and weights from these values."""

    noise_stds: tuple[PositiveFloat, ...] | None = Field(default=None, min_length=2)
    """Noise of each level in data units, rising; the energy is then E(x, level), that of the
    mixture with this noise."""

    @model_validator(mode="after")
    def _means_are_a_matrix(self) -> Self:
        lengths = {len(mean) for mean in self.means}
        if len(lengths) > 1:
            raise ValueError(f"means: rows of lengths {sorted(lengths)}, expected one length")
        stds = self.noise_stds or ()
        if any(a >= b for a, b in pairwise(stds)):
            raise ValueError(f"noise_stds: {list(stds)}, expected rising from the cleanest level 0")
        return self

    def module(self) -> Energy:
        return GaussianMixture(
            self.means,
            self.stds,
            self.weights,
            learnable=self.learnable,
            noise_stds=self.noise_stds,
        )


def gaussian_mixture(
    means: Sequence[Sequence[float]] | Tensor,
    stds: float | Sequence[float] | Tensor = 1.0,
    weights: Sequence[float] | Tensor | None = None,
    **params: Any,
) -> GaussianMixture:
    """A mixture of Gaussians; see `GaussianMixture` for the parameters."""
    return GaussianMixture(means, stds, weights, **params)
