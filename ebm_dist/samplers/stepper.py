"""The chains of one round under way, and what of a step is known when.

Most kernels leave a state: the energy where the chains now stand, and what the next move follows.
A `DepartingKernel` looks where it stands and then moves, so that the energy of a place is known
once the chains have left it. A round of K such steps takes K gradients and, for the place where it
ends, one energy without a gradient; with states it takes K + 1 gradients, the last one for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import (
    DepartingKernel,
    InPlaceKernel,
    Kernel,
    KernelState,
    as_float,
    noise_buffer,
    require_finite,
    value_and_grad,
)


class Walk(Protocol):
    """One round."""

    state: Any
    """What blocks of steps are run on."""
    lag: int
    """Steps after which the energy of a place is known."""

    @property
    def kernel(self) -> Kernel[Any]:
        """What blocks of steps are compiled from."""
        ...

    def step(self, generator: torch.Generator) -> Any:
        """Move the chains once; returns the kernel's info."""
        ...

    def arrive(self, energies: Tensor, last: Tensor | None) -> KernelState | None:
        """Complete the energies (lag + num_steps, B) after the last step.

        Args:
            last: the last of them (B,), if it is known already and no state has it.

        Returns:
            The state that the kernel can go on from, None where the position is all that it needs.
        """
        ...


def walk(kernel: Kernel[Any], position: Tensor, energy: EnergyFn) -> Walk:
    """Chains at `position` (B, *event), which is used up."""
    if isinstance(kernel, DepartingKernel):
        return _Departures(kernel, position, energy)
    return _Moves(kernel, position, energy)


class _Moves:
    """Of any kernel."""

    lag = 0

    def __init__(self, kernel: Kernel[Any], position: Tensor, energy: EnergyFn) -> None:
        self.kernel = kernel
        self.state = kernel.init(position, energy)
        self._energy = energy
        self._noise = noise_buffer(position) if isinstance(kernel, InPlaceKernel) else None

    def step(self, generator: torch.Generator) -> Any:
        if isinstance(self.kernel, InPlaceKernel):
            assert self._noise is not None
            self.state, info = self.kernel.step_(self.state, self._energy, generator, self._noise)
        else:
            self.state, info = self.kernel.step(self.state, self._energy, generator)
        return info

    def arrive(self, energies: Tensor, last: Tensor | None) -> KernelState:
        return self.state


@dataclass(frozen=True, slots=True)
class Departed:
    """Chains, and what is known of where they were before the last move."""

    position: Tensor  # (B, *event)
    energy: Tensor  # (B,), E where the chains stood before


@dataclass(frozen=True, slots=True)
class Departing:
    """A departing kernel as one with a state: what blocks are compiled from."""

    kernel: DepartingKernel

    @property
    def temperature(self) -> float:
        return self.kernel.temperature

    def init(self, x: Tensor, energy: EnergyFn) -> Departed:
        """A look at what a round that is compiled takes on trust; see `Kernel.init`."""
        return Departed(x, value_and_grad(energy, x, first=True)[0])

    def step(
        self, state: Departed, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[Departed, Any]:
        position = state.position.clone()
        before, info = self.kernel.depart_(position, energy, generator, noise_buffer(position))
        return Departed(position, before), info


class _Departures:
    """Of kernels that look where they stand, and move."""

    lag = 1

    def __init__(self, kernel: DepartingKernel, position: Tensor, energy: EnergyFn) -> None:
        self._kernel = kernel
        self.kernel = Departing(kernel)
        self.state = self._start = Departed(position, position.new_zeros(position.shape[0]))
        self._energy = energy
        self._noise = noise_buffer(position)
        self._unseen = True

    def step(self, generator: torch.Generator) -> Any:
        position, first = self.state.position, self.state is self._start
        before, info = self._kernel.depart_(
            position, self._energy, generator, self._noise, first=first
        )
        self._unseen = self._unseen and not first
        self.state = Departed(position, before)
        return info

    def arrive(self, energies: Tensor, last: Tensor | None) -> None:
        if self._unseen:  # the first steps were compiled ones
            require_finite(energies[0], "at the start of the chains (x)")
        energies[-1] = self._last_energy() if last is None else last
        # As a round begins, by which the engine knows it: an energy may have another dtype.
        self.state = Departed(self.state.position, self._start.energy)

    def _last_energy(self) -> Tensor:
        # With a graph that nobody uses: an energy may take another way without one, and its
        # numbers would then differ from those of a step by rounding.
        x = self.state.position.detach().requires_grad_(True)
        with torch.enable_grad():
            return as_float(self._energy(x).detach())
