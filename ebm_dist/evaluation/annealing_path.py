"""Interpolates between the energies of a base distribution and the model, for annealing."""

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
        # At each end the other energy is not evaluated: it may be huge or infinite there.
        if self.b == 0:
            return self.base(x)
        if self.b == 1:
            return self.target(x) / self.temperature
        return (1 - self.b) * self.base(x) + self.b * self.target(x) / self.temperature

    def at(self, b: float) -> AnnealingPath:
        return AnnealingPath(self.base, self.target, self.temperature, self.event, b)

    def start(self, num: int, generator: torch.Generator) -> Tensor:
        """Exact draws from the base distribution, in the coordinates of the chains."""
        return self.enter(self.base.sample(num, generator).float())

    def enter(self, x: Tensor) -> Tensor:
        """Events x in the coordinates of the chains."""
        return x

    def draw(self) -> Any:
        """The energy's method for exact draws from the model; None if it has none."""
        return getattr(self.target, "sample", None)

    def slope(self, x: Tensor) -> Tensor:
        """dE_b/db (B,), float64: the decrease of the log-weight per unit of b."""
        with torch.no_grad():
            return self.target(x).double() / self.temperature - self.base(x).double()


class BoxedPath(AnnealingPath):
    """The same for x between `low` and `high`; chains are u = logit((x - low) / (high - low))."""

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
        # -log |dx/du|, the change of variables between the densities of x and u.
        volume = math.log(self.box[1] - self.box[0])
        jacobian = F.softplus(x) + F.softplus(-x) - volume
        return super().__call__(self._leave(x)) + jacobian.flatten(1).sum(dim=1)

    def draw(self) -> None:
        """None, because the energy's own draws are not confined to the box."""

    def at(self, b: float) -> AnnealingPath:
        return BoxedPath(self.base, self.target, self.temperature, self.event, b, box=self.box)

    def enter(self, x: Tensor) -> Tensor:
        low, high = self.box
        # A pixel on the border would be at infinity, so it moves inwards by one rounding error.
        return torch.logit((x.float() - low) / (high - low), eps=2.0**-23)

    def slope(self, x: Tensor) -> Tensor:
        return super().slope(self._leave(x))

    def _leave(self, u: Tensor) -> Tensor:
        low, high = self.box
        return low + (high - low) * u.sigmoid()
