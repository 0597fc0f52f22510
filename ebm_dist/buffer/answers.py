"""What a shard answers to those who call it from afar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ebm_dist.core.types import Cursor

# The answer of every round is a named tuple: a frozen dataclass of so many fields takes 24
# microseconds to pickle and to read, and this takes 12.


class ShardCounts(NamedTuple):
    """How the slots of a shard stand, and what has happened to them so far."""

    free: int
    leased: int
    ready: int
    capacity: int
    age_mean: float
    """Of the chains, in rounds."""
    late_checkins: int
    expired_leases: int
    reinitialised: int
    resampled: int


class CheckinReply(NamedTuple):
    """Whether the chains of a lease were committed, and what the round was."""

    accepted: bool
    lease_id: int | None
    """None where the worker was given no lease."""
    counts: ShardCounts
    """Of the shard after it."""
    version: int = -1
    """Of the weights that moved the chains."""
    num_steps: int = 0
    num_chains: int = 0
    stats: Mapping[str, float] = {}
    """Sampler and chain diagnostics, by metric name."""
    notes: tuple[str, ...] = ()
    """What worker and shard have to say, for the log of the run."""
    by_rows: bool = False
    """Whether the chains never left the memory of the shard's node."""


@dataclass(frozen=True, slots=True)
class ShardStatus:
    attached: bool
    """Whether the chains are those that a process before this one left."""
    epoch: int
    counts: ShardCounts


@dataclass(frozen=True, slots=True)
class ChainHealth:
    """What the followed chains of a shard show."""

    values: dict[str, float]
    """By metric name."""
    alarm: str | None
    """In one line, where they stand still."""
    num_reseeded: int


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of the chains that have moved: their energy at the last move, and their age in rounds."""

    energy: np.ndarray  # (M,), float32
    age: np.ndarray  # (M,), int64


@dataclass(frozen=True, slots=True)
class WeightedChains:
    """Every chain of a shard with what its Jarzynski weight is carried on from, by slot."""

    x: np.ndarray  # (N, *event), float32
    energy: np.ndarray  # (N,), float32, as recorded when the chain moved
    log_weight: np.ndarray  # (N,), float32


@dataclass(frozen=True, slots=True)
class Origin:
    """What a shard that takes over chains is told beside the arrays."""

    data: Cursor | None = None
    """Of the stream that chains start from."""
    next_chain: int | None = None
    """First identity of the chains beyond those taken over; the one after theirs when left out."""
    epoch: int = 0
    """The predecessor's: its leases are void."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """Those of the predecessor, which the successor counts on from."""
    restart: np.ndarray | None = None  # (capacity,), bool: slots whose next lease starts afresh
