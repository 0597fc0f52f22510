"""Energies on finitely many states: sums, expectations and exact draws by enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ebm_dist.energies.family import AnalyticEnergy

MAX_STATES = 2**22


class FiniteEnergy(AnalyticEnergy):
    """An energy of binary events, or of one-hot events in the last axis.

    All methods enumerate all states: at most 2**22, which takes about four seconds.
    """

    @property
    def num_states(self) -> int:
        """The number of possible events."""
        num_sites, num_values = self._sites()
        return num_values**num_sites

    def states(self, chunk: int = 2**14) -> Iterator[Tensor]:
        """All events, float64, (at most `chunk`, *event) at a time.

        Raises:
            ValueError: there are more than 2**22.
        """
        num_sites, num_values = self._sites()
        assert self.event is not None
        if self.num_states > MAX_STATES:
            raise ValueError(
                f"{type(self).__name__}: {num_values}^{num_sites} states are too many to "
                "enumerate; estimate log Z with ebm_dist.evaluation.log_partition (AIS)"
            )
        place = num_values ** torch.arange(num_sites)
        for start in range(0, self.num_states, chunk):
            index = torch.arange(start, min(start + chunk, self.num_states))
            value = index[:, None] // place % num_values
            if self.event.kind == "categorical":
                value = torch.nn.functional.one_hot(value, num_values)
            yield value.double().reshape(-1, *self.event.shape)

    @torch.no_grad()
    def log_z(self, temperature: float = 1.0) -> float:
        """By enumeration."""
        parts = [(-self.energy(x) / temperature).logsumexp(0) for x in self._states_here()]
        return torch.stack(parts).logsumexp(0).item()

    @torch.no_grad()
    def expectation(self, fn: Callable[[Tensor], Tensor], temperature: float = 1.0) -> Tensor:
        """E[fn(x)] under exp(-E/T)/Z, by enumeration; fn maps (B, *event) to (B, ...)."""
        log_z = self.log_z(temperature)
        total: Tensor | None = None
        for x in self._states_here():
            weight = (-self.energy(x) / temperature - log_z).exp()
            value = fn(x).double()
            part = (weight @ value.reshape(len(weight), -1)).reshape(value.shape[1:])
            total = part if total is None else total + part
        assert total is not None
        return total

    @torch.no_grad()
    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Exact, by enumeration."""
        log_weight = torch.cat([-self.energy(x) / temperature for x in self._states_here()])
        cdf = log_weight.softmax(0).cumsum(0).to(generator.device)
        u = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
        which = torch.searchsorted(cdf, u).clamp_(max=len(cdf) - 1).cpu()
        num_sites, num_values = self._sites()
        assert self.event is not None
        value = which[:, None] // num_values ** torch.arange(num_sites) % num_values
        if self.event.kind == "categorical":
            value = torch.nn.functional.one_hot(value, num_values)
        return value.float().reshape(num, *self.event.shape).to(generator.device)

    def _states_here(self) -> Iterator[Tensor]:
        tensors = [*self.parameters(), *self.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        return (x.to(device) for x in self.states())

    def _sites(self) -> tuple[int, int]:
        assert self.event is not None
        shape = self.event.shape
        if self.event.kind == "categorical":
            return math.prod(shape[:-1]), shape[-1]
        return math.prod(shape), 2


def log_trace_power(log_matrix: Tensor, power: int) -> float:
    """log tr(M^power) of the symmetric M = exp(log_matrix), (S, S) float64.

    The partition function of a periodic chain of `power` layers with transfer matrix M.
    """
    shift = log_matrix.max()
    eigenvalue = torch.linalg.eigvalsh((log_matrix - shift).exp())
    # Perron-Frobenius: the largest eigenvalue is positive and bounds the others.
    top = eigenvalue.max()
    total = (eigenvalue / top).pow(power).sum()
    return (power * (shift + top.log()) + total.log()).item()
