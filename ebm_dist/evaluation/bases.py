"""Base distributions of annealing, with known Z: Gaussian, Bernoulli and categorical."""

from __future__ import annotations

import math
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_dist.core.types import EventSpec


class Base(Protocol):
    """An energy with known log Z and exact draws; several of `ebm_dist.energies` qualify."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def log_z(self) -> float: ...

    def sample(self, num: int, generator: torch.Generator) -> Tensor: ...


class GaussianBase:
    """E(x) = sum ((x - mean) / std)^2 / 2 with mean and std of shape (*event)."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean.float(), std.float()

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * ((x - self.mean.to(x)) / self.std.to(x)).square().flatten(1).sum(dim=1)

    def log_z(self) -> float:
        return float(self.std.double().log().sum()) + 0.5 * self.std.numel() * math.log(2 * math.pi)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        white = torch.empty(num, *self.mean.shape, device=self.mean.device)
        return self.mean + self.std * white.normal_(generator=generator)

    def to(self, device: Any) -> Self:
        return type(self)(self.mean.to(device), self.std.to(device))


class BoxedGaussianBase:
    """A `GaussianBase` truncated to `low` .. `high` in every coordinate."""

    def __init__(self, mean: Tensor, std: Tensor, low: float, high: float) -> None:
        self.mean, self.std, self.low, self.high = mean.float(), std.float(), low, high

    def __call__(self, x: Tensor) -> Tensor:
        return GaussianBase(self.mean, self.std)(x)

    def log_z(self) -> float:
        inside = self._mass()[1]
        return GaussianBase(self.mean, self.std).log_z() + float(inside.log().sum())

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        below, inside = self._mass()
        size, device = (num, *self.mean.shape), self.mean.device
        uniform = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
        white = torch.special.ndtri(below + uniform * inside)
        return (self.mean + self.std * white).float().clamp(self.low, self.high)

    def to(self, device: Any) -> Self:
        return type(self)(self.mean.to(device), self.std.to(device), self.low, self.high)

    def _mass(self) -> tuple[Tensor, Tensor]:
        """The Gaussian's mass below `low`, and between `low` and `high`; (*event) float64."""
        mean, std = self.mean.double(), self.std.double()
        below = torch.special.ndtr((self.low - mean) / std)
        return below, torch.special.ndtr((self.high - mean) / std) - below


class BernoulliBase:
    """E(x) = -sum logit * x of independent bits; logits of shape (*event)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.float()

    def __call__(self, x: Tensor) -> Tensor:
        return -(x * self.logits.to(x)).flatten(1).sum(dim=1)

    def log_z(self) -> float:
        return float(F.softplus(self.logits.double()).sum())

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(num, *self.logits.shape, generator=generator, device=generator.device)
        return (uniform < self.logits.sigmoid()).float()

    def to(self, device: Any) -> Self:
        return type(self)(self.logits.to(device))


class CategoricalBase(BernoulliBase):
    """E(x) = -sum logit * x of independent one-hot sites; logits (*sites, num_values)."""

    def log_z(self) -> float:
        return float(self.logits.double().logsumexp(dim=-1).sum())

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        size = (num, *self.logits.shape)
        uniform = torch.rand(size, generator=generator, device=generator.device)
        gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        index = (self.logits + gumbel).argmax(dim=-1)
        return F.one_hot(index, self.logits.shape[-1]).float()


def base_law(
    spec: EventSpec,
    data: Tensor | None = None,
    *,
    std: float = 1.0,
    box: tuple[float, float] | None = None,
) -> GaussianBase | BoxedGaussianBase | BernoulliBase | CategoricalBase:
    """A distribution of independent coordinates, fitted to `data` (N, *event) if given.

    Args:
        std: of the Gaussian for real events and images without data.
        box: the range of real events and images, if they are confined to one.
    """
    if box is not None and not spec.discrete:
        free = base_law(spec, None if data is None else data.clamp(*box), std=std)
        assert isinstance(free, GaussianBase)
        # A mean on the border with a narrow width would leave little mass inside the box.
        middle, width = sum(box) / 2, box[1] - box[0]
        mean = middle + 0.9 * (free.mean - middle)
        return BoxedGaussianBase(mean, free.std.clamp_min(0.1 * width), *box)
    if data is not None and (tuple(data.shape[1:]) != spec.shape or data.shape[0] < 2):
        raise ValueError(
            f"data: expected at least 2 events of shape {spec.shape}, got {tuple(data.shape)}"
        )
    if spec.kind == "binary":
        if data is None:
            return BernoulliBase(torch.zeros(spec.shape))
        # One pseudo-count per value keeps the probability of a never-set pixel positive.
        share = (data.double().sum(dim=0) + 1) / (data.shape[0] + 2)
        return BernoulliBase(torch.logit(share))
    if spec.kind == "categorical":
        if data is None:
            return CategoricalBase(torch.zeros(spec.shape))
        count = data.double().sum(dim=0) + 1
        return CategoricalBase((count / count.sum(dim=-1, keepdim=True)).log())
    if data is None:
        return GaussianBase(torch.zeros(spec.shape), torch.full(spec.shape, std))
    spread = data.double().std(dim=0)
    # A floor for constant pixels: with width zero no chain could reach the model's support.
    return GaussianBase(data.double().mean(dim=0), spread.clamp_min(0.05 * float(spread.max())))
