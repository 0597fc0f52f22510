"""Hopfield networks: the classical one on spins, and the modern, dense one on real vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.energies.closed_form.finite import FiniteEnergy
from ebm_dist.energies.closed_form.gaussian import constant_or_parameter
from ebm_dist.energies.family import FAMILY, AnalyticEnergy, Energy, EnergySection

Storage = Literal["hebbian", "pseudo_inverse"]
MAX_UNITS = 2**12
"""Most units, and most patterns. So many units have 2**24 weights, and storing so many patterns
in them takes a minute."""

Patterns = Tensor | Sequence[Sequence[float]]


def store(spins: Tensor, storage: Storage) -> Tensor:
    """Symmetric weights (n, n) with zero diagonal that hold the patterns `spins` (P, n).

    hebbian: W = 1/n sum_p s_p s_p^T (Hopfield 1982); good to a load P/n of about .138.
    pseudo_inverse: the projection on the patterns' span (Personnaz et al. 1985), which
    holds any P < n linearly independent patterns exactly.
    """
    spins = spins.double()
    if storage == "hebbian":
        weight = spins.T @ spins / spins.shape[1]
    else:
        weight = spins.T @ torch.linalg.pinv(spins.T)
    # On spins the diagonal only adds a constant to the energy. Outside {0, 1} it would add a term
    # that depends on x, and it slows retrieval.
    return (0.5 * (weight + weight.T)).fill_diagonal_(0.0)


class Hopfield(FiniteEnergy):
    """E(x) = -1/2 s^T W s - b^T s with s = 2x - 1, x in {0,1} of shape (B, *event).

    Args:
        patterns: (P, n) or (P, *event), entries in {0,1} or in {-1,1}.
        storage: how the patterns become weights; see `store`.
        bias: b, one number for all units.
        learnable: make W and b parameters: a fully visible Boltzmann machine that starts
            from the stored patterns.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        patterns: Patterns,
        storage: Storage = "hebbian",
        *,
        bias: float = 0.0,
        learnable: bool = False,
    ) -> None:
        spins = _as_spins(patterns)
        if spins[0].numel() > MAX_UNITS:
            raise ValueError(
                f"energy.patterns: {spins[0].numel()} units; at most {MAX_UNITS} have a matrix of "
                "weights that fits"
            )
        event_shape = tuple(spins.shape[1:])
        super().__init__(event_shape)
        self.event = EventSpec(event_shape, "binary")
        flat = spins.flatten(1)
        weight = store(flat, storage).float()
        constant_or_parameter(self, "weight", weight, learnable)
        constant_or_parameter(self, "bias", torch.full((flat.shape[1],), float(bias)), learnable)
        self.register_buffer("patterns", (0.5 * (spins + 1)).float(), persistent=False)

    def energy(self, x: Tensor) -> Tensor:
        spin = 2 * x.flatten(1) - 1
        pull = 0.5 * spin @ self._symmetric().to(x.dtype) + self.bias.to(x.dtype)
        return -(spin * pull).sum(1)

    def local_field(self, x: Tensor) -> Tensor:
        """W s + b, (B, *event): a unit is stable where its spin has this sign."""
        spin = 2 * x.flatten(1) - 1
        field = spin @ self._symmetric().to(x.dtype) + self.bias.to(x.dtype)
        return field.reshape(x.shape)

    @torch.no_grad()
    def retrieve(
        self, x: Tensor, generator: torch.Generator | None = None, max_sweeps: int = 100
    ) -> Tensor:
        """Descend from each state (B, *event) to a local minimum: spins align one at a time.

        A spin flips only if that lowers the energy, so no sweep raises it, and the descent ends
        in a state that no single flip improves.

        Args:
            generator: draws a new order of the units for each sweep; without it they go in
                index order.
            max_sweeps: most sweeps over all units; the descent ends when no spin flips.
        """
        self.check(x)
        spin = (2 * x.flatten(1) - 1).double()
        weight, bias = self._symmetric().double(), self.bias.double()
        num_units = spin.shape[1]
        # A field as small as its rounding error counts as 0: a flip could raise E.
        tie = 1e-12 * (weight.abs().sum(1).max() + bias.abs().max()).item()
        for _ in range(max_sweeps):
            before = spin.clone()
            order = (
                torch.arange(num_units)
                if generator is None
                else torch.randperm(num_units, generator=generator, device=generator.device)
            )
            for unit in order.tolist():
                field = spin @ weight[unit] + bias[unit]
                spin[:, unit] = torch.where(field.abs() > tie, field.sign(), spin[:, unit])
            if torch.equal(before, spin):
                break
        return (0.5 * (spin + 1)).to(x.dtype).reshape(x.shape)

    def _symmetric(self) -> Tensor:
        """W as the energy uses it: a learnt W is symmetrised and loses its diagonal."""
        if not isinstance(self.weight, torch.nn.Parameter):
            return self.weight
        weight = 0.5 * (self.weight + self.weight.T)
        return weight - weight.diagonal().diag()


def _as_spins(patterns: Patterns) -> Tensor:
    value = torch.as_tensor(patterns, dtype=torch.float64)
    if value.ndim < 2 or value.numel() == 0:
        raise ValueError(
            f"energy.patterns: shape {tuple(value.shape)}, expected (num_patterns, num_units)"
        )
    if ((value == 0) | (value == 1)).all():
        return 2 * value - 1
    if ((value == -1) | (value == 1)).all():
        return value
    raise ValueError("energy.patterns: entries must be all in {0, 1} or all in {-1, 1}")


class ModernHopfield(AnalyticEnergy):
    """E(x) = -1/beta logsumexp_p(beta pattern_p . x) + 1/2 ||x||^2, x of shape (B, D).

    Ramsauer et al. (2021), arXiv:2008.02217, eq. 1 without its constants. At temperature
    1/beta the law is a mixture of Gaussians of variance 1/beta around the patterns, with
    weights proportional to exp(beta ||pattern||^2 / 2).
    """

    patterns: Tensor

    def __init__(self, patterns: Patterns, beta: float = 8.0, *, learnable: bool = False) -> None:
        value = torch.as_tensor(patterns, dtype=torch.float32).detach().clone()
        if value.ndim != 2 or value.numel() == 0:
            raise ValueError(
                f"energy.patterns: shape {tuple(value.shape)}, expected (num_patterns, num_dims)"
            )
        super().__init__((value.shape[1],))
        self.event = EventSpec((value.shape[1],), "real")
        self.beta = beta
        constant_or_parameter(self, "patterns", value, learnable)

    def energy(self, x: Tensor) -> Tensor:
        match = self.beta * (x @ self.patterns.to(x.dtype).T)
        return 0.5 * x.square().sum(1) - match.logsumexp(1) / self.beta

    @torch.no_grad()
    def retrieve(self, x: Tensor, max_steps: int = 100, tolerance: float = 1e-6) -> Tensor:
        """x <- patterns^T softmax(beta patterns x) until x stops changing; never raises E."""
        self.check(x)
        patterns = self.patterns.to(x.dtype)
        for _ in range(max_steps):
            moved = (self.beta * (x @ patterns.T)).softmax(1) @ patterns
            done = (moved - x).abs().max() <= tolerance
            x = moved
            if done:
                break
        return x

    def log_z(self, temperature: float = 1.0) -> float:
        """Closed form at temperature 1/beta only."""
        if not math.isclose(temperature * self.beta, 1.0):
            return super().log_z(temperature)
        size = self.patterns.shape[1]
        return 0.5 * size * math.log(2 * math.pi / self.beta) + self._log_mass().logsumexp(0).item()

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Exact at temperature 1/beta only."""
        if not math.isclose(temperature * self.beta, 1.0):
            return super().sample(num, generator, temperature)
        patterns = self.patterns.detach()
        weight = self._log_mass().softmax(0)
        which = torch.multinomial(weight, num, replacement=True, generator=generator)
        noise = torch.empty(num, patterns.shape[1], device=patterns.device)
        noise.normal_(generator=generator)
        return patterns[which] + noise / math.sqrt(self.beta)

    def _log_mass(self) -> Tensor:
        return 0.5 * self.beta * self.patterns.detach().double().square().sum(1)


@FAMILY.register
class HopfieldSection(EnergySection):
    """The classical Hopfield network on {0,1} events (spins are 2x - 1)."""

    name: Literal["hopfield"] = "hopfield"
    kinds: ClassVar[tuple[EventKind, ...]] = ("binary",)
    example: ClassVar[dict[str, Any]] = {"num_patterns": 3, "num_units": 10}

    patterns: tuple[tuple[Literal[-1, 0, 1], ...], ...] | None = None
    """Patterns to store, (num_patterns, num_units) in {0,1} or {-1,1}; random when left out."""

    num_patterns: PositiveInt = Field(default=3, le=MAX_UNITS)
    """Random patterns to store where none are given."""

    num_units: PositiveInt = Field(default=32, le=MAX_UNITS)
    """Units of the random patterns."""

    storage: Storage = "hebbian"
    """hebbian, or pseudo_inverse for patterns that resemble each other."""

    bias: float = 0.0
    """Positive favours spin up (1)."""

    learnable: bool = False
    """Train weights and biases: a fully visible Boltzmann machine."""

    def module(self) -> Energy:
        patterns: Patterns
        if self.patterns is None:
            patterns = torch.randint(0, 2, (self.num_patterns, self.num_units)).double()
        else:
            patterns = _matrix(self.patterns, "patterns")
        return Hopfield(patterns, self.storage, bias=self.bias, learnable=self.learnable)


@FAMILY.register
class ModernHopfieldSection(EnergySection):
    """The modern (dense) Hopfield network on real vectors."""

    name: Literal["modern_hopfield"] = "modern_hopfield"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real",)
    example: ClassVar[dict[str, Any]] = {"num_patterns": 2, "num_dims": 3, "beta": 1.0}

    patterns: tuple[tuple[float, ...], ...] | None = Field(default=None, min_length=1)
    """Patterns to store, (num_patterns, num_dims); random signs when left out."""

    num_patterns: PositiveInt = Field(default=3, le=MAX_UNITS)
    """Random patterns to store where none are given."""

    num_dims: PositiveInt = Field(default=16, le=MAX_UNITS)
    """Entries of the random patterns."""

    beta: PositiveFloat = 8.0
    """Inverse temperature in the log-sum-exp; large values keep the patterns apart."""

    learnable: bool = False
    """Train the patterns."""

    @model_validator(mode="after")
    def _patterns_are_a_matrix(self) -> Self:
        if self.patterns is not None:
            _matrix(self.patterns, "patterns")
        return self

    def module(self) -> Energy:
        if self.patterns is None:
            sign = torch.randint(0, 2, (self.num_patterns, self.num_dims))
            return ModernHopfield(2.0 * sign - 1, self.beta, learnable=self.learnable)
        return ModernHopfield(self.patterns, self.beta, learnable=self.learnable)


def _matrix(rows: Sequence[Sequence[float]], key: str) -> Tensor:
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"energy.{key}: rows of lengths {sorted(lengths)}, expected one length")
    return torch.tensor(rows, dtype=torch.float64)


def hopfield(patterns: Patterns, storage: Storage = "hebbian", **params: Any) -> Hopfield:
    """The classical Hopfield network; see `Hopfield` for the parameters."""
    return Hopfield(patterns, storage, **params)


def modern_hopfield(patterns: Patterns, beta: float = 8.0, **params: Any) -> ModernHopfield:
    """The modern Hopfield network; see `ModernHopfield` for the parameters."""
    return ModernHopfield(patterns, beta, **params)
