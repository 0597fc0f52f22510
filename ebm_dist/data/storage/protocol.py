"""The interface of a storage of samples, for the reader and `load_split`."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.stream.bad_samples import BadSamples
from ebm_dist.data.stream.order import SplitMode

Rows = tuple[np.ndarray, np.ndarray | None]
"""x (num, *stored shape) in the layout's dtype, and labels (num,) int64; None without labels."""


class Epochs(Protocol):
    """The samples of one rank, epoch by epoch, in an order that the seed determines."""

    mode: SplitMode
    """How the ranks share an epoch."""
    offset: int
    """Place of the next sample in the epoch, counted as in `Cursor.offset`."""
    num_seen: int
    """Number of samples in the epoch; valid after `take` has returned fewer than requested."""

    bad: BadSamples
    """Receives the errors of unusable samples."""

    def open(self, epoch: int, offset: int) -> None:
        """Go to `offset` of `epoch`."""
        ...

    def take(self, num: int) -> Rows:
        """The next `num` samples; fewer at the end of the epoch.

        Raises:
            UserError: names a sample that cannot be used.
        """
        ...

    def close(self) -> None: ...


class Storage(Protocol):
    """The samples of a source, by split."""

    @property
    def layout(self) -> Layout:
        """Shape, kind and dtype of the samples."""
        ...

    def has(self, split: SplitName) -> bool:
        """Whether the source has this split."""
        ...

    def num_samples(self, split: SplitName) -> int | None:
        """Number of samples; None if it is unknown without reading all of them."""
        ...

    def read(self, split: SplitName, limit: int | None) -> Rows:
        """The first `limit` samples, or all, in an order in which the first ones are representative
        of the split."""
        ...

    def epochs(self, config: DataConfig, *, rank: int, world_size: int, seed: int) -> Epochs:
        """The epochs of the training split for one rank."""
        ...

    def identity(self) -> list[str]:
        """Hashes that identify the training samples and their order, independent of their path."""
        ...

    def refuse_missing(self) -> None:
        """Raise UserError if a file is missing or truncated. Reads no samples."""
        ...

    def survey(self) -> list[str]:
        """Read samples for a second or two; returns a line for each kind of content that a run
        would not read.

        Raises:
            UserError: for a fault that would end an epoch.
        """
        ...
