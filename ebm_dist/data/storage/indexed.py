"""Samples of a dataset that is read by index; an epoch is a permutation of all samples."""

from __future__ import annotations

import hashlib

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.seeds import derive_seed
from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.decode import Layout, layout_of
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.storage.items import Items, spread
from ebm_dist.data.storage.protocol import Rows
from ebm_dist.data.storage.shards import held_out
from ebm_dist.data.stream.bad_samples import BadSamples
from ebm_dist.data.stream.order import SplitMode

NUM_HASHED = 16
"""Number of samples in the fingerprint of a dataset."""


class Indexed:
    """Items by split; `test` is None if there is no test split. See `protocol.Storage`."""

    def __init__(self, config: DataConfig, train: Items, test: Items | None) -> None:
        for items in (train, *([] if test is None else [test])):
            if len(items) == 0:
                raise UserError(f"{items.where}: holds no samples")
        x, label = train.example()
        if label is None and config.num_classes is not None:
            raise UserError(
                f"{train.where}: sample 0 has no label, but data.num_classes is "
                f"{config.num_classes}; return (event, label), or leave data.num_classes out"
            )
        self.layout: Layout = layout_of(
            x,
            f"{train.where}: sample 0",
            kind=config.kind,
            labelled=label is not None,
            num_classes=None if label is None else config.num_classes or train.num_classes(),
        )
        names = train.classes()
        self.classes = names if len(names) == self.layout.spec.num_classes else ()
        self._config = config
        everything = np.arange(len(train))
        if config.holdout > 0:
            keys = [held_out(f"{row:08d}", config.holdout) for row in range(len(train))]
            self._splits = {
                "train": (train, everything[~np.array(keys)]),
                "test": (train, everything[np.array(keys)]),
            }
        else:
            self._splits = {"train": (train, everything)}
            if test is not None:
                self._splits["test"] = (test, np.arange(len(test)))

    def has(self, split: SplitName) -> bool:
        return split in self._splits

    def num_samples(self, split: SplitName) -> int:
        return len(self._splits[split][1])

    def take(self, split: SplitName, rows: np.ndarray) -> Rows:
        """The samples at the indices `rows` (num,) of a split."""
        items, own = self._splits[split]
        if len(rows):
            return items.take(own[rows], self.layout)
        x = np.empty((0, *self.layout.spec.shape), self.layout.dtype)
        return x, np.empty(0, np.int64) if self.layout.labelled else None

    def read(self, split: SplitName, limit: int | None) -> Rows:
        # Not in index order, since datasets are often sorted by class. `prepare` does the same.
        path = ("data", "prepare", self._config.location, split)
        order = np.random.default_rng(derive_seed(0, *path)).permutation(self.num_samples(split))
        return self.take(split, order[:limit])

    def epochs(self, config: DataConfig, *, rank: int, world_size: int, seed: int) -> IndexedEpochs:
        return IndexedEpochs(
            self, rank=rank, world_size=world_size, seed=seed, mix=config.shuffle > 0
        )

    def identity(self) -> list[str]:
        return [self.fingerprint()]

    def fingerprint(self) -> str:
        """The number of training samples and a hash of some of them; no hash if a second read gives
        other samples."""
        num = self.num_samples("train")
        if not num:
            return "0 samples"
        rows = spread(np.arange(num), NUM_HASHED)
        first, again = (_hash(self.take("train", rows)) for _ in range(2))
        return f"{num} samples, {first if first == again else 'not repeatable'}"

    def refuse_missing(self) -> None:
        """Does nothing: a missing sample is found only by reading it."""

    def survey(self) -> list[str]:
        """Read evenly spaced samples of both splits; all samples of arrays."""
        for items, rows in self._splits.values():
            for some in items.surveyed(rows):
                items.take(some, self.layout)
        found = self.fingerprint()
        if self._config.fingerprint not in (None, found):
            raise UserError(
                f"data.fingerprint: {self._config.location} held {self._config.fingerprint} and "
                f"now holds {found}; bring the data back, or leave data.fingerprint out"
            )
        if "not repeatable" not in found:
            return []
        return [
            f"{self._config.location}: a sample differs when it is read again, so that no run with "
            "it can be repeated or resumed exactly; augment by data.flip, data.crop_padding or "
            "data.noise_std instead, whose noise is seeded"
        ]


class IndexedEpochs:
    """See `protocol.Epochs`. Ranks always split an epoch by sample."""

    mode: SplitMode = "sample"

    def __init__(
        self, storage: Indexed, *, rank: int, world_size: int, seed: int, mix: bool
    ) -> None:
        self.offset = rank
        self.num_seen = storage.num_samples("train")
        self.bad = BadSamples("stop")
        self._storage = storage
        self._world_size = world_size
        self._seed = seed
        self._mix = mix
        self._order = np.arange(self.num_seen)

    def open(self, epoch: int, offset: int) -> None:
        self.offset = offset
        if self._mix:
            rng = np.random.default_rng(derive_seed(self._seed, "data", epoch, "shuffle"))
            self._order = rng.permutation(self.num_seen)

    def take(self, num: int) -> Rows:
        stride = self._world_size
        rows = self._order[self.offset : self.offset + num * stride : stride]
        self.offset += len(rows) * stride
        return self._storage.take("train", rows)

    def close(self) -> None:
        """Does nothing: no file is open."""


def _hash(rows: Rows) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in rows:
        if part is not None:
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
