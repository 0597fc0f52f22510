"""The order of an epoch, as functions of the seed: shards of each rank, and the shuffle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import numpy as np

from ebm_dist.core.seeds import derive_seed

T = TypeVar("T")

SplitMode = Literal["shard", "sample"]


def split_mode(rank_split: str, *, num_shards: int, world_size: int) -> SplitMode:
    """How ranks share an epoch: by shard if there are at least as many shards as ranks.

    A single rank splits by sample, so that its batches are those of several ranks together.
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

    Every rank computes the same permutation, so each shard belongs to exactly one rank.
    """
    order = np.arange(num_shards)
    if mix:
        order = np.random.default_rng(derive_seed(seed, "data", epoch, "shards")).permutation(order)
    if mode == "shard":
        order = order[rank::world_size]
    return [int(index) for index in order]


def shuffled(items: Iterable[T], size: int, seed: int) -> Iterator[T]:
    """Shuffle a stream with a buffer of `size` items: a new item replaces a random one.

    webdataset's own shuffle starts to yield at 100 items, and does not guarantee its stream of
    random numbers, which an exact resume needs.
    """
    if size <= 1:
        yield from items
        return
    rng = np.random.Generator(np.random.PCG64(seed))
    buffer: list[T] = []
    # Drawn in blocks, because one call of the generator per item would take longer than the rest.
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
