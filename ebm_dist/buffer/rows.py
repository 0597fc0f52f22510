"""Rows of chains in memory shared by a shard and the workers of its machine, with fencing.

A lease by rows names the rows to read and the rows to write; the chains are copied once each way,
between the mapped file and the worker's tensor. A worker may come late: its lease has expired, and
its rows hold another chain by now. So each grant to write has a token in shared memory and a lock
file:

- a worker takes the lock, checks that the token is still its own, writes, and releases the lock;
- a shard that revokes a grant removes the token, then reuses the rows only after it has acquired
  the lock once. By then any earlier holder has finished, and later holders find no token.

The protocol needs no clock. The kernel releases a lock when its process dies, so a killed writer
blocks nothing. A writer that is suspended while it writes keeps its rows out of use until it
resumes, be it hours later. A shard that takes over from a dead one treats the grants it finds the
same way.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebm_dist.core.types import RowGrant

ROW = np.dtype(
    [
        ("chain_id", np.int64),
        ("version", np.int64),
        ("age", np.int64),
        ("energy", np.float32),
        ("log_weight", np.float32),
    ]
)
"""The fields of a chain besides its position. One struct holds them because rows are visited at
random: it costs one cache miss per chain where five arrays cost five, and cache misses are most of
the time of a lease."""


@dataclass(frozen=True, slots=True)
class MappedRows:
    """The mapped files of a shard, in a worker."""

    directory: str
    files: int
    position: np.ndarray  # (num_rows, *event), in storage format
    chain_id: np.ndarray  # (num_rows,), int64, a view of `ROW`
    condition: np.ndarray | None  # (num_rows, *condition), float32
    tokens: np.ndarray  # (num_grants,), int64

    def read(
        self,
        grant: RowGrant,
        out: np.ndarray,
        chain_id: np.ndarray,
        condition: np.ndarray | None = None,
    ) -> bool:
        """Copy the chains of a lease into `out` (M, *event), and what is given with them into
        `condition` (M, *condition); False if the lease is void.

        Raises:
            AssertionError: the rows hold other chains than those of `chain_id`.
        """
        copy_rows(self.position, grant.source, out)
        if condition is not None:
            assert self.condition is not None
            copy_rows(self.condition, grant.source, condition)
        found = self.chain_id[grant.source]
        # Checked after the copy: the shard reuses rows only after it has removed the token.
        if self.tokens[grant.index] != grant.token:
            return False
        assert same(found, chain_id), f"chains {found} in the rows of {chain_id}"
        return True

    def write(self, grant: RowGrant, position: np.ndarray, chain_id: np.ndarray) -> bool:
        """Write the moved chains into the granted rows; False, with no effect, if it is void."""
        with locked(self.directory, grant.index) as held:
            if not held or self.tokens[grant.index] != grant.token:
                return False
            self.position[grant.target] = position
            self.chain_id[grant.target] = chain_id
            return True


_open: dict[str, MappedRows] = {}
"""Open files by directory, one entry each. The files that a shard has replaced are dropped: as long
as they are mapped, their memory stays in use although no directory lists them."""


def open_rows(grant: RowGrant, within: str | None = None) -> MappedRows | None:
    """The rows of `grant`; None if the files of its shard have been removed or replaced.

    Args:
        within: the parent of all shard directories of this node. Files elsewhere belong to another
            node, even if a test runs both nodes on one machine.
    """
    if within is not None and not grant.directory.startswith(f"{within}/"):
        return None
    known = _open.get(grant.directory)
    if known is not None and known.files == grant.files:
        return known
    _open.pop(grant.directory, None)
    path = Path(grant.directory)
    try:
        position = _mapped(path / "position.bin", grant.dtype)
        chain_id = _mapped(path / "rows.bin", ROW)["chain_id"]
        tokens = _mapped(path / "tokens.bin", np.int64)
        condition = None
        if (shape := grant.condition_shape) is not None:
            condition = _mapped(path / "condition.bin", np.float32).reshape(-1, *shape)
        # Checked after mapping: a shard that restarts creates new files.
        if os.stat(path / "position.bin").st_ino != grant.files:
            return None
    except FileNotFoundError:
        return None
    position = position.reshape(-1, *grant.event_shape)
    found = MappedRows(grant.directory, grant.files, position, chain_id, condition, tokens)
    _open[grant.directory] = found
    return found


def _mapped(path: Path, dtype: str | type | np.dtype) -> np.ndarray:
    with path.open("r+b") as file:
        # Maps all pages at once, some tens of milliseconds a gigabyte. Otherwise the first visit
        # of each row is a page fault, and in a large shard nearly every visit is a first one.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, flags=flags), dtype)


def copy_rows(source: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """out[i] = source[rows[i]]."""
    # Prefetch: reading both ends of every row overlaps their TLB and cache misses. The copy alone
    # meets them one after another, a third of its time.
    ends = source.reshape(len(source), -1)
    _ = ends[:, 0][rows], ends[:, -1][rows]
    # "clip" because with bounds checks numpy copies twice.
    source.take(rows, axis=0, out=out, mode="clip")


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype are equal; ten times as fast as numpy on short ones."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def lock_path(directory: Path | str, index: int) -> str:
    return f"{directory}/grant_{index:04d}.lock"


@contextlib.contextmanager
def locked(directory: Path | str, index: int) -> Iterator[bool]:
    """Hold the lock of grant `index`; False where there is none."""
    try:
        descriptor = os.open(lock_path(directory, index), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # the run has ended or restarted
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(descriptor)  # also releases the lock
