"""Spin models on a periodic lattice: Ising and Potts, with exact log Z by transfer matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.energies.closed_form.finite import FiniteEnergy, log_trace_power
from ebm_dist.energies.closed_form.gaussian import constant_or_parameter
from ebm_dist.energies.family import FAMILY, Energy, EnergySection

_MAX_LAYER_STATES = 2**11


class Potts(FiniteEnergy):
    """E(x) = -coupling sum_<ij> x_i . x_j - sum_i field . x_i, x one-hot (B, *lattice, q).

    The lattice is periodic in every direction and each site bonds with its successor in
    each, so a side of 2 has two bonds between its sites, and a side of 1 is refused.

    Args:
        shape: sides of the lattice.
        num_values: q, the number of values of one site.
        coupling: positive favours equal neighbours.
        field: (q,), or a number for the first value.
        learnable: make coupling and field parameters.
    """

    coupling: Tensor
    field: Tensor
    colour: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        num_values: int,
        coupling: float = 1.0,
        field: float | Sequence[float] = 0.0,
        *,
        learnable: bool = False,
    ) -> None:
        lattice = _lattice(shape)
        super().__init__((*lattice, num_values))
        self.event = EventSpec((*lattice, num_values), "categorical")
        self.lattice = lattice
        values = torch.zeros(num_values)
        if isinstance(field, Sequence):
            if len(field) != num_values:
                raise ValueError(f"energy.field: {len(field)} entries, but {num_values} values")
            values = torch.tensor(list(field), dtype=torch.float32)
        else:
            values[0] = field
        constant_or_parameter(self, "coupling", torch.tensor(float(coupling)), learnable)
        constant_or_parameter(self, "field", values, learnable)
        self.register_buffer("colour", _colour(lattice), persistent=False)

    @property
    def gibbs_blocks(self) -> tuple[Tensor, ...]:
        """Masks (*lattice) of the colours: no bond joins two sites of one colour."""
        return _blocks(self.colour, self.lattice)

    def energy(self, x: Tensor) -> Tensor:
        # The field first, over whole sites: x . (J * neighbours + h) in one product.
        pull = self.coupling.to(x.dtype) * _successors(x, len(self.lattice))
        return -(x * (pull + self.field.to(x.dtype))).flatten(1).sum(1)

    def log_z(self, temperature: float = 1.0) -> float:
        """By transfer matrix where a layer has at most 2**11 states, else by enumeration."""
        axis, layer = _narrowest_layer(self.lattice)
        num_values = self.field.shape[0]
        if num_values ** math.prod(layer) > _MAX_LAYER_STATES:
            return super().log_z(temperature)
        values = torch.eye(num_values, dtype=torch.float64)
        index = list(itertools.product(range(num_values), repeat=math.prod(layer)))
        state = values[torch.tensor(index)].reshape(len(index), *layer, num_values)
        return _log_z_of_layers(self, state, len(layer), self.lattice[axis], temperature)


class Ising(FiniteEnergy):
    """E(x) = -coupling sum_<ij> s_i s_j - field sum_i s_i, s = 2x - 1, x in {0,1} (B, *shape).

    The lattice is periodic in every direction and each site bonds with its successor in
    each, so a side of 2 has two bonds between its sites, and a side of 1 is refused.
    """

    coupling: Tensor
    field: Tensor
    colour: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        coupling: float = 1.0,
        field: float = 0.0,
        *,
        learnable: bool = False,
    ) -> None:
        lattice = _lattice(shape)
        super().__init__(lattice)
        self.event = EventSpec(lattice, "binary")
        constant_or_parameter(self, "coupling", torch.tensor(float(coupling)), learnable)
        constant_or_parameter(self, "field", torch.tensor(float(field)), learnable)
        self.register_buffer("colour", _colour(lattice), persistent=False)

    @property
    def gibbs_blocks(self) -> tuple[Tensor, ...]:
        """Masks (*shape) of the colours: no bond joins two sites of one colour."""
        assert self.event is not None
        return _blocks(self.colour, self.event.shape)

    def energy(self, x: Tensor) -> Tensor:
        spin = 2 * x - 1
        pull = self.coupling.to(x.dtype) * _successors(spin, x.ndim - 1)
        return -(spin * (pull + self.field.to(x.dtype))).flatten(1).sum(1)

    def log_z(self, temperature: float = 1.0) -> float:
        """By transfer matrix where a layer has at most 2**11 states, else by enumeration."""
        assert self.event is not None
        axis, layer = _narrowest_layer(self.event.shape)
        if 2 ** math.prod(layer) > _MAX_LAYER_STATES:
            return super().log_z(temperature)
        index = list(itertools.product((-1.0, 1.0), repeat=math.prod(layer)))
        state = torch.tensor(index, dtype=torch.float64).reshape(len(index), *layer)
        return _log_z_of_layers(self, state, len(layer), self.event.shape[axis], temperature)


def _lattice(shape: Sequence[int]) -> tuple[int, ...]:
    lattice = tuple(int(side) for side in shape)
    if not lattice or min(lattice) < 2:
        raise ValueError(f"energy.shape: {lattice}, every side of a periodic lattice is at least 2")
    return lattice


def _colour(lattice: tuple[int, ...]) -> Tensor:
    """(*lattice): a colour for each site that differs from those of its neighbours.

    A ring of even length alternates 0 and 1; one of odd length has a 2 at its end. Neighbours
    differ along one axis only, so their sums over the axes differ, also modulo the number of
    colours.
    """
    total = torch.zeros(lattice, dtype=torch.long)
    for dim, side in enumerate(lattice):
        ring = torch.arange(side) % 2
        if side % 2:
            ring[-1] = 2
        total += ring.reshape([-1 if i == dim else 1 for i in range(len(lattice))])
    return total % _num_colours(lattice)


def _num_colours(lattice: tuple[int, ...]) -> int:
    return 3 if any(side % 2 for side in lattice) else 2


def _blocks(colour: Tensor, lattice: tuple[int, ...]) -> tuple[Tensor, ...]:
    # The lattice gives the number of colours. Reading it from the tensor would synchronise with a
    # GPU in every sweep, and cannot be compiled.
    return tuple(colour == value for value in range(_num_colours(lattice)))


def _successors(x: Tensor, num_axes: int) -> Tensor:
    """Sum of the successors along the lattice axes 1 .. num_axes of x (B, *lattice, ...)."""
    total = torch.zeros_like(x) if num_axes == 0 else x.roll(-1, 1)
    for dim in range(2, num_axes + 1):
        total = total + x.roll(-1, dim)
    return total


def _narrowest_layer(lattice: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The axis to multiply along, and the shape of the layers across it."""
    axis = max(range(len(lattice)), key=lambda i: lattice[i])
    return axis, lattice[:axis] + lattice[axis + 1 :]


def _log_z_of_layers(
    model: Ising | Potts, state: Tensor, num_axes: int, num_layers: int, temperature: float
) -> float:
    """log Z of `num_layers` layers in a ring; `state` (S, *layer, ...) holds every state of one.

    Args:
        num_axes: of the lattice inside a layer.
    """
    coupling = model.coupling.detach().double().cpu()
    inside = coupling * _successors(state, num_axes) + model.field.detach().double().cpu()
    flat = state.reshape(len(state), -1)
    own = (state * inside).reshape(len(state), -1).sum(1)
    between = coupling * flat @ flat.T
    log_matrix = (0.5 * (own[:, None] + own) + between) / temperature
    return log_trace_power(log_matrix, num_layers)


@FAMILY.register
class IsingSection(EnergySection):
    """The Ising model on a periodic lattice; events are {0,1}, spins are 2x - 1."""

    name: Literal["ising"] = "ising"
    kinds: ClassVar[tuple[EventKind, ...]] = ("binary",)
    example: ClassVar[dict[str, Any]] = {"shape": (3, 4), "field": 0.1}

    shape: tuple[PositiveInt, ...] = Field(default=(4, 4), min_length=1)
    """Sides of the lattice."""

    coupling: float = 1.0
    """Positive favours equal neighbours."""

    field: float = 0.0
    """Positive favours spin up (1)."""

    learnable: bool = False
    """Train coupling and field."""

    def module(self) -> Energy:
        return Ising(self.shape, self.coupling, self.field, learnable=self.learnable)


@FAMILY.register
class PottsSection(EnergySection):
    """The Potts model on a periodic lattice; events are one-hot in the last axis."""

    name: Literal["potts"] = "potts"
    kinds: ClassVar[tuple[EventKind, ...]] = ("categorical",)
    example: ClassVar[dict[str, Any]] = {"shape": (3,), "field": 0.1}

    shape: tuple[PositiveInt, ...] = Field(default=(4, 4), min_length=1)
    """Sides of the lattice."""

    num_values: int = Field(default=3, ge=2)
    """Values that one site can take."""

    coupling: float = 1.0
    """Positive favours equal neighbours."""

    field: float | tuple[float, ...] = 0.0
    """One for each value, or a number for the first value alone."""

    learnable: bool = False
    """Train coupling and field."""

    def module(self) -> Energy:
        return Potts(
            self.shape, self.num_values, self.coupling, self.field, learnable=self.learnable
        )


def ising(
    shape: int | Sequence[int], coupling: float = 1.0, field: float = 0.0, **params: Any
) -> Ising:
    """The Ising model; see `Ising`. A single number as shape is a ring of that many sites."""
    return Ising((shape,) if isinstance(shape, int) else shape, coupling, field, **params)


def potts(
    shape: int | Sequence[int],
    num_values: int,
    coupling: float = 1.0,
    field: float | Sequence[float] = 0.0,
    **params: Any,
) -> Potts:
    """The Potts model; see `Potts`. A single number as shape is a ring of that many sites."""
    lattice = (shape,) if isinstance(shape, int) else shape
    return Potts(lattice, num_values, coupling, field, **params)
