"""The learner's endless data stream: split by rank, shuffled and augmented, with a cursor."""

from __future__ import annotations

import hashlib
import json
import logging
import weakref
from collections.abc import Mapping
from typing import Any

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import Batch, EventSpec
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import open_dataset
from ebm_dist.data.storage.protocol import Storage
from ebm_dist.data.stream.prefetch import Ahead
from ebm_dist.data.stream.reader import Cursor, Reader
from ebm_dist.data.stream.transform import event_spec

_log = logging.getLogger(__name__)

_STATE_VERSION = 1

MAX_CHANGES = 1
"""Changes of the number of samples after which a stream no longer reads ahead. The first follows
the chains that fill a buffer."""


class DataStream:
    """Batches of one learner rank, determined by (config, seed, rank, world_size, cursor).

    An epoch visits every training sample once over all ranks. Ranks split it by shard, or by
    sample if there are fewer shards than ranks (`data.rank_split`). Prefetching and caching do not
    change the batches.

    Raises:
        UserError: the source, the shards or the settings cannot be used. `next_batch` raises it for
            faults that are found only by reading the shards.
    """

    def __init__(
        self, config: DataConfig, *, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self._config = config
        storage = open_dataset(config)
        self.spec: EventSpec = event_spec(config, storage.layout)
        storage.refuse_missing()
        refuse_few(config, storage)
        self._rank = rank
        self._world_size = world_size
        self._reader = Reader(config, storage, rank=rank, world_size=world_size, seed=seed)
        self._order = _fingerprint(config, storage, seed)
        self._cursor = self._reader.start
        self._ahead: Ahead | None = None
        self._num_changes = 0

    def next_batch(self, num: int) -> Batch:
        """The next `num` samples of this rank: x (num, *spec.shape) float32, label (num,) int64.

        `num` is the rank's own share of the global batch.
        """
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        if self._ahead is not None and self._ahead.num != num:
            self._num_changes += 1
            self._rewind()
        # Chains that restart at random ask for another number each time, and what was read ahead
        # for the last number would be read again from the beginning of its shard.
        if self._config.prefetch == 0 or self._num_changes > MAX_CHANGES:
            batch, self._cursor = self._reader.read(num)
            return batch
        if self._ahead is None:
            self._ahead = Ahead(self._reader, num, self._config.prefetch)
            # Stops the thread before the interpreter unloads its modules. It must not refer to the
            # stream itself, which would then never be collected.
            weakref.finalize(self, Ahead.stop, self._ahead)
        batch, self._cursor = self._ahead.take()
        return batch

    @property
    def num_skipped(self) -> int:
        """Bad samples that this rank has left out so far (`data.on_bad_sample`)."""
        return self._reader.num_skipped

    def state(self) -> dict[str, Any]:
        """The cursor after the last returned batch, for JSON. Each rank has its own."""
        return {
            "version": _STATE_VERSION,
            "order": self._order,
            "mode": self._reader.mode,
            "rank": self._rank,
            "world_size": self._world_size,
            "epoch": self._cursor.epoch,
            "offset": self._cursor.offset,
            "num_batches": self._cursor.num_batches,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`.

        Exact with the rank, world size, seed and data of `state`. If ranks split by sample, each
        accepts the cursor of any rank, and another world size continues at the same place. If they
        split by shard, another rank or world size continues in the same epoch at about the same
        place. With other data or another seed, the epoch starts again.
        """
        epoch, offset, num_batches = _checked(state)
        mode, rank, world_size = state["mode"], state["rank"], state["world_size"]
        # Samples of the epoch that all ranks have read together.
        taken = offset - rank if mode == "sample" else offset * world_size
        own = (mode, rank, world_size) == (self._reader.mode, self._rank, self._world_size)
        if state["order"] != self._order:
            _log.warning(
                "data: the cursor is of other data, seed or shuffle; epoch %d restarts", epoch
            )
            taken, own = 0, False
        if self._reader.mode == "sample":
            offset = taken + self._rank
        elif not own:
            offset = taken // self._world_size
        self._cursor = Cursor(epoch, offset, num_batches)
        self._rewind()

    def close(self) -> None:
        """Stop the thread and close files; `next_batch` starts them again."""
        self._rewind()

    def _rewind(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None
        self._reader.seek(self._cursor)


def _checked(state: Mapping[str, Any]) -> tuple[int, int, int]:
    keys = ("epoch", "offset", "num_batches", "rank", "world_size")
    numbers = [state.get(key) for key in keys]
    if (
        state.get("version") != _STATE_VERSION
        or state.get("mode") not in ("shard", "sample")
        or "order" not in state
        or not all(type(number) is int and number >= 0 for number in numbers)
    ):
        raise ValueError(
            f"data cursor: expected what DataStream.state() returns, version {_STATE_VERSION}, "
            f"got {dict(state)!r:.200}"
        )
    return state["epoch"], state["offset"], state["num_batches"]


def refuse_few(config: DataConfig, storage: Storage) -> None:
    """Raise UserError if the training split is known to be smaller than a batch."""
    count = storage.num_samples("train")
    if count is not None and count < config.batch_size:
        raise UserError(
            f"data.batch_size: is {config.batch_size}, but {config.location} holds {count} "
            f"training samples; lower data.batch_size to at most {count}"
        )


def _fingerprint(config: DataConfig, storage: Storage, seed: int) -> str:
    """Identifies the order of the samples by contents, not by paths, for a cursor."""
    text = json.dumps([seed, config.shuffle, config.holdout, storage.identity()])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
