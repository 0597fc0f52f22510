"""Rows of chains that a shard and the workers of its machine have in common, and the fence.

A lease by rows says which rows to read and which to write; the chains themselves move once each
way, between the mapped file and the worker's own tensor. What makes this safe is that a worker
may come late: its lease has expired, its rows are another chain's by now. So a grant to write has
a token in shared memory and a lock on a file of its own:

- a worker takes the lock, looks whether the token is still its own, writes, and lets go;
- a shard that wants the rows back takes the token away, and uses the rows again only once it has
  had the lock in its hand: whoever held it then has finished, and whoever comes later finds the
  token gone.

No clock is involved. The kernel lets go of a lock when its process dies, so that a killed writer
keeps nothing, and one that is stopped in the middle of writing keeps its rows out of use for as
long as it is stopped, be it hours. A shard that takes over from a dead one does the same with the
grants it finds.
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
"""What lies beside a position. Together, since rows are visited at random: half a cache line is
fetched once, where five arrays would each be waited for, and the waits are most of a lease."""


@dataclass(frozen=True, slots=True)
class MappedRows:
    """The files of a shard as a worker sees them."""

    directory: str
    files: int
    position: np.ndarray  # (num_rows, *event), as stored
    chain_id: np.ndarray  # (num_rows,), int64, of `ROW`
    tokens: np.ndarray  # (num_grants,), int64

    def read(self, grant: RowGrant, out: np.ndarray, chain_id: np.ndarray) -> bool:
        """Copy the chains of a lease into `out` (M, *event); False if the lease is void.

        Raises:
            AssertionError: the rows hold other chains than those of `chain_id`.
        """
        copy_rows(self.position, grant.source, out)
        found = self.chain_id[grant.source]
        # Looked at after the copy: rows are used again only when the token is gone.
        if self.tokens[grant.index] != grant.token:
            return False
        assert same(found, chain_id), f"chains {found} in the rows of {chain_id}"
        return True

    def write(self, grant: RowGrant, position: np.ndarray, chain_id: np.ndarray) -> bool:
        """Put the moved chains into the rows granted; False, and nothing done, if it is void."""
        with locked(self.directory, grant.index) as held:
            if not held or self.tokens[grant.index] != grant.token:
                return False
            self.position[grant.target] = position
            self.chain_id[grant.target] = chain_id
            return True


_open: dict[str, MappedRows] = {}
"""By directory. One each: files that a shard has replaced are let go of, or they would fill up
the memory that they no longer show in."""


def open_rows(grant: RowGrant, within: str | None = None) -> MappedRows | None:
    """The rows that `grant` speaks of; None if its shard's files are gone or others by now.

    Args:
        within: the directory that all shards of this node have theirs in. Files elsewhere are
            another node's, also where a test has both nodes on one machine.
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
        # Looked at after they are mapped: a shard that begins anew makes other files.
        if os.stat(path / "position.bin").st_ino != grant.files:
            return None
    except FileNotFoundError:
        return None
    position = position.reshape(-1, *grant.event_shape)
    found = MappedRows(grant.directory, grant.files, position, chain_id, tokens)
    _open[grant.directory] = found
    return found


def _mapped(path: Path, dtype: str | type | np.dtype) -> np.ndarray:
    with path.open("r+b") as file:
        # All pages at once, some tens of milliseconds a gigabyte: met one by one, each row's first
        # visit faults, which for a large shard is nearly every visit.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, flags=flags), dtype)


def copy_rows(source: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """out[i] = source[rows[i]]."""
    # Both ends of every row first: a row's pages are looked up and its first bytes fetched while
    # those of others are, where the copy alone waits for each in turn, a third of its time.
    ends = source.reshape(len(source), -1)
    _ = ends[:, 0][rows], ends[:, -1][rows]
    # With a check of the bounds numpy would copy twice.
    source.take(rows, axis=0, out=out, mode="clip")


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one type are equal, for a tenth of numpy's price on short ones."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def lock_path(directory: Path | str, index: int) -> str:
    return f"{directory}/grant_{index:04d}.lock"


@contextlib.contextmanager
def locked(directory: Path | str, index: int) -> Iterator[bool]:
    """Hold the lock of grant `index`; False where there is none."""
    try:
        descriptor = os.open(lock_path(directory, index), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # the run has ended, or begun anew
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(descriptor)  # which lets go of the lock
