"""The results of a shard's remote methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ebm_dist.core.types import Cursor

# The result of every round is a named tuple, which takes 12 microseconds to pickle and unpickle; a
# frozen dataclass with as many fields takes 24.


class ShardCounts(NamedTuple):
    """Numbers of slots in each state, and counts of events so far."""

    free: int
    leased: int
    ready: int
    capacity: int
    age_mean: float
    """Mean age of the chains, in rounds."""
    late_checkins: int
    expired_leases: int
    reinitialised: int
    resampled: int


class CheckinReply(NamedTuple):
    """Whether the chains of a lease were committed, and a summary of the round."""

    accepted: bool
    lease_id: int | None
    """None if the worker received no lease."""
    counts: ShardCounts
    """The shard's counts after the checkin."""
    version: int = -1
    """Version of the weights that moved the chains."""
    num_steps: int = 0
    num_chains: int = 0
    stats: Mapping[str, float] = {}
    """Sampler and chain diagnostics, by metric name."""
    notes: tuple[str, ...] = ()
    """Messages of the worker and the shard, for the run's log."""
    by_rows: bool = False
    """Whether the chains stayed in the memory of the shard's node."""
    compiling: bool = False
    """Whether the worker compiles its steps beside its rounds."""


@dataclass(frozen=True, slots=True)
class ShardStatus:
    attached: bool
    """Whether the chains are those of an earlier process."""
    epoch: int
    counts: ShardCounts


@dataclass(frozen=True, slots=True)
class ChainHealth:
    """Diagnostics of the traced chains of a shard."""

    values: dict[str, float]
    """By metric name."""
    alarm: str | None
    """One line if chains are stuck, else None."""
    num_reseeded: int


@dataclass(frozen=True, slots=True)
class Distribution:
    """Energies at the last move, and ages in rounds, of the chains that have moved."""

    energy: np.ndarray  # (M,), float32
    age: np.ndarray  # (M,), int64


@dataclass(frozen=True, slots=True)
class WeightedChains:
    """Every chain of a shard with its Jarzynski log-weight, by slot."""

    x: np.ndarray  # (N, *event), float32
    energy: np.ndarray  # (N,), float32, as recorded when the chain moved
    log_weight: np.ndarray  # (N,), float32


@dataclass(frozen=True, slots=True)
class Origin:
    """The state, apart from the arrays, of a shard that takes over chains."""

    data: Cursor | None = None
    """Cursor of the data stream from which chains start."""
    next_chain: int | None = None
    """First identity of the chains in the remaining slots; by default, the next free one."""
    epoch: int = 0
    """Epoch of the predecessor, whose leases are void."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """Counters of the predecessor, which the successor continues."""
    restart: np.ndarray | None = None  # (capacity,), bool: slots whose next lease starts afresh
