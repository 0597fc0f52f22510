"""The samples of whole shards in memory, encoded until their first use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.data.format.decode import Layout, decode_sample
from ebm_dist.data.stream.bad_samples import BadSamples


class Sample:
    """One sample, encoded until its first use and decoded afterwards."""

    __slots__ = ("_label", "_raw", "_x")

    def __init__(
        self,
        raw: dict[str, Any] | None,
        x: np.ndarray | None = None,
        label: int | None = None,
    ) -> None:
        self._raw = raw
        self._x = x
        self._label = label

    @property
    def raw(self) -> dict[str, Any] | None:
        """The encoded sample, as read from its shard; None once it is decoded."""
        return self._raw

    def decoded(self, layout: Layout) -> tuple[np.ndarray, int | None]:
        """x (*stored shape) and the label.

        Raises:
            UserError: the sample does not fit `layout`.
        """
        if self._raw is not None:
            self._x, self._label = decode_sample(self._raw, layout)
            self._raw = None
        assert self._x is not None
        return self._x, self._label


class Kept:
    """The samples of the shards in memory, by number of the shard.

    If a whole epoch is in memory, it is returned as rows of one array, which takes a few calls per
    batch. Sample by sample, Python takes 90 us for 64 images of 28x28, and four times that during
    an update, whose operations wait for it. If a part of the epoch is not in memory, its samples
    are returned one by one.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._single: dict[int, tuple[Sample, ...]] = {}
        self._rows: dict[int, range] = {}
        self._x = np.empty((0, *layout.spec.shape), layout.dtype)
        self._label = np.empty(0, np.int64)
        self._encoded: dict[int, dict[str, Any]] = {}
        """Encoded samples by row: a cursor has skipped them, or another rank reads them. Their rows
        have not been written to, so they take no memory yet."""

    def __contains__(self, number: int) -> bool:
        return number in self._single or number in self._rows

    def keep(self, number: int, samples: tuple[Sample, ...]) -> None:
        """Keep the samples of shard `number`."""
        self._single[number] = samples

    def samples(self, number: int) -> Iterator[Sample]:
        """The samples of shard `number` in their order."""
        if number in self._single:
            yield from self._single[number]
            return
        for row in self._rows[number]:
            raw = self._encoded.get(row)
            # The caller decodes it, and here it stays encoded: such epochs are rare.
            yield Sample(raw) if raw else Sample(None, self._x[row], int(self._label[row]))

    def rows(self, numbers: Iterable[int]) -> list[int] | None:
        """The rows of the samples of the shards `numbers`; None if one is not in memory."""
        numbers = list(numbers)
        if not all(number in self for number in numbers):
            return None
        if self._single:
            self._line_up()
        return [row for number in numbers for row in self._rows[number]]

    def decoded(self, rows: np.ndarray, bad: BadSamples) -> np.ndarray:
        """Decode the samples of `rows` (num,); returns the rows without those of bad samples."""
        if not self._encoded:
            return rows
        good = np.ones(len(rows), bool)
        for place, row in enumerate(rows.tolist()):
            if (raw := self._encoded.get(row)) is None:
                continue
            try:
                self._write(row, *decode_sample(raw, self._layout))
            except UserError as error:
                bad.add(error)
                good[place] = False
            else:
                del self._encoded[row]
        return rows if good.all() else rows[good]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """x (num, *stored shape) and labels (num,) int64 of rows (num,) that `decoded` returned."""
        return self._x[rows], self._label[rows] if self._layout.labelled else None

    def _line_up(self) -> None:
        """Move the single samples into the array."""
        row = len(self._x)
        num = row + sum(map(len, self._single.values()))
        x, label = np.empty((num, *self._x.shape[1:]), self._x.dtype), np.empty(num, np.int64)
        x[:row], label[:row] = self._x, self._label
        self._x, self._label = x, label
        while self._single:
            # One shard at a time, so that at most one shard is in memory twice.
            number, samples = self._single.popitem()
            self._rows[number] = range(row, row + len(samples))
            for sample in samples:
                if sample.raw is not None:
                    self._encoded[row] = sample.raw
                else:
                    self._write(row, *sample.decoded(self._layout))
                row += 1

    def _write(self, row: int, x: np.ndarray, label: int | None) -> None:
        self._x[row] = x
        self._label[row] = -1 if label is None else label
