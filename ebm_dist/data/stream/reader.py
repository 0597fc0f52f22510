"""One rank's endless sequence of batches, as a function of a cursor of three integers.

Samples a second of CPU time of one core (x86 server, Python 3.11, batches of 128, prefetch 0, the
commit that adds this line): 28x28 PNGs 10,700 when first read and 2,960,000 out of memory, 204,000
with dequantisation and noise; 8x8 PNGs 15,100, 4,930,000 and 939,000. Going to the middle of an
epoch of 60,000 that is not in memory takes seconds, since what lies before it is read again, though
not decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ebm_dist.core.errors import UserError
from ebm_dist.core.generators import seeded
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import Dataset
from ebm_dist.data.format.shards import check_shard, read_shard
from ebm_dist.data.stream.kept import Kept, Sample
from ebm_dist.data.stream.order import SplitMode, shard_order, shuffled, split_mode
from ebm_dist.data.stream.transform import Part, Transform

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
        self._no_noise = torch.Generator()
        self._stride = world_size if self.mode == "sample" else 1
        self._kept = Kept(dataset.layout)
        self._checked: set[int] = set()
        limit = {"auto": config.cache_mib * 2**20, "always": float("inf"), "never": 0}
        self._room: float = limit[config.cache]
        layout = dataset.layout
        self._sample_bytes = int(np.prod(layout.spec.shape)) * layout.dtype.itemsize + _OVERHEAD
        self._cursor = Cursor(0, 0, 0)
        self._samples: Iterator[Sample] = iter(())
        self._rows: np.ndarray | None = None
        """The order of this epoch where all of it is in memory; `_samples` is empty then."""
        self._seen = 0
        self.seek(self.start)

    @property
    def start(self) -> Cursor:
        return Cursor(0, self._first_offset, 0)

    @property
    def _first_offset(self) -> int:
        return self._rank if self.mode == "sample" else 0

    def seek(self, cursor: Cursor) -> None:
        """Go to `cursor`. Samples before it that are not in memory are read, but not decoded."""
        self._cursor = cursor
        self._open(cursor.epoch)

    def read(self, num: int) -> tuple[Batch, Cursor]:
        """The next `num` samples, and the cursor after them."""
        stored, labels = self._stored(num)
        # Split by sample, every rank draws the noise of the global batch and keeps its own rows.
        if self.mode == "sample":
            path, part = (), Part(self._rank, self._world_size)
        else:
            path, part = (self._rank,), Part()
        cursor = self._cursor
        generator = self._no_noise
        if self._transform.draws:
            seed = derive_seed(self._seed, "data", "augment", *path, cursor.num_batches)
            generator = seeded(seed)
        x = self._transform(torch.from_numpy(stored), generator, part=part)
        label = torch.from_numpy(labels) if labels is not None else None
        self._cursor = Cursor(cursor.epoch, cursor.offset, cursor.num_batches + 1)
        return Batch(x, label), self._cursor

    def close(self) -> None:
        """Close open files."""
        close = getattr(self._samples, "close", None)
        if close is not None:
            close()
        self._samples = iter(())

    def _stored(self, num: int) -> tuple[np.ndarray, np.ndarray | None]:
        """x (num, *stored shape) and labels (num,) int64, over the ends of epochs if need be."""
        parts: list[tuple[np.ndarray, np.ndarray | None]] = []
        while num > 0:
            part = self._of_epoch(num)
            if len(part[0]):
                parts.append(part)
                num -= len(part[0])
            if num > 0:
                self._turn()
        if len(parts) == 1:
            return parts[0]
        xs, labels = zip(*parts)
        return np.concatenate(xs), np.concatenate(labels) if self._dataset.layout.labelled else None

    def _of_epoch(self, num: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The next `num` samples, or fewer where the epoch ends."""
        if self._rows is not None:
            offset, stride = self._cursor.offset, self._stride
            rows = self._rows[offset : offset + num * stride : stride]
            self._pass(len(rows))
            return self._kept.take(rows)
        layout = self._dataset.layout
        xs, labels = [], []
        while len(xs) < num and (sample := self._next()) is not None:
            x, label = sample.decoded(layout)
            xs.append(x)
            labels.append(label)
        x = np.stack(xs) if xs else np.empty((0, *layout.spec.shape), layout.dtype)
        return x, np.array(labels, np.int64) if layout.labelled else None

    def _next(self) -> Sample | None:
        """The next sample of this rank, None at the end of the epoch."""
        for sample in self._samples:
            index, self._seen = self._seen, self._seen + 1
            if index == self._cursor.offset:
                self._pass(1)
                return sample
        return None

    def _pass(self, num: int) -> None:
        cursor = self._cursor
        self._cursor = Cursor(cursor.epoch, cursor.offset + num * self._stride, cursor.num_batches)

    def _turn(self) -> None:
        """On to the next epoch."""
        self._refuse_short_epoch(self._seen)
        cursor = self._cursor
        # Split by sample, the count goes on over the end of an epoch, so that the ranks'
        # batches stay parts of one global batch also where world_size does not divide it.
        rest = max(0, cursor.offset - self._seen) if self.mode == "sample" else 0
        self._cursor = Cursor(cursor.epoch + 1, rest, cursor.num_batches)
        self._open(self._cursor.epoch)

    def _refuse_short_epoch(self, count: int) -> None:
        known = self._dataset.num_samples("train") is not None
        if count == 0 or (not known and self.mode == "sample" and count < self._config.batch_size):
            raise UserError(
                f"data.batch_size: is {self._config.batch_size}, but {self._config.location} holds "
                f"{count} training samples; lower data.batch_size or add data"
            )

    def _open(self, epoch: int) -> None:
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
        mixed = partial(shuffled, size=self._config.shuffle, seed=seed)
        rows = self._kept.rows(shards)
        if rows is not None:
            self._rows, self._seen = np.fromiter(mixed(rows), np.int64, len(rows)), len(rows)
            return
        # Here, not above: importing it costs a second.
        from webdataset.pipeline import DataPipeline

        self._samples = DataPipeline([shards], self._expand, mixed).iterator1()
        self._rows, self._seen = None, 0

    def _expand(self, shards: Iterable[int]) -> Iterator[Sample]:
        """Shard numbers -> their samples, out of memory where they were kept."""
        for number in shards:
            if number in self._kept:
                yield from self._kept.samples(number)
                continue
            shard = self._dataset.train[number]
            if number not in self._checked:
                check_shard(shard, checksum=self._config.verify)
                self._checked.add(number)
            keeping: list[Sample] | None = []
            taken = 0
            whole = False
            try:
                for raw in read_shard(shard):
                    if not self._dataset.belongs(raw, "train"):
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
                # Also when the pipeline is closed half-way: a part of a shard is not kept.
                if whole and keeping is not None:
                    self._kept.keep(number, tuple(keeping))
                else:
                    self._room += taken


def _encoded_bytes(raw: dict[str, Any]) -> int:
    return sum(len(value) for key, value in raw.items() if not key.startswith("__"))
