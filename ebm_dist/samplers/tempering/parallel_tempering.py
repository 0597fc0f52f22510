"""Parallel tempering: copies of the chains at rising temperatures that exchange places."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import FAMILY, Kernel, per_chain
from ebm_dist.samplers.metropolis import decide
from ebm_dist.samplers.tempering.ladder import LadderSection


@dataclass(frozen=True, slots=True)
class ParallelTemperingState:
    """The copies, coldest first, and the exchanges so far."""

    replicas: tuple[Any, ...]  # R states of the inner kernel
    num_moves: int  # since init; its parity says which neighbours may exchange
    num_swaps: Tensor  # (R - 1, B), accepted exchanges of neighbours r and r + 1
    num_attempts: tuple[int, ...]  # R - 1, the same for every chain

    @property
    def position(self) -> Tensor:
        """(B, *event), of the coldest copy."""
        return self.replicas[0].position

    @property
    def energy(self) -> Tensor:
        """(B,), of the coldest copy."""
        return self.replicas[0].energy


@dataclass(frozen=True, slots=True)
class ParallelTemperingInfo:
    """Reported for each move."""

    swap_acceptance: Tensor  # (B,), mean acceptance probability of the attempted exchanges
    swap_lowest: Tensor  # (B,), the lowest of these probabilities


@dataclass(frozen=True, slots=True)
class ParallelTempering:
    """R copies of every chain at temperatures[0] < ... < temperatures[R-1].

    Each step moves every copy once by `kernel` at its temperature, then neighbours
    exchange places with probability min(1, exp((1/T_r - 1/T_s) (E_r - E_s))): even pairs
    after one step, odd pairs after the next, which carries copies along the ladder faster
    than random pairs (Okabe et al. 2001; Syed et al. 2022, arXiv:1905.02939). The chains
    are the coldest copies; `init` starts all copies of a chain at the same place.
    """

    kernel: Kernel[Any]
    temperatures: tuple[float, ...]

    # `leaves_invariant` stays false: `init` starts the hot copies at the place of the cold one, and
    # the energy of a chain is not the log-density of its ladder of copies.

    @property
    def temperature(self) -> float:
        """The temperature of the coldest copies, which are the chains."""
        return self.temperatures[0]

    @property
    def kernels(self) -> tuple[Kernel[Any], ...]:
        """The kernel at each temperature."""
        return tuple(replace(self.kernel, temperature=t) for t in self.temperatures)  # type: ignore[type-var]

    @property
    def coldest(self) -> Kernel[Any]:
        """The kernel of the coldest copies, whose law is that of the chains."""
        return self.kernels[0]

    def init(self, x: Tensor, energy: EnergyFn) -> ParallelTemperingState:
        # One evaluation for all copies: they start at the same place.
        first = self.kernels[0].init(x, energy)
        num = len(self.temperatures)
        return ParallelTemperingState(
            replicas=tuple(first for _ in range(num)),
            num_moves=0,
            num_swaps=first.energy.new_zeros((num - 1, first.energy.shape[0])),
            num_attempts=(0,) * (num - 1),
        )

    def step(
        self, state: ParallelTemperingState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[ParallelTemperingState, ParallelTemperingInfo]:
        kernels = self.kernels
        replicas = [
            kernel.step(replica, energy, generator)[0]
            for kernel, replica in zip(kernels, state.replicas)
        ]
        num_swaps, attempts, rates = state.num_swaps.clone(), list(state.num_attempts), []
        for r in self._pairs(state.num_moves):
            log_ratio = swap_log_ratio(
                replicas[r].energy,
                replicas[r + 1].energy,
                self.temperatures[r],
                self.temperatures[r + 1],
            )
            accepted, decision = decide(log_ratio, generator)
            replicas[r], replicas[r + 1] = _exchange(
                accepted, replicas[r], replicas[r + 1], kernels[r], kernels[r + 1]
            )
            num_swaps[r] += decision.accepted
            attempts[r] += 1
            rates.append(decision.acceptance)
        new = ParallelTemperingState(
            tuple(replicas), state.num_moves + 1, num_swaps, tuple(attempts)
        )
        stacked = torch.stack(rates)
        return new, ParallelTemperingInfo(stacked.mean(0), stacked.amin(0))

    def _pairs(self, num_moves: int) -> range:
        num = len(self.temperatures)
        # Two copies have one pair; leaving it out of every other step would gain nothing.
        return range(0 if num == 2 else num_moves % 2, num - 1, 2)


def swap_log_ratio(energy_cold: Tensor, energy_hot: Tensor, cold: float, hot: float) -> Tensor:
    """(B,), log of the Metropolis ratio of exchanging copies at temperatures cold and hot."""
    return (1 / cold - 1 / hot) * (energy_cold - energy_hot)


def _exchange(
    accepted: Tensor, a: Any, b: Any, kernel_a: Kernel[Any], kernel_b: Kernel[Any]
) -> tuple[Any, Any]:
    """States `a` and `b` with every per-chain tensor exchanged where `accepted` (B,)."""
    into_a, into_b = {}, {}
    for name in (f.name for f in fields(a)):
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, Tensor):
            mask = per_chain(accepted, left)
            left, right = torch.where(mask, right, left), torch.where(mask, left, right)
        into_a[name], into_b[name] = left, right
    new_a, new_b = type(a)(**into_a), type(b)(**into_b)
    if hasattr(kernel_a, "exchanged"):
        ratio = (kernel_a.temperature / kernel_b.temperature) ** 0.5
        one = torch.ones_like(a.energy)
        new_a = kernel_a.exchanged(new_a, torch.where(accepted, ratio * one, one))  # type: ignore[attr-defined]
        new_b = kernel_b.exchanged(new_b, torch.where(accepted, one / ratio, one))  # type: ignore[attr-defined]
    return new_a, new_b


@FAMILY.register
class ParallelTemperingSection(LadderSection):
    """Copies of the chains at rising temperatures that exchange places."""

    name: Literal["parallel_tempering"] = "parallel_tempering"
    example: ClassVar[dict[str, Any]] = {
        "kernel": {"name": "mala", "step_size": 0.5},
        "temperatures": (1.0, 2.0, 4.0),
    }

    def build(self) -> ParallelTempering:
        return ParallelTempering(kernel=self.inner(), temperatures=self.temperatures)
