"""The order of an epoch: which shards, in which order, mixed how. Functions of seeds alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import numpy as np

from ebm_dist.core.seeds import derive_seed

T = TypeVar("T")

SplitMode = Literal["shard", "sample"]


def split_mode(rank_split: str, *, num_shards: int, world_size: int) -> SplitMode:
    """How ranks share an epoch: by shard where there are as many shards as ranks.

    One rank alone counts as split by sample: its batches are then those that several ranks would
    have between them.
    """
    if world_size == 1 or rank_split == "sample":
        return "sample"
    if rank_split == "shard":
        return "shard"
    return "shard" if num_shards >= world_size else "sample"


def shard_order(
    num_shards: int,
    *,
    mode: SplitMode,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    mix: bool,
) -> list[int]:
    """The shards that `rank` reads in `epoch`, in order.

    The permutation is the same on every rank, so the ranks' shards are disjoint and together all.
    """
    order = np.arange(num_shards)
    if mix:
        order = np.random.default_rng(derive_seed(seed, "data", epoch, "shards")).permutation(order)
    if mode == "shard":
        order = order[rank::world_size]
    return [int(index) for index in order]


def shuffled(items: Iterable[T], size: int, seed: int) -> Iterator[T]:
    """Mix a stream through a buffer of `size` items: each newcomer pushes a random one out.

    webdataset's own shuffle starts to yield at 100 items and takes its random numbers from a
    module whose stream is not promised; an exact resume needs one that is ours.
    """
    if size <= 1:
        yield from items
        return
    rng = np.random.Generator(np.random.PCG64(seed))
    buffer: list[T] = []
    # Blocks: one call of the generator for each item would cost more than the mixing.
    picks: list[int] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        if not picks:
            picks = rng.integers(size, size=1024).tolist()
        index = picks.pop()
        yield buffer[index]
        buffer[index] = item
    for index in rng.permutation(len(buffer)).tolist():
        yield buffer[index]
