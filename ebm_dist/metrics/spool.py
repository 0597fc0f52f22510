"""The file of everything that a W&B run is told, in order."""

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
"""Last items of the file that may come again from a hub's driver: twice what it keeps for one."""


class Spool:
    """Everything that a W&B run is told, in order, in a file: it outlives server, service and hub.

    Each item but a summary makes one line of the run's history. So the number of lines that the
    server has says which items those are, whoever died with the others, and the rest is sent.
    Nothing is removed: a new run in place of a deleted one needs all of it.

    An item is taken in once. A resumed run repeats the updates after its checkpoint, and a new hub
    is told again what the dead one had not confirmed; the server may have those items already, and
    W&B takes nothing back.

    Args:
        resume_step: the update from which the run goes on; None for a hub that replaces another.

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
        self._known: dict[int, set[str]] = {}  # names by step, of what may come again
        recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        for item in read_rows(path):
            recent.append(item)
            if resume_step is not None and item.get("step", -1) >= resume_step:
                self._known.setdefault(item["step"], set()).update(_names(item))
        for item in recent:
            if "step" in item:
                self._known.setdefault(item["step"], set()).update(_names(item))

    def put(self, item: Mapping[str, Any]) -> None:
        """Take `item` in, unless an earlier attempt has logged its metrics of that update."""
        names = _names(item)
        known = self._known.get(item.get("step", -1), set())
        if names & known:
            known -= names  # if it comes a third time, the run went back and means it
            return
        with self._lock, open_to_append(self._path) as file:
            file.write(encode(item))

    def start_at(self, num: int) -> dict[str, Any]:
        """Go on after the first `num` items, which the run has; returns its summary up to there."""
        summary: dict[str, Any] = {}
        left, self._taken = num, 0
        with self._lock:
            self._path.touch()
            # A server that is met for the first time has nothing that this attempt has put in.
            end = self._path.stat().st_size if self._at_start is None else self._at_start
            with open_to_read(self._path) as file:
                while left and self._taken < end:
                    line = file.readline()
                    self._taken += len(line)
                    item = decode(line) or {}
                    if item.get("kind") == "summary":
                        summary.update(item["values"])
                    else:
                        left -= 1
            if left:
                # The server has more than this file tells of: the machine died before its disk
                # had the last items, or the run is older than the file. Empty items stand for them.
                data, empty = self._path.read_bytes(), encode({}) * left
                with replacing(self._path) as file:
                    file.write(data[:end] + empty + data[end:])
                self._taken = end + len(empty)
            self._at_start = None
        return summary

    def take(self, most: int = 500) -> list[tuple[dict[str, Any], int]]:
        """Up to `most` items, each with the mark to hand to `advance` when it is delivered.

        An item is empty where its line is no JSON object.
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
        """All up to `mark` is delivered."""
        self._taken = mark

    def empty(self) -> bool:
        """Whether all of it is delivered."""
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
    """What one attempt leaves the next about the W&B run, in a file: its id, and how much it has.

    Args:
        path: of the file; missing or torn it says nothing.
        run_id: of the run to go on with, as the checkpoint has it.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self._path = path
        self._replaced: dict[str, str] = {}
        self.run_id = run_id
        self.num_passed_on = 0
        """Items that a service of W&B was given for this run."""
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            content = json.loads(read_bytes(path))
            self._replaced = dict(content["replaced"])
            for _ in self._replaced:  # the one in its place may have been deleted as well
                self.run_id = self._replaced.get(self.run_id, self.run_id)
            if content["run_id"] == self.run_id:
                self.num_passed_on = int(content["num_passed_on"])

    def rename(self, run_id: str) -> None:
        """Go on under another id, of which the server has nothing."""
        self._replaced[self.run_id] = run_id
        self.run_id, self.num_passed_on = run_id, 0
        self.save()

    def save(self) -> None:
        """Write the file, if the disk lets it: without it the run is told a little twice."""
        content = {
            "run_id": self.run_id,
            "replaced": self._replaced,
            "num_passed_on": self.num_passed_on,
        }
        with contextlib.suppress(OSError):
            replace_text(self._path, json.dumps(content) + "\n")
