"""Toy energies with a known Z: ring and checkerboard in the plane, the double well."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.energies.closed_form.quadrature import gauss_legendre, log_integral
from ebm_dist.energies.family import FAMILY, AnalyticEnergy, Energy, EnergySection

_NEGLIGIBLE = 45.0
"""exp(-45) = 3e-20: energies more than this many T above the minimum are neglected."""


class Ring(AnalyticEnergy):
    """E(x) = (||x|| - radius)^2 / (2 width^2), x of shape (B, 2)."""

    def __init__(self, radius: float, width: float) -> None:
        super().__init__((2,))
        self.event = EventSpec((2,), "real")
        self.radius = radius
        self.width = width

    def energy(self, x: Tensor) -> Tensor:
        return (x.norm(dim=1) - self.radius).square() * (0.5 / self.width**2)

    def log_z(self, temperature: float = 1.0) -> float:
        """log 2 pi [s^2 exp(-r^2/2s^2) + r s sqrt(pi/2) (1 + erf(r/s/sqrt 2))], s^2 = T width^2."""
        s, r = self.width * math.sqrt(temperature), self.radius
        tail = s**2 * math.exp(-(r**2) / (2 * s**2))
        bulk = r * s * math.sqrt(math.pi / 2) * (1 + math.erf(r / (s * math.sqrt(2))))
        return math.log(2 * math.pi * (tail + bulk))

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        s = self.width * math.sqrt(temperature)
        angle = torch.empty(num, device=generator.device).uniform_(
            0, 2 * math.pi, generator=generator
        )
        high = self.radius + s * math.sqrt(2 * _NEGLIGIBLE)
        # In polar coordinates the distance rho has a density proportional to rho exp(-E).
        rho = _draw_on_grid(
            lambda t: (t - self.radius).square() / (2 * s**2) - t.log(), 0.0, high, num, generator
        )
        return torch.stack([rho * angle.cos(), rho * angle.sin()], 1)


class DoubleWell(AnalyticEnergy):
    """E(x) = sum_i depth (x_i^2 - 1)^2 + tilt x_i, x of shape (B, num_dims).

    With tilt > 0 the left well is the deeper one.
    """

    def __init__(self, depth: float, tilt: float = 0.0, num_dims: int = 1) -> None:
        super().__init__((num_dims,))
        self.event = EventSpec((num_dims,), "real")
        self.depth = depth
        self.tilt = tilt

    def energy(self, x: Tensor) -> Tensor:
        wells = self.depth * (x.square() - 1).square()
        return (wells + self.tilt * x if self.tilt else wells).sum(1)

    def log_z(self, temperature: float = 1.0) -> float:
        """By quadrature, good to about 1e-12."""
        reach = self._reach(temperature)
        one = log_integral(self._one, [np.linspace(-reach, reach, 257)], temperature)
        return one * self._num_dims

    def moment(self, order: int, temperature: float = 1.0) -> float:
        """E[x_i^order] under exp(-E/T), by quadrature."""
        reach = self._reach(temperature)
        node, weight = gauss_legendre(np.linspace(-reach, reach, 257))
        law = weight * (-self._one(node[:, None]) / temperature).exp()
        return ((law * node**order).sum() / law.sum()).item()

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        reach = self._reach(temperature)
        count = num * self._num_dims
        x = _draw_on_grid(
            lambda t: self._one(t[:, None]) / temperature, -reach, reach, count, generator
        )
        return x.reshape(num, self._num_dims)

    @property
    def _num_dims(self) -> int:
        return (self.event_shape or (1,))[0]

    def _one(self, x: Tensor) -> Tensor:
        return (self.depth * (x.square() - 1).square() + self.tilt * x).sum(1)

    def _reach(self, temperature: float) -> float:
        # One half of depth (x^2-1)^2 exceeds the neglected energies, while the other half
        # outweighs the tilt, which lowers the energy by at most |tilt| x.
        reach = 1.0
        while (
            self.depth * (reach**2 - 1) ** 2 - 2 * abs(self.tilt) * reach
            < _NEGLIGIBLE * temperature
        ):
            reach *= 1.05
        return reach


class Checkerboard(AnalyticEnergy):
    """A board of squares of alternately low and high energy, x of shape (B, 2).

        E(x) = barrier * sigmoid(-sharpness * sin(pi x1/side) sin(pi x2/side))
               + stiffness/2 * sum_i relu(|x_i| - limit)^2

    A smooth approximation of the uniform law on the dark squares, for samplers that need a
    gradient. It tends to that law as barrier, sharpness and stiffness grow.
    """

    def __init__(
        self,
        side: float = 1.0,
        num_squares: int = 4,
        barrier: float = 6.0,
        sharpness: float = 10.0,
        stiffness: float = 100.0,
    ) -> None:
        super().__init__((2,))
        self.event = EventSpec((2,), "real")
        self.side = side
        self.num_squares = num_squares
        self.limit = 0.5 * side * num_squares
        self.barrier = barrier
        self.sharpness = sharpness
        self.stiffness = stiffness

    def energy(self, x: Tensor) -> Tensor:
        return self.barrier * (-self.sharpness * self._pattern(x)).sigmoid() + self._wall(x)

    def log_z(self, temperature: float = 1.0) -> float:
        """By quadrature with panels that end on the squares' borders, good to about 1e-9."""
        reach = self.limit + math.sqrt(2 * _NEGLIGIBLE * temperature / self.stiffness)
        inside = np.linspace(-self.limit, self.limit, 8 * self.num_squares + 1)
        outside = np.linspace(self.limit, reach, 9)[1:]
        edges = np.concatenate([-outside[::-1], inside, outside])
        return log_integral(self.energy, [edges, edges], temperature, order=12)

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Exact, by rejection. Proposals follow the walls alone, which factor over coordinates."""
        device = generator.device
        spread = math.sqrt(temperature / self.stiffness)
        flat, tails = 2 * self.limit, spread * math.sqrt(2 * math.pi)
        kept: list[Tensor] = []
        while sum(map(len, kept)) < num:
            size = (2 * num + 16, 2)
            u = torch.rand(size, generator=generator, device=device)
            place = (2 * torch.rand(size, generator=generator, device=device) - 1) * self.limit
            step = torch.randn(size, generator=generator, device=device) * spread
            beyond = torch.where(step < 0, step - self.limit, step + self.limit)
            x = torch.where(u * (flat + tails) < flat, place, beyond)
            excess = self.energy(x) - self._wall(x)
            accept = torch.rand(len(x), generator=generator, device=device)
            kept.append(x[accept < (-excess / temperature).exp()])
        return torch.cat(kept)[:num]

    def _pattern(self, x: Tensor) -> Tensor:
        return (x * (math.pi / self.side)).sin().prod(1)

    def _wall(self, x: Tensor) -> Tensor:
        return 0.5 * self.stiffness * (x.abs() - self.limit).relu().square().sum(1)


def _draw_on_grid(energy, low: float, high: float, num: int, generator: torch.Generator) -> Tensor:
    """`num` draws on [low, high] from exp(-energy): a cell by its mass, then uniform in it.

    With 65,536 cells the moments are off by the square of the cell's width, below 1e-7.
    """
    edges = torch.linspace(low, high, 2**16 + 1, dtype=torch.float64)
    width = edges[1] - edges[0]
    mass = (-energy(edges[:-1] + 0.5 * width)).softmax(0).to(generator.device)
    u = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
    cell = torch.searchsorted(mass.cumsum(0), u).clamp_(max=2**16 - 1)
    inside = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
    return (edges.to(cell.device)[cell] + width * inside).float()


@FAMILY.register
class RingSection(EnergySection):
    """A ring in the plane: E(x) = (||x|| - radius)^2 / (2 width^2)."""

    name: Literal["ring"] = "ring"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real",)

    radius: PositiveFloat = 2.0
    """Distance of the ring from the origin."""

    width: PositiveFloat = 0.2
    """Standard deviation across the ring, at temperature 1."""

    def module(self) -> Energy:
        return Ring(self.radius, self.width)


@FAMILY.register
class DoubleWellSection(EnergySection):
    """Two wells at -1 and 1 in each coordinate: depth (x^2 - 1)^2 + tilt x."""

    name: Literal["double_well"] = "double_well"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real",)

    depth: PositiveFloat = 4.0
    """Energy of the barrier at 0."""

    tilt: float = 0.0
    """Slope that makes one well deeper than the other; positive favours the left."""

    num_dims: PositiveInt = 1
    """Independent coordinates."""

    def module(self) -> Energy:
        return DoubleWell(self.depth, self.tilt, self.num_dims)


@FAMILY.register
class CheckerboardSection(EnergySection):
    """A checkerboard in the plane, smooth enough for gradient samplers."""

    name: Literal["checkerboard"] = "checkerboard"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real",)

    side: PositiveFloat = 1.0
    """Side of one square."""

    num_squares: PositiveInt = Field(default=4, le=64)
    """Squares along one side of the board."""

    barrier: NonNegativeFloat = 6.0
    """Energy of a light square above a dark one."""

    sharpness: PositiveFloat = 10.0
    """How steep the borders of the squares are."""

    stiffness: PositiveFloat = 100.0
    """Curvature of the wall around the board."""

    def module(self) -> Energy:
        return Checkerboard(
            self.side, self.num_squares, self.barrier, self.sharpness, self.stiffness
        )


def ring(radius: float, width: float) -> Ring:
    """A ring in the plane; see `Ring`."""
    return _built(RingSection, radius=radius, width=width)


def double_well(depth: float, tilt: float = 0.0, num_dims: int = 1) -> DoubleWell:
    """Two wells in each coordinate; see `DoubleWell`."""
    return _built(DoubleWellSection, depth=depth, tilt=tilt, num_dims=num_dims)


def checkerboard(**params: Any) -> Checkerboard:
    """A checkerboard in the plane; see `Checkerboard` for the parameters."""
    return _built(CheckerboardSection, **params)


def _built(section: type[EnergySection], **params: Any) -> Any:
    """Build through the config section, so that parameters pass the same checks."""
    return FAMILY.make(section.model_fields["name"].default, **params)
