"""Runs the steps of one round, and says after which step each energy is known.

Most kernels return a state: the position after the move with its energy and gradient. A
`DepartingKernel` evaluates the energy before it moves, so the energy of a position is known one
step later. A round of K such steps computes K gradients and, at the final position, one energy
without a gradient. K steps with states compute K + 1 gradients, of which nobody uses the last.
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


class Stepper(Protocol):
    """The steps of one round."""

    state: Any
    """The state before the next step, which compiled blocks take and return."""
    lag: int
    """Number of steps after which the energy of a position is known: 0 or 1."""

    @property
    def kernel(self) -> Kernel[Any]:
        """The kernel that blocks of steps are compiled from."""
        ...

    def step(self, generator: torch.Generator) -> Any:
        """Move the chains once; returns the kernel's info."""
        ...

    def finish(self, energies: Tensor, last: Tensor | None) -> KernelState | None:
        """Complete the energies (lag + num_steps, B) after the last step.

        Args:
            last: energies (B,) at the final position, if a compiled block has computed them.

        Returns:
            The state to continue from; None if the kernel needs the position only.
        """
        ...


def make_stepper(
    kernel: Kernel[Any], position: Tensor, energy: EnergyFn, clock: Tensor | None = None
) -> Stepper:
    """The stepper for chains that start at `position` (B, *event), which it overwrites.

    Args:
        clock: (B,), the ages of the chains, for a kernel that reads them.
    """
    if isinstance(kernel, DepartingKernel):
        return _DepartingStepper(kernel, position, energy)
    return _StateStepper(kernel, position, energy, {} if clock is None else {"clock": clock})


class _StateStepper:
    """For kernels whose state holds the energy at the current position."""

    lag = 0

    def __init__(
        self, kernel: Kernel[Any], position: Tensor, energy: EnergyFn, ages: dict[str, Tensor]
    ) -> None:
        self.kernel = kernel
        self.state = kernel.init(position, energy, **ages)
        self._energy = energy
        self._noise = noise_buffer(position) if isinstance(kernel, InPlaceKernel) else None

    def step(self, generator: torch.Generator) -> Any:
        if isinstance(self.kernel, InPlaceKernel):
            assert self._noise is not None
            self.state, info = self.kernel.step_(self.state, self._energy, generator, self._noise)
        else:
            self.state, info = self.kernel.step(self.state, self._energy, generator)
        return info

    def finish(self, energies: Tensor, last: Tensor | None) -> KernelState:
        return self.state


@dataclass(frozen=True, slots=True)
class Departed:
    """Chains of a `DepartingKernel`: the position now, the energy before the last move."""

    position: Tensor  # (B, *event)
    energy: Tensor  # (B,), E at the position before the last move


@dataclass(frozen=True, slots=True)
class Departing:
    """Wraps a `DepartingKernel` as a `Kernel` with a state, so that blocks can be compiled."""

    kernel: DepartingKernel

    @property
    def temperature(self) -> float:
        return self.kernel.temperature

    def init(self, x: Tensor, energy: EnergyFn) -> Departed:
        """The state at `x`; checks the energy as `Kernel.init` does, since blocks do not."""
        return Departed(x, value_and_grad(energy, x, first=True)[0])

    def step(
        self, state: Departed, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[Departed, Any]:
        position = state.position.clone()
        before, info = self.kernel.depart_(position, energy, generator, noise_buffer(position))
        return Departed(position, before), info


class _DepartingStepper:
    """For kernels that evaluate the energy before the move."""

    lag = 1

    def __init__(self, kernel: DepartingKernel, position: Tensor, energy: EnergyFn) -> None:
        self._kernel = kernel
        self.kernel = Departing(kernel)
        self.state = self._start = Departed(position, position.new_zeros(position.shape[0]))
        self._energy = energy
        self._noise = noise_buffer(position)
        self._unchecked = True

    def step(self, generator: torch.Generator) -> Any:
        position, first = self.state.position, self.state is self._start
        before, info = self._kernel.depart_(
            position, self._energy, generator, self._noise, first=first
        )
        self._unchecked = self._unchecked and not first
        self.state = Departed(position, before)
        return info

    def finish(self, energies: Tensor, last: Tensor | None) -> None:
        if self._unchecked:  # compiled steps do not check the first energies
            require_finite(energies[0], "at the start of the chains (x)")
        energies[-1] = self._last_energy() if last is None else last
        # The engine recognises a round by the dtypes of its first state, and the energy of the
        # last state may have another dtype than that.
        self.state = Departed(self.state.position, self._start.energy)

    def _last_energy(self) -> Tensor:
        # Builds a graph that nobody uses: without one an energy may run other operations, and
        # its values would differ from those of a step by rounding.
        x = self.state.position.detach().requires_grad_(True)
        with torch.enable_grad():
            return as_float(self._energy(x).detach())
