"""Samples that stay in memory: those of whole shards, encoded until they are used first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.data.format.decode import Layout, decode_sample
from ebm_dist.data.stream.bad_samples import BadSamples


class Sample:
    """One sample on its way to a batch: encoded until it is used first, decoded from then on."""

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
        """As it came out of its shard; None once it is decoded."""
        return self._raw

    def decoded(self, layout: Layout) -> tuple[np.ndarray, int | None]:
        """x (*stored shape) and the label.

        Raises:
            UserError: it is not what `layout` says.
        """
        if self._raw is not None:
            self._x, self._label = decode_sample(self._raw, layout)
            self._raw = None
        assert self._x is not None
        return self._x, self._label


class Kept:
    """The samples of some shards, by the number of the shard.

    One by one where a part of an epoch is not here. An epoch that is here from end to end is
    handed out as rows of one array, a batch by a few calls: sample by sample the interpreter takes
    90 us for 64 images of 28x28, and four times that behind an update, whose own operations wait
    for it meanwhile.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._single: dict[int, tuple[Sample, ...]] = {}
        self._rows: dict[int, range] = {}
        self._x = np.empty((0, *layout.spec.shape), layout.dtype)
        self._label = np.empty(0, np.int64)
        self._encoded: dict[int, dict[str, Any]] = {}
        """By row: those that were passed over so far, by a cursor or because another rank has
        them. Memory that nobody wrote to is none, so their rows cost nothing yet."""

    def __contains__(self, number: int) -> bool:
        return number in self._single or number in self._rows

    def keep(self, number: int, samples: tuple[Sample, ...]) -> None:
        """Hold on to the samples of shard `number`."""
        self._single[number] = samples

    def samples(self, number: int) -> Iterator[Sample]:
        """The samples of shard `number` in their order."""
        if number in self._single:
            yield from self._single[number]
            return
        for row in self._rows[number]:
            raw = self._encoded.get(row)
            # Decoded outside, it stays encoded here: an epoch that mixes both kinds is rare.
            yield Sample(raw) if raw else Sample(None, self._x[row], int(self._label[row]))

    def rows(self, numbers: Iterable[int]) -> list[int] | None:
        """The samples of shards in their order, for `take`; None if one of them is not here."""
        numbers = list(numbers)
        if not all(number in self for number in numbers):
            return None
        if self._single:
            self._line_up()
        return [row for number in numbers for row in self._rows[number]]

    def decoded(self, rows: np.ndarray, bad: BadSamples) -> np.ndarray:
        """`rows` (num,) without those of bad samples; the others are decoded afterwards."""
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
        """Move what is held one by one into the array."""
        row = len(self._x)
        num = row + sum(map(len, self._single.values()))
        x, label = np.empty((num, *self._x.shape[1:]), self._x.dtype), np.empty(num, np.int64)
        x[:row], label[:row] = self._x, self._label
        self._x, self._label = x, label
        while self._single:
            # One after the other, so that never more than a shard is there twice.
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
