"""Energies on finitely many states: sums and exact draws by enumeration."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ebm_dist.core.types import EventSpec
from ebm_dist.energies.family import AnalyticEnergy

MAX_STATES = 2**22


def sites_of(spec: EventSpec) -> tuple[int, int]:
    """The number of sites of a discrete event, and the number of values of each site."""
    if spec.kind == "categorical":
        return math.prod(spec.shape[:-1]), spec.shape[-1]
    return math.prod(spec.shape), 2


def num_states(spec: EventSpec) -> int:
    """The number of events of a discrete kind."""
    num_sites, num_values = sites_of(spec)
    return num_values**num_sites


def states(spec: EventSpec, chunk: int = 2**14) -> Iterator[Tensor]:
    """All events of a discrete kind, float32, in chunks (at most `chunk`, *event)."""
    total = num_states(spec)
    for start in range(0, total, chunk):
        yield _events(torch.arange(start, min(start + chunk, total)), spec)


def _events(index: Tensor, spec: EventSpec) -> Tensor:
    """The events (M, *event), float32, at the places `index` (M,) among all states."""
    num_sites, num_values = sites_of(spec)
    value = index[:, None] // num_values ** torch.arange(num_sites) % num_values
    if spec.kind == "categorical":
        value = torch.nn.functional.one_hot(value, num_values)
    return value.float().reshape(len(index), *spec.shape)


class FiniteEnergy(AnalyticEnergy):
    """An energy of binary events, or of one-hot events in the last axis.

    All methods enumerate all states: at most 2**22, which takes about four seconds.
    """

    def states(self) -> Iterator[Tensor]:
        """All events, float64, in chunks (M, *event).

        Raises:
            ValueError: there are more than 2**22.
        """
        assert self.event is not None
        if num_states(self.event) > MAX_STATES:
            num_sites, num_values = sites_of(self.event)
            raise ValueError(
                f"{type(self).__name__}: {num_values}^{num_sites} states are too many to "
                "enumerate; estimate log Z with ebm_dist.evaluation.log_partition (AIS)"
            )
        for x in states(self.event):
            yield x.double()

    @torch.no_grad()
    def log_z(self, temperature: float = 1.0) -> float:
        """By enumeration."""
        parts = [(-self.energy(x) / temperature).logsumexp(0) for x in self._states_here()]
        return torch.stack(parts).logsumexp(0).item()

    @torch.no_grad()
    def sample(self, num: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Exact, by enumeration."""
        log_weight = torch.cat([-self.energy(x) / temperature for x in self._states_here()])
        cdf = log_weight.softmax(0).cumsum(0).to(generator.device)
        u = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
        which = torch.searchsorted(cdf, u).clamp_(max=len(cdf) - 1).cpu()
        assert self.event is not None
        return _events(which, self.event).to(generator.device)

    def _states_here(self) -> Iterator[Tensor]:
        tensors = [*self.parameters(), *self.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        return (x.to(device) for x in self.states())


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
