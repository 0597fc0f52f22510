"""Where chains lie: rows of memory that outlive the process that wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

FREE, LEASED, READY = np.uint8(0), np.uint8(1), np.uint8(2)


class SlotStorage:
    """Chains by slot, committed one slot at a time by exchanging rows.

    A slot names a row; there are `num_spare` rows more than slots. A commit writes the new
    chain into a spare row and then stores the row's number in `row_of_slot`, which is one
    aligned 8-byte write: a process killed half-way leaves each slot with its old chain or
    its new one, never with a mixture. Under a `directory` the arrays are memory-mapped, so
    the next process finds them as they were; without one they are ordinary memory.
    """

    row_fields = ("position", "energy", "version", "age", "log_weight", "chain_id")

    def __init__(
        self,
        capacity: int,
        num_spare: int,
        event_shape: tuple[int, ...],
        directory: Path | None = None,
    ) -> None:
        self.capacity = capacity
        self.num_spare = num_spare
        rows = capacity + num_spare
        self._directory = directory
        self._shape = {"capacity": capacity, "num_spare": num_spare, "event": list(event_shape)}
        self.attached = directory is not None and self._matches(directory)
        epoch = _next_epoch(directory) if directory is not None else 0
        if directory is not None and not self.attached:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        self.position = self._array("position", (rows, *event_shape), np.float32)
        self.energy = self._array("energy", (rows,), np.float32)
        self.version = self._array("version", (rows,), np.int64)
        self.age = self._array("age", (rows,), np.int64)
        self.log_weight = self._array("log_weight", (rows,), np.float32)
        self.chain_id = self._array("chain_id", (rows,), np.int64)
        self.row_of_slot = self._array("row_of_slot", (capacity,), np.int64)
        self.generation = self._array("generation", (capacity,), np.int64)
        self.state = self._array("state", (capacity,), np.uint8)
        self.epoch = self._array("epoch", (1,), np.int64)
        self.epoch[0] = epoch
        if not self.attached:
            self.row_of_slot[:] = np.arange(capacity)
        self._spare = np.setdiff1d(np.arange(rows), self.row_of_slot)

    def begin_init(self) -> None:
        """Mark the arrays as being written: a successor starts them anew."""
        if self._directory is not None:
            (self._directory / "shape.json").unlink(missing_ok=True)

    def finish_init(self) -> None:
        """Mark the arrays as whole: a successor takes them over."""
        if self._directory is not None:
            marker = self._directory / "shape.json"
            temporary = marker.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._shape))
            temporary.replace(marker)

    def rows(self, slots: np.ndarray) -> np.ndarray:
        return self.row_of_slot[slots]

    def commit(self, slots: np.ndarray, **fields: np.ndarray) -> None:
        """Give `slots` (M,) new chains; `fields` holds an (M, ...) array for each row field."""
        for start in range(0, len(slots), self.num_spare):
            part = slice(start, start + self.num_spare)
            chunk = slots[part]
            fresh = self._spare[: len(chunk)]
            for name in self.row_fields:
                getattr(self, name)[fresh] = fields[name][part]
            old = self.row_of_slot[chunk]
            self.row_of_slot[chunk] = fresh
            self._spare = np.concatenate([self._spare[len(chunk) :], old])

    def _matches(self, directory: Path) -> bool:
        try:
            return json.loads((directory / "shape.json").read_text()) == self._shape
        except (OSError, ValueError):
            return False

    def _array(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        if self._directory is None:
            return np.zeros(shape, dtype)
        path = self._directory / f"{name}.bin"
        return np.memmap(path, dtype, mode="r+" if self.attached else "w+", shape=shape)


def _next_epoch(directory: Path) -> int:
    """One more than the epoch of whoever had `directory` before, whole or not."""
    try:
        return int(np.fromfile(directory / "epoch.bin", np.int64, 1)[0]) + 1
    except (OSError, IndexError):
        return 0
