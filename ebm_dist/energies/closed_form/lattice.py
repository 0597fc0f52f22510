"""Lattice phi^4: a real field on a periodic lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.energies.closed_form.finite import log_trace_power
from ebm_dist.energies.closed_form.quadrature import gauss_legendre
from ebm_dist.energies.family import FAMILY, AnalyticEnergy, Energy, EnergySection


class LatticePhi4(AnalyticEnergy):
    """E(x) = sum_i [ 1/2 sum_mu (x_{i+mu} - x_i)^2 + mass2/2 x_i^2 + quartic x_i^4 ].

    x is (B, *shape), periodic. With quartic = 0 it is the free field, a Gaussian that is
    diagonal in Fourier modes with precision mass2 + sum_mu 4 sin^2(k_mu / 2).
    """

    def __init__(self, shape: Sequence[int], mass2: float, quartic: float) -> None:
        lattice = tuple(int(side) for side in shape)
        super().__init__(lattice)
        self.event = EventSpec(lattice, "real")
        self.lattice = lattice
        self.mass2 = mass2
        self.quartic = quartic

    def energy(self, x: Tensor) -> Tensor:
        square = x.square()
        density = (0.5 * self.mass2 + self.quartic * square) * square
        for dim in range(1, x.ndim):
            density = density + 0.5 * (x.roll(-1, dim) - x).square()
        return density.flatten(1).sum(1)

    def log_z(self, temperature: float = 1.0) -> float:
        """Exact for the free field; for a ring of sites by transfer matrix at any quartic."""
        if self.quartic == 0:
            modes = self._modes().log()
            num = modes.numel()
            return 0.5 * (num * math.log(2 * math.pi * temperature) - modes.sum().item())
        if len(self.lattice) == 1:
            return self._log_z_of_ring(temperature)
        return super().log_z(temperature)

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Exact for the free field: white noise, scaled mode by mode."""
        if self.quartic != 0:
            return super().sample(num, generator, temperature)
        noise = torch.empty(num, *self.lattice, device=generator.device).normal_(
            generator=generator
        )
        dims = tuple(range(1, noise.ndim))
        scale = (temperature / self._modes()).sqrt().to(noise)
        return torch.fft.ifftn(torch.fft.fftn(noise, dim=dims) * scale, dim=dims).real

    def _modes(self) -> Tensor:
        total = torch.full((), float(self.mass2), dtype=torch.float64)
        for side in self.lattice:
            k = 2 * math.pi * torch.arange(side, dtype=torch.float64) / side
            total = total[..., None] + 4 * (k / 2).sin().square()
        return total

    def _log_z_of_ring(self, temperature: float) -> float:
        def potential(t: float) -> float:
            return 0.5 * self.mass2 * t**2 + self.quartic * t**4

        # Minimum of the potential; exp(-E/T) is negligible where the potential is 45 T above it.
        low = -(min(self.mass2, 0.0) ** 2) / (16 * self.quartic)
        reach = 1.0
        while potential(reach) - low < 45 * temperature or potential(reach / 1.1) > potential(
            reach
        ):
            reach *= 1.1
        node, weight = gauss_legendre(np.linspace(-reach, reach, 33), order=16)
        own = 0.5 * self.mass2 * node**2 + self.quartic * node**4
        pair = 0.5 * (node[:, None] - node).square() + 0.5 * (own[:, None] + own)
        half = 0.5 * weight.log()
        return log_trace_power(half[:, None] + half - pair / temperature, self.lattice[0])


@FAMILY.register
class LatticePhi4Section(EnergySection):
    """A real scalar field with a quartic term on a periodic lattice."""

    name: Literal["lattice_phi4"] = "lattice_phi4"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real",)
    example: ClassVar[dict[str, Any]] = {"shape": (3, 4)}

    shape: tuple[PositiveInt, ...] = Field(default=(8, 8), min_length=1)
    """Sides of the lattice."""

    mass2: float = 0.5
    """Squared mass; negative values (with quartic > 0) break the symmetry."""

    quartic: NonNegativeFloat = 0.1
    """Strength of the x^4 term."""

    @model_validator(mode="after")
    def _has_a_law(self) -> Self:
        if self.quartic == 0 and self.mass2 <= 0:
            raise ValueError(
                f"mass2: {self.mass2} with quartic 0 has no finite Z; raise one of them above 0"
            )
        if min(self.shape) < 2:
            raise ValueError(f"shape: {self.shape}, every side of a periodic lattice is at least 2")
        return self

    def module(self) -> Energy:
        return LatticePhi4(self.shape, self.mass2, self.quartic)


def lattice_phi4(shape: int | Sequence[int], mass2: float, quartic: float) -> Energy:
    """A real field with a quartic term; see `LatticePhi4`."""
    lattice = (shape,) if isinstance(shape, int) else tuple(shape)
    return FAMILY.make("lattice_phi4", shape=lattice, mass2=mass2, quartic=quartic)
