"""What the reader and `load_split` need of a place where samples lie."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.stream.bad_samples import BadSamples
from ebm_dist.data.stream.order import SplitMode

Rows = tuple[np.ndarray, np.ndarray | None]
"""x (num, *stored shape) in the layout's dtype, and labels (num,) int64 where there are any."""


class Epochs(Protocol):
    """The samples of one rank, an epoch at a time, in an order that follows from the seed."""

    mode: SplitMode
    """How the ranks share an epoch."""
    offset: int
    """Of the next sample in the epoch; counts as `Cursor.offset` does."""
    num_seen: int
    """Samples of the epoch, known once `take` has returned fewer than it was asked for."""

    bad: BadSamples
    """Told of the samples that will not do."""

    def open(self, epoch: int, offset: int) -> None: ...

    def take(self, num: int) -> Rows:
        """The next `num` samples, or fewer where the epoch ends.

        Raises:
            UserError: naming the sample that will not do.
        """
        ...

    def close(self) -> None: ...


class Storage(Protocol):
    """The samples of a source, by split."""

    @property
    def layout(self) -> Layout: ...

    def has(self, split: SplitName) -> bool: ...

    def num_samples(self, split: SplitName) -> int | None:
        """None where only reading all of it would tell."""
        ...

    def read(self, split: SplitName, limit: int | None) -> Rows:
        """The first `limit` samples in an order of which the first are a fair part, or all."""
        ...

    def epochs(self, config: DataConfig, *, rank: int, world_size: int, seed: int) -> Epochs: ...

    def identity(self) -> list[str]:
        """Names the training samples and their order, wherever they lie."""
        ...

    def refuse_missing(self) -> None:
        """UserError for what is not there, as far as that is seen without reading samples."""
        ...

    def survey(self) -> list[str]:
        """Reads what takes a second or two; lines on what is there and would not be read.

        Raises:
            UserError: for what an epoch would refuse.
        """
        ...

    def problems(self) -> list[str]:
        """Faults, a line each."""
        ...
