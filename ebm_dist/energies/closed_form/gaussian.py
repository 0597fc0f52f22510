"""Quadratic energies: the Gaussian law, with a precision that can be learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ebm_dist.core.types import EventKind, EventSpec
from ebm_dist.energies.family import FAMILY, AnalyticEnergy, BoundSection, Energy

Vector = Sequence[float]
Matrix = Sequence[Sequence[float]]


class Quadratic(AnalyticEnergy):
    """E(x) = 1/2 (x - mean)^T P (x - mean) + offset, x of shape (B, *event) flattened to D.

    With a `slope` W it is the conditional E(x | c) whose mean is linear in c: mean + W c.

    Args:
        precision: P: a number (times the identity), its diagonal (D,), or symmetric (D, D).
        mean: a number, or (D,).
        slope: W, (D, C) for conditions c of shape (C,).
        offset: the energy of the minimum.
        event_shape: by default (D,) for a vector or matrix; with a number P takes any events.
        learnable: make `precision` a parameter.
        learnable_mean: make `mean` a parameter, and `slope`.

    Raises:
        ValueError: P is not positive definite, or the shapes do not match.
    """

    def __init__(
        self,
        precision: float | Vector | Matrix | Tensor,
        *,
        mean: float | Vector | Tensor = 0.0,
        slope: Matrix | Tensor | None = None,
        offset: float = 0.0,
        event_shape: tuple[int, ...] | None = None,
        learnable: bool = False,
        learnable_mean: bool = False,
    ) -> None:
        p = torch.as_tensor(precision, dtype=torch.float32).detach().clone()
        centre = torch.as_tensor(mean, dtype=torch.float32).detach().clone()
        centre = centre.flatten() if centre.ndim else centre
        if p.ndim > 2 or (p.ndim == 2 and p.shape[0] != p.shape[1]):
            raise ValueError(
                f"energy.precision: shape {tuple(p.shape)}; give a number, a vector or a square "
                "matrix"
            )
        size = p.shape[0] if p.ndim else centre.shape[0] if centre.ndim else None
        if event_shape is None and size is not None:
            event_shape = (size,)
        total = None if event_shape is None else math.prod(event_shape)
        w = None if slope is None else torch.as_tensor(slope, dtype=torch.float32).detach().clone()
        if w is not None and w.ndim != 2:
            raise ValueError(
                f"energy.slope: shape {tuple(w.shape)}; give a row for each number of x"
            )
        for key, value in (("precision", p), ("mean", centre), ("slope", w)):
            if value is not None and value.ndim and value.shape[0] != total:
                raise ValueError(
                    f"energy.{key}: {value.shape[0]} entries, but events of shape {event_shape} "
                    f"have {total} numbers"
                )
        if not torch.isfinite(p).all() or _eigenvalues(p).min() <= 0:
            raise ValueError("energy.precision: not positive definite, so exp(-E) has no finite Z")
        super().__init__(event_shape)
        if event_shape is not None:
            self.event = EventSpec(event_shape, "real")
        self.offset = offset
        self.precision = constant_or_parameter(self, "precision", p, learnable)
        self.mean = constant_or_parameter(self, "mean", centre, learnable_mean)
        if w is None:
            self.register_buffer("slope", None)
        else:
            self.slope = constant_or_parameter(self, "slope", w, learnable_mean)
            self.context = self.needs_context = frozenset({"condition"})
            self.condition_shape = (w.shape[1],)

    def energy(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        y = x.flatten(1) - self.mean.to(x.dtype)
        if self.slope is not None:
            assert condition is not None
            y = y - condition.to(x.dtype) @ self.slope.to(x.dtype).T
        p = self.precision.to(x.dtype)
        # Symmetrised, so that a learnt matrix has one gradient for each pair of coordinates.
        half = (y * (y @ (0.5 * (p + p.T)))) if p.ndim == 2 else p * y.square()
        return 0.5 * half.sum(1) + self.offset

    def log_z(self, temperature: float = 1.0) -> float:
        """D/2 log(2 pi T) - 1/2 log det P - offset/T."""
        if self.event_shape is None:
            raise ValueError(
                "energy.event_shape: a number as precision leaves the dimension open, and log Z "
                "depends on it; give event_shape"
            )
        size = math.prod(self.event_shape)
        log_det = _eigenvalues(self.precision.detach()).log()
        # One number stands for all coordinates.
        total = log_det.sum() * (size // log_det.numel())
        gaussian = 0.5 * size * math.log(2 * math.pi * temperature) - 0.5 * total.item()
        return gaussian - self.offset / temperature

    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        if self.slope is not None:
            raise ValueError(
                "energy.slope: the law depends on a condition; draw with "
                "energy.given(condition=...) and ebm_dist.samplers.run_chain"
            )
        if self.event_shape is None:
            raise ValueError("energy.event_shape: give it, to draw events of that shape")
        size = math.prod(self.event_shape)
        p = self.precision.detach()
        noise = torch.empty(num, size, device=p.device).normal_(generator=generator)
        if p.ndim == 2:
            lower = torch.linalg.cholesky(0.5 * (p + p.T))
            y = torch.linalg.solve_triangular(lower.T, noise.T, upper=True).T
        else:
            y = noise / p.sqrt()
        x = self.mean.detach() + math.sqrt(temperature) * y
        return x.reshape(num, *self.event_shape)


def _eigenvalues(p: Tensor) -> Tensor:
    p = p.double()
    return torch.linalg.eigvalsh(0.5 * (p + p.T)) if p.ndim == 2 else p.reshape(-1)


def constant_or_parameter(module: nn.Module, name: str, value: Tensor, learnable: bool) -> Tensor:
    """Register `value` as a parameter, or as an unsaved buffer, which the config can rebuild."""
    if learnable:
        # Shape (1,) at least: DeepSpeed views weights as bytes, which a 0-d tensor does not allow.
        module.register_parameter(name, nn.Parameter(value.reshape(value.shape or (1,))))
    else:
        module.register_buffer(name, value, persistent=False)
    return getattr(module, name)


@FAMILY.register
class QuadraticSection(BoundSection):
    """E(x) = 1/2 (x - mean)^T precision (x - mean) + offset: a Gaussian."""

    name: Literal["quadratic"] = "quadratic"
    kinds: ClassVar[tuple[EventKind, ...]] = ("real", "image")
    example: ClassVar[dict[str, Any]] = {"precision": (1.0, 4.0)}

    precision: float | tuple[float, ...] | tuple[tuple[float, ...], ...] = 1.0
    """A number, the diagonal, or a symmetric matrix; the initial value if it is learnt."""

    mean: float | tuple[float, ...] = 0.0
    """A number, or one for each coordinate."""

    slope: tuple[tuple[float, ...], ...] | None = None
    """A row of factors for each coordinate, for E(x | c) with the mean mean + slope c."""

    offset: float = 0.0
    """Energy at the mean."""

    learnable: bool = False
    """Train the precision."""

    learnable_mean: bool = False
    """Train the mean, and the slope."""

    def module(self) -> Energy:
        return Quadratic(
            self.precision,
            mean=self.mean,
            slope=self.slope,
            offset=self.offset,
            event_shape=self.event_shape,
            learnable=self.learnable,
            learnable_mean=self.learnable_mean,
        )


def quadratic(
    precision: float | Vector | Matrix | Tensor,
    mean: float | Vector | Tensor = 0.0,
    **params: Any,
) -> Quadratic:
    """A Gaussian energy; see `Quadratic` for the parameters."""
    return Quadratic(precision, mean=mean, **params)
