"""Storage of chains: rows of memory, mapped from files so that they outlive the process."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist.buffer.draw import FREE, LEASED, READY
from ebm_dist.buffer.rows import ROW, copy_rows
from ebm_dist.core.types import Arrays, ContextField

_SLOT = np.dtype([("row_of_slot", np.int64), ("generation", np.int64)])
"""The fields of a slot that a lease reads, in one struct for the same reason as `ROW`."""


class SlotStorage:
    """Chains by slot; a commit replaces the row of each slot.

    Each slot refers to a row, and some rows are spare. A commit writes the new chain into a spare
    row, then stores the row's number in `row_of_slot` by one aligned 8-byte write. So a process
    killed half-way leaves each slot with its old chain or its new one, never with a mixture.
    With a `directory` the arrays are memory-mapped: the next process finds them unchanged, and
    workers of the machine can read and write rows. Without one they are ordinary memory.
    """

    row_fields = ("position", "energy", "version", "age", "log_weight", "chain_id")

    def __init__(
        self,
        capacity: int,
        max_lease: int,
        event_shape: tuple[int, ...],
        directory: Path | None = None,
        *,
        dtype: np.dtype | type = np.float32,
        num_grants: int = 0,
        fields: tuple[ContextField, ...] = (),
    ) -> None:
        """
        Args:
            fields: the contexts of each chain.
            max_lease: the largest number of chains of a lease; as many rows are always spare.
            dtype: of stored positions.
            num_grants: the largest number of leases by rows at a time.
        """
        self.capacity = capacity
        self.max_lease = max_lease
        num_grants = num_grants if directory is not None else 0
        rows = _num_rows(capacity, max_lease, num_grants)
        self._directory = directory
        self._shape: dict[str, Any] = {
            "capacity": capacity,
            "max_lease": max_lease,
            "num_grants": num_grants,
            "event": list(event_shape),
            "dtype": np.dtype(dtype).str,
            "row": list(ROW.names or ()),
            "context": [[field.name, list(field.shape), field.dtype] for field in fields],
        }
        self.attached = directory is not None and self._matches(directory)
        epoch = _next_epoch(directory) if directory is not None else 0
        if directory is not None and not self.attached:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o700)
        self.position = self._array("position", (rows, *event_shape), dtype)
        of_row = self._array("rows", (rows,), ROW)
        self.energy, self.version, self.age = of_row["energy"], of_row["version"], of_row["age"]
        self.log_weight, self.chain_id = of_row["log_weight"], of_row["chain_id"]
        self.context: Arrays = {
            field.name: self._array(field.name, (rows, *field.shape), field.dtype)
            for field in fields
        }
        of_slot = self._array("slots", (capacity,), _SLOT)
        self.row_of_slot, self.generation = of_slot["row_of_slot"], of_slot["generation"]
        self.state = self._array("state", (capacity,), np.uint8)
        self.tokens = self._array("tokens", (num_grants + 1,), np.int64)
        self.granted = self._array("granted", (num_grants, max_lease), np.int64)
        self.epoch = self._array("epoch", (1,), np.int64)
        self.epoch[0] = epoch
        if not self.attached:
            self.row_of_slot[:] = np.arange(capacity)
        # A stack; its first `_num_spare` entries are valid.
        self._spare = np.empty(rows - capacity, np.int64)
        self._spare[:] = np.setdiff1d(np.arange(rows), self.row_of_slot)
        self._num_spare = len(self._spare)
        self.free_all()

    def begin_init(self) -> None:
        """Mark the arrays as incomplete: a successor initialises them again."""
        if self._directory is not None:
            (self._directory / "shape.json").unlink(missing_ok=True)

    def remove_files(self) -> None:
        """Remove the files; processes that have mapped them keep their contents."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def finish_init(self) -> None:
        """Mark the arrays as complete: a successor attaches to them."""
        self.count_ages()
        if self._directory is not None:
            marker = self._directory / "shape.json"
            temporary = marker.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._shape))
            temporary.replace(marker)

    # --- states; counts are kept up to date, as a pass over all slots costs more than a lease -----

    def free_all(self) -> None:
        self.state[:] = FREE
        self.num_in = {FREE: self.capacity, LEASED: 0, READY: 0}
        self.count_ages()

    def turn(self, slots: np.ndarray, before: int, after: int) -> None:
        """Move `slots`, all of state `before`, to state `after`."""
        self.state[slots] = after
        self.num_in[before] -= len(slots)
        self.num_in[after] += len(slots)

    def count_ages(self) -> None:
        self.total_age = int(self.age[self.row_of_slot].sum())

    # --- rows ------------------------------------------------------------------------------------

    def rows(self, slots: np.ndarray) -> np.ndarray:
        return self.row_of_slot[slots]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Copies of the chains in `rows`, in storage format."""
        out = np.empty((len(rows), *self.position.shape[1:]), self.position.dtype)
        copy_rows(self.position, rows, out)
        return out

    def contexts(self, rows: np.ndarray) -> Arrays:
        """Copies of the contexts of the chains in `rows`."""
        return {name: array[rows] for name, array in self.context.items()}

    def adopt(
        self, slots: np.ndarray, old: np.ndarray, rows: np.ndarray, aged: int, **fields: Any
    ) -> None:
        """Assign `rows`, which hold new positions, to `slots` (M,); the `old` rows become spare.

        Args:
            aged: the change of the sum of their ages.
            fields: the other fields of the chains, each (M,) or one number for all.
        """
        self.total_age += aged
        for name, field in fields.items():
            getattr(self, name)[rows] = field
        self.row_of_slot[slots] = rows
        self.give_back(old)

    def rows_for(self, num: int) -> np.ndarray:
        """`num` spare rows for a commit by value; `lend` always leaves max_lease of them."""
        assert num <= self._num_spare, f"a commit of {num} chains, {self._num_spare} rows to spare"
        return self._pop(num)

    def lend(self, num: int) -> np.ndarray | None:
        """`num` spare rows for a grant, max_lease at most; None if fewer than max_lease would
        remain for commits by value."""
        enough = num <= self.max_lease <= self._num_spare - num
        return self._pop(num) if enough else None

    def give_back(self, rows: np.ndarray) -> None:
        self._spare[self._num_spare : self._num_spare + len(rows)] = rows
        self._num_spare += len(rows)

    def withhold(self, rows: np.ndarray) -> np.ndarray:
        """Take those of `rows` that are spare out of the spare rows, and return them."""
        spare = self._spare[: self._num_spare]
        kept = spare[~np.isin(spare, rows)]
        taken = np.intersect1d(spare, rows)
        self._num_spare = len(kept)
        self._spare[: len(kept)] = kept
        return taken

    def _pop(self, num: int) -> np.ndarray:
        self._num_spare -= num
        return self._spare[self._num_spare : self._num_spare + num].copy()

    def _matches(self, directory: Path) -> bool:
        try:
            return json.loads((directory / "shape.json").read_text()) == self._shape
        except (OSError, ValueError):
            return False

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if self._directory is None or 0 in shape:
            return np.zeros(shape, dtype)
        path = self._directory / f"{name}.bin"
        if not self.attached:
            with path.open("xb") as file:
                _allocate(file.fileno(), math.prod(shape) * np.dtype(dtype).itemsize)
        # A plain array is faster: every operation on a memmap builds another memmap object.
        return np.asarray(np.memmap(path, dtype, mode="r+", shape=shape))


def bytes_to_map(
    capacity: int,
    max_lease: int,
    event_shape: tuple[int, ...],
    *,
    dtype: np.dtype | type = np.float32,
    num_grants: int = 0,
    fields: tuple[ContextField, ...] = (),
) -> int:
    """The bytes that a `SlotStorage` of this size maps, up to a few pages."""
    rows = _num_rows(capacity, max_lease, num_grants)
    of_a_row = math.prod(event_shape) * np.dtype(dtype).itemsize + ROW.itemsize
    of_a_row += sum(math.prod(f.shape) * np.dtype(f.dtype).itemsize for f in fields)
    return rows * of_a_row + capacity * (_SLOT.itemsize + 1) + num_grants * 8 * (max_lease + 1)


def _num_rows(capacity: int, max_lease: int, num_grants: int) -> int:
    return capacity + max_lease * (1 + num_grants)


def _allocate(descriptor: int, num_bytes: int) -> None:
    """Reserve the pages of an empty file; raises OSError if memory is short.

    A sparse file would allocate them on first write, and the kernel kills the writer (SIGBUS) if
    memory has run out by then.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.truncate(descriptor, num_bytes)


def _next_epoch(directory: Path) -> int:
    """One more than the epoch of the previous owner of `directory`, complete or not."""
    try:
        return int(np.fromfile(directory / "epoch.bin", np.int64, 1)[0]) + 1
    except (OSError, IndexError):
        return 0
