"""One rank's endless sequence of batches, as a function of a cursor of three integers.

Samples a second of CPU time of one core (x86 server, Python 3.11, batches of 128, prefetch 0, the
commit that adds this line): 28x28 PNGs 6,200 when first read and 217,000 out of memory, 85,000 with
dequantisation and noise; 8x8 PNGs 9,700, 457,000 and 309,000. Going to the middle of an epoch of
60,000 takes 2.6 s, since what lies before it is read again, though not decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import Dataset
from ebm_dist.data.decode import decode_sample
from ebm_dist.data.order import SplitMode, shard_order, shuffled, split_mode
from ebm_dist.data.shards import check_shard, read_shard
from ebm_dist.data.transform import Part, Transform
from ebm_dist.errors import UserError
from ebm_dist.generators import seeded
from ebm_dist.seeds import derive_seed
from ebm_dist.types import Batch

_OVERHEAD = 400
"""Bytes of Python objects about one kept sample (sys.getsizeof of dict, array, slots)."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a rank stands.

    `offset` counts samples of the epoch: of the rank's own shards when ranks split by shard, of
    all ranks' common order when they split by sample. `num_batches` seeds the augmentation.
    """

    epoch: int
    offset: int
    num_batches: int


class _Sample:
    """A sample in the shuffle buffer: encoded until it is used first, decoded from then on."""

    __slots__ = ("label", "raw", "x")

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw: dict[str, Any] | None = raw
        self.x: np.ndarray | None = None
        self.label: int | None = None


class Reader:
    """Reads shards through a webdataset pipeline; see `data.DataStream` for the promise."""

    def __init__(
        self, config: DataConfig, dataset: Dataset, *, rank: int, world_size: int, seed: int
    ) -> None:
        self.mode: SplitMode = split_mode(
            config.rank_split, num_shards=len(dataset.train), world_size=world_size
        )
        if self.mode == "shard" and len(dataset.train) < world_size:
            raise UserError(
                f"data.rank_split: shard needs a shard for each of {world_size} ranks, but "
                f"{config.location} has {len(dataset.train)}; use auto or sample"
            )
        self._config = config
        self._dataset = dataset
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._transform = Transform(config, dataset.layout)
        self._stride = world_size if self.mode == "sample" else 1
        self._kept: dict[int, tuple[_Sample, ...]] = {}
        self._checked: set[int] = set()
        limit = {"auto": config.cache_mib * 2**20, "always": float("inf"), "never": 0}
        self._room: float = limit[config.cache]
        layout = dataset.layout
        self._sample_bytes = int(np.prod(layout.spec.shape)) * layout.dtype.itemsize + _OVERHEAD
        self._cursor = Cursor(0, 0, 0)
        self._samples: Iterator[_Sample] = iter(())
        self._seen = 0
        self.seek(self.start)

    @property
    def start(self) -> Cursor:
        return Cursor(0, self._first_offset, 0)

    @property
    def _first_offset(self) -> int:
        return self._rank if self.mode == "sample" else 0

    def seek(self, cursor: Cursor) -> None:
        """Go to `cursor`. Samples before it are read again but not decoded."""
        self._cursor = cursor
        self._open(cursor.epoch)

    def read(self, num: int) -> tuple[Batch, Cursor]:
        """The next `num` samples, and the cursor after them."""
        layout = self._dataset.layout
        xs, labels = [], []
        for _ in range(num):
            sample = self._next()
            if sample.raw is not None:
                sample.x, sample.label = decode_sample(sample.raw, layout)
                sample.raw = None
            xs.append(sample.x)
            labels.append(sample.label)
        # Split by sample, every rank draws the noise of the global batch and keeps its own rows.
        if self.mode == "sample":
            path, part = (), Part(self._rank, self._world_size)
        else:
            path, part = (self._rank,), Part()
        cursor = self._cursor
        generator = seeded(derive_seed(self._seed, "data", "augment", *path, cursor.num_batches))
        x = self._transform(torch.from_numpy(np.stack(xs)), generator, part=part)
        label = torch.tensor(labels, dtype=torch.int64) if layout.labelled else None
        self._cursor = Cursor(cursor.epoch, cursor.offset, cursor.num_batches + 1)
        return Batch(x, label), self._cursor

    def close(self) -> None:
        """Close open files."""
        close = getattr(self._samples, "close", None)
        if close is not None:
            close()
        self._samples = iter(())

    def _next(self) -> _Sample:
        cursor = self._cursor
        fruitless = 0
        while True:
            for sample in self._samples:
                index, self._seen = self._seen, self._seen + 1
                if index == cursor.offset:
                    self._cursor = Cursor(
                        cursor.epoch, cursor.offset + self._stride, cursor.num_batches
                    )
                    return sample
            self._refuse_short_epoch(self._seen)
            # Split by sample, the count goes on over the end of an epoch, so that the ranks'
            # batches stay parts of one global batch also where world_size does not divide it.
            rest = max(0, cursor.offset - self._seen) if self.mode == "sample" else 0
            cursor = Cursor(cursor.epoch + 1, rest, cursor.num_batches)
            self._cursor = cursor
            self._open(cursor.epoch)
            fruitless += 1
            assert fruitless <= self._world_size + 1, "an epoch without samples"

    def _refuse_short_epoch(self, count: int) -> None:
        known = self._dataset.num_samples("train") is not None
        if count == 0 or (not known and self.mode == "sample" and count < self._config.batch_size):
            raise UserError(
                f"data.batch_size: is {self._config.batch_size}, but {self._config.location} holds "
                f"{count} training samples; lower data.batch_size or add data"
            )

    def _open(self, epoch: int) -> None:
        from webdataset.pipeline import DataPipeline

        self.close()
        mix = self._config.shuffle > 0
        shards = shard_order(
            len(self._dataset.train),
            mode=self.mode,
            rank=self._rank,
            world_size=self._world_size,
            seed=self._seed,
            epoch=epoch,
            mix=mix,
        )
        path = (self._rank,) if self.mode == "shard" else ()
        seed = derive_seed(self._seed, "data", epoch, "shuffle", *path)
        pipeline = DataPipeline(
            [shards], self._expand, partial(shuffled, size=self._config.shuffle, seed=seed)
        )
        self._samples = pipeline.iterator1()
        self._seen = 0

    def _expand(self, shards: Iterable[int]) -> Iterator[_Sample]:
        """Shard numbers -> their samples, out of memory where they were kept."""
        for number in shards:
            kept = self._kept.get(number)
            if kept is not None:
                yield from kept
                continue
            shard = self._dataset.train[number]
            if number not in self._checked:
                check_shard(shard, checksum=self._config.verify)
                self._checked.add(number)
            keeping: list[_Sample] | None = []
            taken = 0
            whole = False
            try:
                for raw in read_shard(shard):
                    if not self._dataset.belongs(raw, "train"):
                        continue
                    sample = _Sample(raw)
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
                # Also when the pipeline is closed half-way: a part of a shard is not kept.
                if whole and keeping is not None:
                    self._kept[number] = tuple(keeping)
                else:
                    self._room += taken


def _encoded_bytes(raw: dict[str, Any]) -> int:
    return sum(len(value) for key, value in raw.items() if not key.startswith("__"))
