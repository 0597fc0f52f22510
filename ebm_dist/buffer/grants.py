"""The shard's side of leases by rows: grants to write spare rows, and their safe revocation."""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebm_dist.buffer.rows import lock_path
from ebm_dist.buffer.storage import SlotStorage
from ebm_dist.core.types import RowGrant

_MOST_OPEN = 256
"""Lock files that a shard keeps open; the usual limit of a process is 1024 open files."""


@dataclass(slots=True)
class _Limbo:
    """Rows of a revoked grant that a worker may still be writing."""

    index: int
    rows: np.ndarray


class GrantBook:
    """The grants of one shard: which worker may write which spare rows.

    If no row or no grant is left, the lease carries its chains by value instead.
    """

    def __init__(self, slots: SlotStorage, directory: Path, num_grants: int) -> None:
        self._locks: dict[int, int] = {}
        self._slots = slots
        self._event_shape, self._dtype = slots.position.shape[1:], slots.position.dtype.str
        condition = slots.context.get("condition")
        self._condition_shape = None if condition is None else condition.shape[1:]
        self._directory = str(directory)
        self._files = (directory / "position.bin").stat().st_ino
        # The last entry counts the tokens issued, so that a successor repeats none. It starts at a
        # random number, so that new files do not repeat the tokens of old ones either.
        self._tokens = slots.tokens
        self._rows = slots.granted
        self._free = list(range(num_grants))
        self._limbo: list[_Limbo] = []
        for index in self._free:
            Path(lock_path(directory, index)).touch(mode=0o600)
        if slots.attached:
            self._fence_predecessor()
        else:
            self._tokens[-1] = secrets.randbits(62)

    def issue(self, source: np.ndarray) -> RowGrant | None:
        """A grant to write as many rows as `source` has; None if too few rows are spare."""
        if self._limbo:
            self._sweep()
        if not self._free or (target := self._slots.lend(len(source))) is None:
            return None
        index = self._free.pop()
        self._rows[index, : len(target)] = target
        self._rows[index, len(target) :] = -1
        token = int(self._tokens[-1]) + 1
        self._tokens[-1] = token
        self._tokens[index] = token
        return RowGrant(
            directory=self._directory,
            files=self._files,
            event_shape=self._event_shape,
            dtype=self._dtype,
            source=source,
            target=target,
            condition_shape=self._condition_shape,
            index=index,
            token=token,
        )

    def redeem(self, grant: RowGrant) -> bool:
        """Close the grant and leave its rows to the caller; False if a worker is still writing."""
        self._tokens[grant.index] = 0
        closed = self._nobody_writes(grant.index)
        if closed:
            self._free.append(grant.index)
        return closed

    def revoke(self, grant: RowGrant) -> None:
        """Close the grant; its rows become spare once no worker can be writing them."""
        if self.redeem(grant):
            self._slots.give_back(grant.target)
        else:
            self._limbo.append(_Limbo(grant.index, grant.target))

    def _sweep(self) -> None:
        still = []
        for item in self._limbo:
            if self._nobody_writes(item.index):
                self._free.append(item.index)
                self._slots.give_back(item.rows)
            else:
                still.append(item)
        self._limbo = still

    def _nobody_writes(self, index: int) -> bool:
        """Whether the lock of grant `index` was free, after its token was removed.

        The lock is released at once: a worker that takes it later finds no token.
        """
        try:
            lock = self._lock(index)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):  # no file: the run has ended or restarted
            return False
        fcntl.flock(lock, fcntl.LOCK_UN)
        return True

    def _lock(self, index: int) -> int:
        """The descriptor of the lock of grant `index`. It stays open, since opening and closing
        a file takes longer than locking it."""
        lock = self._locks.get(index)
        if lock is None:
            if len(self._locks) >= _MOST_OPEN:
                os.close(self._locks.popitem()[1])
            path = lock_path(self._directory, index)
            lock = self._locks[index] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return lock

    def __del__(self) -> None:
        for lock in self._locks.values():
            os.close(lock)

    def _fence_predecessor(self) -> None:
        """Revoke the grants of a dead predecessor, whose workers may still be writing."""
        for index in list(self._free):
            self._tokens[index] = 0
            if self._nobody_writes(index):
                continue
            self._free.remove(index)
            rows = self._rows[index]
            rows = self._slots.withhold(rows[rows >= 0])
            self._limbo.append(_Limbo(index, rows))
