"""The energies between a base law and the model, along which annealing moves its chains."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.evaluation.bases import Base


class AnnealingPath:
    """E_b(x) = (1 - b) E_0(x) + b E(x)/T, as an energy for the kernels."""

    def __init__(
        self, base: Base, energy: EnergyFn, temperature: float, spec: EventSpec, b: float = 0.0
    ) -> None:
        self.base, self.target, self.temperature, self.b = base, energy, temperature, b
        self.event = spec

    def __call__(self, x: Tensor) -> Tensor:
        # At the ends one of the two may be huge or infinite where the other is at home.
        if self.b == 0:
            return self.base(x)
        if self.b == 1:
            return self.target(x) / self.temperature
        return (1 - self.b) * self.base(x) + self.b * self.target(x) / self.temperature

    def at(self, b: float) -> AnnealingPath:
        return AnnealingPath(self.base, self.target, self.temperature, self.event, b)

    def start(self, num: int, generator: torch.Generator) -> Tensor:
        """Exact draws of the base law, as chains."""
        return self.enter(self.base.sample(num, generator).float())

    def enter(self, x: Tensor) -> Tensor:
        """Events as chains."""
        return x

    def draw(self) -> Any:
        """The energy's own exact draws of the model, None where it has none."""
        return getattr(self.target, "sample", None)

    def slope(self, x: Tensor) -> Tensor:
        """dE_b/db (B,), float64: what a chain's weight gains for each step in b."""
        with torch.no_grad():
            return self.target(x).double() / self.temperature - self.base(x).double()


class BoxedPath(AnnealingPath):
    """The same between `low` and `high`, for chains u = logit((x - low) / (high - low))."""

    def __init__(
        self,
        base: Base,
        energy: EnergyFn,
        temperature: float,
        spec: EventSpec,
        b: float = 0.0,
        *,
        box: tuple[float, float],
    ) -> None:
        super().__init__(base, energy, temperature, spec, b)
        self.box = box

    def __call__(self, x: Tensor) -> Tensor:
        # -log |dx/du|, with which the density in u is that of x.
        volume = math.log(self.box[1] - self.box[0])
        jacobian = F.softplus(x) + F.softplus(-x) - volume
        return super().__call__(self._leave(x)) + jacobian.flatten(1).sum(dim=1)

    def draw(self) -> None:
        """None: what the energy draws is of the whole space."""

    def at(self, b: float) -> AnnealingPath:
        return BoxedPath(self.base, self.target, self.temperature, self.event, b, box=self.box)

    def enter(self, x: Tensor) -> Tensor:
        low, high = self.box
        # A pixel on the border lies at infinity; one rounding inside, it does not.
        return torch.logit((x.float() - low) / (high - low), eps=2.0**-23)

    def slope(self, x: Tensor) -> Tensor:
        return super().slope(self._leave(x))

    def _leave(self, u: Tensor) -> Tensor:
        low, high = self.box
        return low + (high - low) * u.sigmoid()
