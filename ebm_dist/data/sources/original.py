"""A data set before it is written as shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.manifest import SplitName


@dataclass(frozen=True, slots=True)
class Samples:
    """One split, drawn one at a time so that a folder of photographs need not fit in memory."""

    num: int
    get: Callable[[int], tuple[np.ndarray, int | None]]


@dataclass(frozen=True, slots=True)
class Original:
    """Its splits, and what is known of their samples."""

    name: str
    law: str
    layout: Layout
    classes: tuple[str, ...]
    splits: dict[SplitName, Samples]
    shard_size: int = 2500
    """Samples a shard: Fashion-MNIST makes 24 shards, so that up to 24 ranks read their own."""
    notes: tuple[str, ...] = ()
    """What was left out of it, one line each."""


def of_arrays(x: np.ndarray, label: np.ndarray | None) -> Samples:
    if label is None:
        return Samples(len(x), lambda i: (x[i], None))
    return Samples(len(x), lambda i: (x[i], int(label[i])))
