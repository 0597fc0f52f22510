"""JSON-lines files that stay readable if their writer is killed at any byte."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ebm_dist.files.durable import replacing
from ebm_dist.files.safe_open import open_to_append, open_to_read, open_to_repair

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"
"""Rows after the checkpoint from which a run was resumed; no curve uses them."""


def encode(row: Mapping[str, Any]) -> bytes:
    """`row` as one line of strict JSON; non-finite numbers become null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes | str) -> dict[str, Any] | None:
    """The row of one line; None if it is torn, empty, not an object, or has a bad `step`."""
    try:
        row = json.loads(line, parse_int=_whole)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step", 0)) is not int:
        return None
    return row


def _whole(digits: str) -> int | float:
    # An integer of hundreds of digits does not fit a float, and would fail wherever it is used.
    return int(digits) if len(digits) < 19 else float(digits)


class JsonlSink:
    """Appends rows to `path`, each call in one write.

    Opening repairs the file: a last line that a crash truncated is removed, or completed if only
    its newline is missing. A failed write leaves no partial line and does not affect later ones.

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        repair(path)
        self._open()

    def _open(self) -> None:
        self._file = open_to_append(self.path)
        self._size = os.fstat(self._file.fileno()).st_size

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append `rows`."""
        data = b"".join(encode(row) for row in rows)
        if not data:
            return
        try:
            written = self._file.write(data)
            if written != len(data):  # a full disk accepts a part
                raise OSError(f"{self.path}: wrote {written} of {len(data)} bytes; disk full?")
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(data)

    def rewind(self, step: int) -> int:
        """Move rows beyond `step` to `metrics.superseded.jsonl`; returns their number.

        A resumed run repeats those updates, and a curve must not mix both attempts. The file
        is replaced atomically: a crash leaves the old one or the new one.
        """
        kept, gone = [], []
        for row in read_rows(self.path):
            (kept if row.get("step", 0) <= step else gone).append(row)
        if not gone:
            return 0
        with open_to_append(self.path.with_name(SUPERSEDED_FILE)) as file:
            file.write(b"".join(map(encode, gone)))
        replace_rows(self.path, kept)
        self._file.close()
        self._open()
        return len(gone)

    def sync(self) -> None:
        """Sync the rows to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def repair(path: Path) -> None:
    """Complete or remove a truncated last line of `path`; does nothing if there is no file."""
    if not os.path.lexists(path):
        return
    with open_to_repair(path) as file:
        end = file.seek(0, os.SEEK_END)
        start, tail = end, b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - 65536)
            file.seek(start)
            tail = file.read(end - start)
        last = tail.rfind(b"\n") + 1
        fragment = tail[last:]
        if not fragment:
            return
        if decode(fragment) is not None:
            file.seek(end)
            file.write(b"\n")
        else:
            file.truncate(start + last)


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the content of `path` by `rows`, atomically."""
    with replacing(path) as file:
        file.write(b"".join(map(encode, rows)))


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of `path` in order, without lines that `decode` refuses.

    Yields nothing if the file is missing or empty.
    """
    try:
        file = open_to_read(path)
    except FileNotFoundError:
        return
    with file:
        for line in file:
            row = decode(line)
            if row is not None:
                yield row
