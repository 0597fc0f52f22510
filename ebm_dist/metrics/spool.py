"""A file of all items for a W&B run, in order, and the record of how many were sent."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm_dist.files.durable import replace_text, replacing
from ebm_dist.files.safe_open import make_directory, open_to_append, open_to_read, read_bytes
from ebm_dist.metrics.jsonl import decode, encode, read_rows, repair

RECENT = 2000
"""How many of the last items the driver may send again to a new hub; twice the number it keeps."""


class Spool:
    """All items for a W&B run, in order, in a file that outlives server, service and hub.

    Each item becomes one line of the run's history. So the number of lines on the server shows
    which items it has, after any crash, and the rest is sent. Items are never removed, since a run
    that replaces a deleted one needs all of them.

    Each item is stored once. A resumed run repeats the updates after its checkpoint, and the driver
    sends a new hub the items that the dead one had not confirmed; the server may already have those
    items, and W&B cannot delete rows.

    Args:
        resume_step: the update from which the run resumes; None for a hub that replaces another.

    Raises:
        OSError: the file cannot be read or repaired.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        make_directory(path.parent)
        repair(path)
        self._at_start: int | None = path.stat().st_size if path.exists() else 0
        self._taken = 0  # bytes
        self._known: dict[int, set[str]] = {}  # names by step, of items that may be repeated
        recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        for item in read_rows(path):
            recent.append(item)
            if resume_step is not None and item.get("step", -1) >= resume_step:
                self._known.setdefault(item["step"], set()).update(_names(item))
        for item in recent:
            if "step" in item:
                self._known.setdefault(item["step"], set()).update(_names(item))

    def put(self, item: Mapping[str, Any]) -> None:
        """Append `item`, unless an earlier attempt has logged its metrics for that update."""
        names = _names(item)
        known = self._known.get(item.get("step", -1), set())
        if names & known:
            known -= names  # a third time means that the run was rolled back, so it is new
            return
        with self._lock, open_to_append(self._path) as file:
            file.write(encode(item))

    def start_at(self, num: int) -> None:
        """Continue after the first `num` items, which the server has."""
        left, self._taken = num, 0
        with self._lock:
            self._path.touch()
            # At the first connection the server has no item of this attempt.
            end = self._path.stat().st_size if self._at_start is None else self._at_start
            with open_to_read(self._path) as file:
                while left and self._taken < end:
                    line = file.readline()
                    self._taken += len(line)
                    left -= 1
            if left:
                # The server has more items than this file: the machine died before the last items
                # were on disk, or the run is older than the file. Empty items replace them.
                data, empty = self._path.read_bytes(), encode({}) * left
                with replacing(self._path) as file:
                    file.write(data[:end] + empty + data[end:])
                self._taken = end + len(empty)
            self._at_start = None

    def take(self, most: int = 500) -> list[tuple[dict[str, Any], int]]:
        """Up to `most` items, each with the position to pass to `advance` once it is sent.

        An item is empty if its line is not a JSON object.
        """
        items, mark = [], self._taken
        with self._lock, contextlib.suppress(FileNotFoundError), open_to_read(self._path) as file:
            file.seek(self._taken)
            for line in file:
                if len(items) >= most or not line.endswith(b"\n"):
                    break
                mark += len(line)
                items.append((decode(line) or {}, mark))
        return items

    def advance(self, mark: int) -> None:
        """Record that all items up to `mark` are sent."""
        self._taken = mark

    def empty(self) -> bool:
        """Whether all items are sent."""
        with self._lock:
            try:
                return os.path.getsize(self._path) <= self._taken
            except FileNotFoundError:
                return True


def _names(item: Mapping[str, Any]) -> set[str]:
    if item.get("kind") == "row":
        return set(item["values"])
    return {item["name"]} if "name" in item else set()


class Continuity:
    """The id of the W&B run and its number of sent items, in a file for the next attempt.

    Args:
        path: of the file; a missing or damaged file is ignored.
        run_id: of the run to continue, from the checkpoint.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self._path = path
        self._replaced: dict[str, str] = {}
        self.run_id = run_id
        self.num_passed_on = 0
        """Items of this run that were handed to the W&B service."""
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            content = json.loads(read_bytes(path))
            self._replaced = dict(content["replaced"])
            for _ in self._replaced:  # the replacement may have been deleted as well
                self.run_id = self._replaced.get(self.run_id, self.run_id)
            if content["run_id"] == self.run_id:
                self.num_passed_on = int(content["num_passed_on"])

    def rename(self, run_id: str) -> None:
        """Continue under a new id, for which the server has no items."""
        self._replaced[self.run_id] = run_id
        self.run_id, self.num_passed_on = run_id, 0
        self.save()

    def save(self) -> None:
        """Write the file if possible; without it the server gets a few items twice."""
        content = {
            "run_id": self.run_id,
            "replaced": self._replaced,
            "num_passed_on": self.num_passed_on,
        }
        with contextlib.suppress(OSError):
            replace_text(self._path, json.dumps(content) + "\n")
