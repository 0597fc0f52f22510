"""Samples of webdataset shards."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.decode import Layout, decode_sample
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.format.shards import ShardFile, check_shard, read_shard
from ebm_dist.data.storage.plain_survey import survey
from ebm_dist.data.storage.protocol import Rows
from ebm_dist.data.stream.bad_samples import BadSamples, Policy
from ebm_dist.data.stream.shard_epochs import ShardEpochs

MAX_CHECKSUM_BYTES = 256 * 2**20
"""The checksums of shards up to this total size are compared before a run, in about a second; those
of larger ones when a reader opens them."""


@dataclass(frozen=True, slots=True)
class Shards:
    """Shards by split; `test` is None if there is no test split. See `protocol.Storage`."""

    layout: Layout
    train: tuple[ShardFile, ...]
    test: tuple[ShardFile, ...] | None
    holdout: float = 0.0
    """Fraction of the training samples in the test split; `test` then equals `train`."""
    verify: bool = True
    """Whether to compare checksums."""
    bad: Policy = "stop"
    """See `data.on_bad_sample`."""

    def has(self, split: SplitName) -> bool:
        return split == "train" or self.test is not None

    def num_samples(self, split: SplitName) -> int | None:
        if self.holdout > 0:
            return None
        counts = [shard.num_samples for shard in self._of(split)]
        return None if None in counts else sum(count or 0 for count in counts)

    def belongs(self, sample: dict[str, Any], split: SplitName) -> bool:
        """Whether a sample is in `split`; with a holdout, a hash of its key decides."""
        if self.holdout == 0:
            return True
        return held_out(sample["__key__"], self.holdout) == (split == "test")

    def read(self, split: SplitName, limit: int | None) -> Rows:
        # Prepared shards were shuffled when they were written, so the first are representative.
        xs: list[np.ndarray] = []
        labels: list[int | None] = []
        for x, label in self._decoded(split):
            xs.append(x)
            labels.append(label)
            if limit is not None and len(xs) == limit:
                break
        x = np.stack(xs) if xs else np.empty((0, *self.layout.spec.shape), self.layout.dtype)
        return x, np.array(labels, np.int64) if self.layout.labelled else None

    def epochs(self, config: DataConfig, *, rank: int, world_size: int, seed: int) -> ShardEpochs:
        return ShardEpochs(
            config,
            self.layout,
            self.train,
            lambda sample: self.belongs(sample, "train"),
            rank=rank,
            world_size=world_size,
            seed=seed,
        )

    def identity(self) -> list[str]:
        """Hashes of the contents, since paths may change."""
        return [shard.sha256 or _glance(shard.path) for shard in self.train]

    def refuse_missing(self) -> None:
        for shard in self.train:
            check_shard(shard, checksum=False)

    def survey(self) -> list[str]:
        """Check that every shard exists with its size, and the checksums or samples of a small data
        set."""
        shards = self.all()
        for shard in shards:
            check_shard(shard, checksum=False)
        if self.verify and sum(s.path.stat().st_size for s in shards) <= MAX_CHECKSUM_BYTES:
            for shard in shards:
                check_shard(shard, checksum=True)
        return survey(shards, self.layout, BadSamples(self.bad))

    def _of(self, split: SplitName) -> tuple[ShardFile, ...]:
        return self.train if split == "train" else self.test or ()

    def all(self) -> list[ShardFile]:
        """The shards of both splits, each once."""
        return list(dict.fromkeys((*self.train, *(self.test or ()))))

    def _decoded(self, split: SplitName) -> Iterator[tuple[np.ndarray, int | None]]:
        bad = BadSamples(self.bad)
        for shard in self._of(split):
            check_shard(shard, checksum=self.verify)
            for raw in read_shard(shard):
                if not self.belongs(raw, split):
                    continue
                try:
                    decoded = decode_sample(raw, self.layout)
                except UserError as error:
                    bad.add(error)
                else:
                    yield decoded


def held_out(key: str, part: float) -> bool:
    """Whether the sample with this key is in the test split, a fraction `part` of all samples."""
    return zlib.crc32(key.encode()) < part * 2**32


def _glance(path: Path) -> str:
    """A hash of a plain shard's name, size and last bytes.

    Hashing the whole file would take as long as an epoch. The size alone does not suffice, because
    tar pads files to equal sizes.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, size - 2**14))
        end = stream.read()
    text = f"{path.name}/{size}/".encode() + end
    return hashlib.blake2b(text, digest_size=8).hexdigest()
