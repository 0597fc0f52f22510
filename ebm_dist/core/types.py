"""The nouns that cross a boundary: events, batches, leases, chains on their way, negatives."""

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
"""Of one event: 64 chains then take 4 GiB."""

EventKind = Literal["image", "real", "binary", "categorical"]


@dataclass(frozen=True, slots=True)
class EventSpec:
    """What one configuration x looks like.

    image: float32 in [-1, 1], shape (C, H, W); real: unbounded float32; binary: {0, 1}
    floats; categorical: one-hot float32 in the last axis.
    """

    shape: tuple[int, ...]
    kind: EventKind
    num_classes: int | None = None
    """Number of labels, None for unlabelled data."""

    @property
    def discrete(self) -> bool:
        return self.kind in ("binary", "categorical")

    def noise(self, num: int, generator: torch.Generator, *, std: float = 1.0) -> Tensor:
        """`num` events (num, *shape) from the reference law that chains start from.

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


@dataclass(frozen=True, slots=True)
class Negatives:
    """Committed chains handed to the learner."""

    x: Tensor  # (M, *event), float32, carries no gradient
    energy: Tensor  # (M,), under the weights that moved the chain
    version: Tensor  # (M,), int64, the step of those weights
    log_weight: Tensor  # (M,), Jarzynski log-weight; zeros when not in use


# What goes with every lease is not frozen: a frozen one sets each field by a call, 5 of the 80
# microseconds that 64 chains take there and back.


@dataclass(slots=True)
class RowGrant:
    """Rows of a shard's mapped files that a worker may read, and others that it may write.

    `buffer.rows` opens them, and refuses the writing once the shard has taken the grant back.
    """

    directory: str
    files: int
    """Inode of position.bin: a shard that began anew has other files of the same names."""
    event_shape: tuple[int, ...]
    dtype: str
    source: np.ndarray  # (M,), int64, rows of the chains to move
    target: np.ndarray  # (M,), int64, rows for the moved chains
    index: int
    token: int
    """Of this grant and no other, in shared memory for as long as it holds."""


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
    """Who the chains are, over the whole run; comes back as it went out."""
    seed: int
    """Seeds the noise of the round: the chains do not depend on who moves them."""
    deadline: float
    """Wall-clock seconds on the shard's own clock."""
    position: np.ndarray | None
    """(M, *event), as `buffer.storage` keeps them; None where they are to be read by `grant`."""
    log_weight: np.ndarray  # (M,), float32
    version: np.ndarray  # (M,), int64
    """Version of the weights that moved each chain last; -1 for a new chain."""
    energy: np.ndarray | None = None
    """(M,), float32, under those weights; what Jarzynski weights are carried on from."""
    grant: RowGrant | None = None


@dataclass(slots=True)
class MovedChains:
    """What a worker returns for a lease; the shard commits it or refuses it."""

    lease_id: int
    shard: int
    shard_epoch: int
    slots: np.ndarray  # (M,), int64
    generations: np.ndarray  # (M,), int64
    chain_id: np.ndarray  # (M,), int64, of the lease
    position: np.ndarray | None
    """(M, *event), as `buffer.storage` keeps them; None where they are in the rows granted."""
    energy: np.ndarray  # (M,), float32
    log_weight: np.ndarray  # (M,), float32
    version: int
    num_steps: int
    negatives: dict[str, np.ndarray] | None = None
    """What the learner gets in place of the chains, keys as in `Negatives`: the chains as they
    were before they moved, with the Jarzynski weights that make them samples of `version`."""
    ancestors: np.ndarray | None = None
    """(M,), int64: the chain of the lease that each one continues, where it was resampled."""
    stats: dict[str, float] = field(default_factory=dict)
    """Sampler and chain diagnostics of the round, named as in `metrics/names.py`."""
    token: int | None = None
    """Of the grant, where the chains are in its rows."""
    notes: tuple[str, ...] = ()
    """What the worker has to say since its last round, for the log of the run."""

    @classmethod
    def of(cls, lease: Lease, **moved: Any) -> MovedChains:
        """The answer to `lease`: its own fields as they went out, the others as given."""
        return cls(
            lease_id=lease.lease_id,
            shard=lease.shard,
            shard_epoch=lease.shard_epoch,
            slots=lease.slots,
            generations=lease.generations,
            chain_id=lease.chain_id,
            **moved,
        )
