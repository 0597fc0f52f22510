"""The epochs of shards: read sequentially, shuffled in a buffer, kept in memory if they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.seeds import derive_seed
from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.shards import ShardFile, check_shard, read_shard
from ebm_dist.data.stream.bad_samples import BadSamples
from ebm_dist.data.stream.kept import Kept, Sample
from ebm_dist.data.stream.order import SplitMode, shard_order, shuffled, split_mode

_OVERHEAD = 400
"""Bytes of the Python objects of one kept sample (sys.getsizeof of dict, array, slots)."""


class ShardEpochs:
    """See `storage.protocol.Epochs`."""

    def __init__(
        self,
        config: DataConfig,
        layout: Layout,
        shards: tuple[ShardFile, ...],
        belongs: Callable[[dict[str, Any]], bool],
        *,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.mode: SplitMode = split_mode(
            config.rank_split, num_shards=len(shards), world_size=world_size
        )
        if self.mode == "shard" and len(shards) < world_size:
            raise UserError(
                f"data.rank_split: shard needs a shard for each of {world_size} ranks, but "
                f"{config.location} has {len(shards)}; use auto or sample"
            )
        self.offset = self.num_seen = 0
        self.bad = BadSamples(config.on_bad_sample)
        self._config = config
        self._layout = layout
        self._shards = shards
        self._belongs = belongs
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._stride = world_size if self.mode == "sample" else 1
        self._kept = Kept(layout)
        self._checked: set[int] = set()
        limit = {"auto": config.cache_mib * 2**20, "always": float("inf"), "never": 0}
        self._room: float = limit[config.cache]
        self._sample_bytes = int(np.prod(layout.spec.shape)) * layout.dtype.itemsize + _OVERHEAD
        self._samples: Iterator[Sample] = iter(())
        self._rows: np.ndarray | None = None
        """The rows of this epoch if all of it is in memory; `_samples` is then empty."""

    def open(self, epoch: int, offset: int) -> None:
        """Go to `offset`. Samples before it that are not in memory are read, not decoded."""
        self.close()
        self.offset = offset
        shards = shard_order(
            len(self._shards),
            mode=self.mode,
            rank=self._rank,
            world_size=self._world_size,
            seed=self._seed,
            epoch=epoch,
            mix=self._config.shuffle > 0,
        )
        path = (self._rank,) if self.mode == "shard" else ()
        seed = derive_seed(self._seed, "data", epoch, "shuffle", *path)
        mixed = partial(shuffled, size=self._config.shuffle, seed=seed)
        rows = self._kept.rows(shards)
        if rows is not None:
            self._rows, self.num_seen = np.fromiter(mixed(rows), np.int64, len(rows)), len(rows)
            return
        # Imported here, because it takes a second.
        from webdataset.pipeline import DataPipeline

        self._samples = DataPipeline([shards], self._expand, mixed).iterator1()
        self._rows, self.num_seen = None, 0

    def take(self, num: int) -> tuple[np.ndarray, np.ndarray | None]:
        if self._rows is not None:
            chosen = np.empty(0, np.int64)
            while len(chosen) < num:
                end = self.offset + (num - len(chosen)) * self._stride
                rows = self._rows[self.offset : end : self._stride]
                if not len(rows):
                    break
                self.offset += len(rows) * self._stride
                good = self._kept.decoded(rows, self.bad)
                chosen = np.concatenate([chosen, good]) if len(chosen) else good
            return self._kept.take(chosen)
        layout = self._layout
        xs, labels = [], []
        while len(xs) < num and (sample := self._next()) is not None:
            try:
                x, label = sample.decoded(layout)
            except UserError as error:
                self.bad.add(error)
                continue
            xs.append(x)
            labels.append(label)
        x = np.stack(xs) if xs else np.empty((0, *layout.spec.shape), layout.dtype)
        return x, np.array(labels, np.int64) if layout.labelled else None

    def close(self) -> None:
        """Close open files."""
        close = getattr(self._samples, "close", None)
        if close is not None:
            close()
        self._samples = iter(())

    def _next(self) -> Sample | None:
        """The next sample of this rank, None at the end of the epoch."""
        for sample in self._samples:
            index, self.num_seen = self.num_seen, self.num_seen + 1
            if index == self.offset:
                self.offset += self._stride
                return sample
        return None

    def _expand(self, shards: Iterable[int]) -> Iterator[Sample]:
        """The samples of `shards`, from memory if they were kept."""
        for number in shards:
            if number in self._kept:
                yield from self._kept.samples(number)
                continue
            shard = self._shards[number]
            if number not in self._checked:
                check_shard(shard, checksum=self._config.verify)
                self._checked.add(number)
            keeping: list[Sample] | None = []
            taken = 0
            whole = False
            try:
                for raw in read_shard(shard):
                    if not self._belongs(raw):
                        continue
                    sample = Sample(raw)
                    if keeping is not None:
                        size = max(self._sample_bytes, _encoded_bytes(raw) + _OVERHEAD)
                        if size <= self._room:
                            self._room -= size
                            taken += size
                            keeping.append(sample)
                        else:
                            self._room, taken, keeping = self._room + taken, 0, None
                    yield sample
                whole = True
            finally:
                # Reached also if the pipeline is closed early: an incomplete shard is not kept.
                if whole and keeping is not None:
                    self._kept.keep(number, tuple(keeping))
                else:
                    self._room += taken


def _encoded_bytes(raw: dict[str, Any]) -> int:
    return sum(len(value) for key, value in raw.items() if not key.startswith("__"))
