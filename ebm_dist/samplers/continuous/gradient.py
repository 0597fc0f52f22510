"""What kernels share that move along the gradient: their state, and `step` by way of `step_`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import noise_buffer, start, value_and_grad


@dataclass(frozen=True, slots=True)
class GradientState:
    """Chains, with the gradient that their next move follows."""

    position: Tensor  # (B, *event), float32
    energy: Tensor  # (B,), E(position)
    grad: Tensor  # (B, *event), dE/dx at position, before any clipping


class StartsWithGradient:
    """A kernel whose state is a `GradientState`."""

    __slots__ = ()

    def init(self, x: Tensor, energy: EnergyFn) -> GradientState:
        position = start(x, energy)
        return GradientState(position, *value_and_grad(energy, position, first=True))


State = TypeVar("State", bound=Any)
Info = TypeVar("Info")


class MovesInPlace(Generic[State, Info]):
    """An `InPlaceKernel`, whose `step` moves a copy."""

    __slots__ = ()

    overwrites: ClassVar[tuple[str, ...]] = ("position",)
    """The tensors of the state that `step_` changes."""

    def step(
        self, state: State, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[State, Info]:
        own = replace(state, **{name: getattr(state, name).clone() for name in self.overwrites})
        return self.step_(own, energy, generator, noise_buffer(state.position))

    def step_(
        self, state: State, energy: EnergyFn, generator: torch.Generator, noise: Tensor
    ) -> tuple[State, Info]:
        raise NotImplementedError
