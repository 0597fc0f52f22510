"""Types that cross process boundaries: events, batches, leases, moved chains and negatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

EnergyFn = Callable[[Tensor], Tensor]
"""Maps x (B, *event) to energies (B,) in float32; lower is likelier."""

MAX_EVENT_NUMBERS = 2**24
"""Largest size of one event, in numbers: 64 chains of it take 4 GiB."""

EventKind = Literal["image", "real", "binary", "categorical"]


@dataclass(frozen=True, slots=True)
class EventSpec:
    """Shape and kind of one event x.

    image: float32 in [-1, 1], shape (C, H, W); real: unbounded float32; binary: {0, 1}
    floats; categorical: one-hot float32 in the last axis.
    """

    shape: tuple[int, ...]
    kind: EventKind
    num_classes: int | None = None
    """Number of labels, None for unlabelled data."""
    condition_shape: tuple[int, ...] | None = None
    """Shape of the condition of each event, None for data without conditions."""

    @property
    def discrete(self) -> bool:
        return self.kind in ("binary", "categorical")

    def noise(self, num: int, generator: torch.Generator, *, std: float = 1.0) -> Tensor:
        """`num` events (num, *shape) from the reference distribution from which chains start.

        image: uniform on [-1, 1]; real: N(0, std^2); binary: fair coins; categorical:
        uniform over the classes.
        """
        size = (num, *self.shape)
        if self.kind == "image":
            return torch.empty(size).uniform_(-1.0, 1.0, generator=generator)
        if self.kind == "real":
            return torch.empty(size).normal_(0.0, std, generator=generator)
        if self.kind == "binary":
            return torch.randint(0, 2, size, generator=generator).float()
        index = torch.randint(0, self.shape[-1], size[:-1], generator=generator)
        return torch.nn.functional.one_hot(index, self.shape[-1]).float()


@dataclass(frozen=True, slots=True)
class Batch:
    """Data for one update of one learner rank."""

    x: Tensor  # (B, *event), float32
    label: Tensor | None = None  # (B,), int64
    condition: Tensor | None = None  # (B, *condition), float32


CONTEXTS = ("label", "level", "clock", "condition", "pair")
"""The contexts of a chain, one entry per chain: `label`, a class; `level`, a noise or temperature
level; `clock`, the number of steps since its start; `condition`, an array that is fixed while the
position is sampled; `pair`, the datum with which an objective contrasts it."""


@dataclass(frozen=True, slots=True)
class LevelNoise:
    """x -> scale x + std xi, xi ~ N(0, I), with one scale and one std for each level."""

    scale: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ContextField:
    """One context of the chains of a run."""

    name: str
    """One of `CONTEXTS`."""
    shape: tuple[int, ...] = ()
    """Shape of one chain's entry."""
    dtype: str = "int64"
    """`label`, `level` and `clock` are int64, `condition` and `pair` float32."""
    size: int | None = None
    """Number of classes or levels: entries are 0 .. size - 1."""
    noise: LevelNoise | None = None
    """Makes the `pair` of a datum, or the `condition` of the pair; of the `level`, the chain that
    begins at a datum (`buffer.init: data`)."""


@dataclass(frozen=True, slots=True)
class Negatives:
    """Committed chains handed to the learner."""

    x: Tensor  # (M, *event), float32, carries no gradient
    energy: Tensor  # (M,), under the weights that moved the chain
    version: Tensor  # (M,), int64, the step of those weights
    log_weight: Tensor  # (M,), Jarzynski log-weight; zeros when not in use
    context: dict[str, Tensor] = field(default_factory=dict)  # (M, ...) each, by `CONTEXTS`


@dataclass(frozen=True, slots=True)
class NegativeArrays:
    """`Negatives` in transit, as arrays, which cross Ray's object store without a copy."""

    x: np.ndarray  # (M, *event), float32
    energy: np.ndarray  # (M,), float32
    version: np.ndarray  # (M,), int64
    log_weight: np.ndarray  # (M,), float32
    context: dict[str, np.ndarray] = field(default_factory=dict)  # (M, ...) each, by `CONTEXTS`


@dataclass(frozen=True, slots=True)
class ChainSample:
    """Copies of chains, for a picture or a measurement."""

    x: np.ndarray  # (M, *event), float32
    context: dict[str, np.ndarray] = field(default_factory=dict)  # (M, ...) each, by `CONTEXTS`


# The classes below are not frozen: `__init__` of a frozen dataclass makes a call per field, which
# takes 5 of the 80 microseconds of a checkout and checkin of 64 chains.


@dataclass(slots=True)
class RowGrant:
    """Rows of a shard's mapped files that a worker may read, and rows that it may write.

    `buffer.rows` opens them, and refuses to write once the shard has revoked the grant.
    """

    directory: str
    files: int
    """Inode of position.bin: a restarted shard has new files under the same names."""
    event_shape: tuple[int, ...]
    dtype: str
    source: np.ndarray  # (M,), int64, rows of the chains to move
    target: np.ndarray  # (M,), int64, rows for the moved chains
    condition_shape: tuple[int, ...] | None
    """Shape of the conditions in the same rows; None if chains have no conditions."""
    index: int
    token: int
    """Unique to this grant; shared memory holds it as long as the grant is valid."""


@dataclass(slots=True)
class Lease:
    """The right to move some chains of one shard, until `deadline`.

    Arrays are numpy so that a lease crosses Ray's object store without a copy.
    """

    lease_id: int
    shard: int
    shard_epoch: int
    slots: np.ndarray  # (M,), int64
    generations: np.ndarray  # (M,), int64
    chain_id: np.ndarray  # (M,), int64
    """Identities of the chains within the run; the worker returns them unchanged."""
    seed: int
    """Seeds the noise of the round, so the result does not depend on the worker."""
    deadline: float
    """Wall-clock seconds on the shard's own clock."""
    position: np.ndarray | None
    """(M, *event), in the format of `buffer.storage`; None if `grant` names rows to read."""
    log_weight: np.ndarray  # (M,), float32
    version: np.ndarray  # (M,), int64
    """Version of the weights that last moved each chain; -1 for a new chain."""
    energy: np.ndarray | None = None
    """(M,), float32, under those weights; the Jarzynski weight update needs it."""
    grant: RowGrant | None = None
    context: dict[str, np.ndarray] = field(default_factory=dict)
    """(M, ...) each, by `CONTEXTS` without `pair`; with a grant, conditions are in its rows."""


@dataclass(slots=True)
class MovedChains:
    """The worker's result for a lease; the shard commits or refuses it."""

    lease_id: int
    shard: int
    shard_epoch: int
    slots: np.ndarray  # (M,), int64
    generations: np.ndarray  # (M,), int64
    chain_id: np.ndarray  # (M,), int64, of the lease
    position: np.ndarray | None
    """(M, *event), in the format of `buffer.storage`; None if they are in the granted rows."""
    energy: np.ndarray  # (M,), float32
    log_weight: np.ndarray  # (M,), float32
    version: int
    num_steps: int
    negatives: NegativeArrays | None = None
    """Replaces the moved chains as negatives. Jarzynski rounds use it: the chains before their
    move, with weights that make them samples under `version`."""
    ancestors: np.ndarray | None = None
    """(M,), int64, after resampling: the index in the lease of the chain that each continues."""
    stats: dict[str, float] = field(default_factory=dict)
    """Sampler and chain diagnostics of the round, named as in `metrics/names.py`."""
    token: int | None = None
    """The token of the grant, if the chains are in its rows."""
    level: np.ndarray | None = None
    """(M,), int64, if the round has moved the chains between levels."""
    notes: tuple[str, ...] = ()
    """Messages of the worker since its last round, for the run's log."""
    compiling: bool = False
    """Whether the worker compiles its steps beside its rounds."""

    @classmethod
    def of(cls, lease: Lease, **moved: Any) -> MovedChains:
        """The result for `lease`: copies the lease's own fields and adds `moved`."""
        return cls(
            lease_id=lease.lease_id,
            shard=lease.shard,
            shard_epoch=lease.shard_epoch,
            slots=lease.slots,
            generations=lease.generations,
            chain_id=lease.chain_id,
            **moved,
        )


Arrays = dict[str, np.ndarray]
"""Arrays by name, as one file of a checkpoint holds them."""

Cursor = dict[str, int | str]
"""Position in a data stream, for JSON."""


@dataclass(frozen=True, slots=True)
class ShardMeta:
    """The fields of a shard in a checkpoint, apart from its arrays."""

    index: int
    capacity: int
    data: Cursor | None
    """Cursor of the data stream from which chains start."""
    since: int | None = None
    """The full cut to which incremental arrays refer; None if the arrays are full."""


@dataclass(frozen=True, slots=True)
class ShardState:
    """The chains of a shard, by slot, at their last committed generation."""

    meta: ShardMeta
    arrays: Arrays


@dataclass(frozen=True, slots=True)
class RankState:
    """A learner rank's part of a checkpoint, as arrays, since Ray would pickle tensors."""

    learner: Arrays | None
    """The full weights and optimiser state; None except on rank 0."""
    ema: Arrays | None
    """The averaged weights; None except on rank 0."""
    data: Cursor | None
