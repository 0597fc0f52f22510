"""A user's dataset, read by index: converts events and labels to arrays, and checks each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebm_dist.core.errors import UserError, named
from ebm_dist.data.format.decode import Layout, check_label, fit, fit_numbers
from ebm_dist.data.format.picture import grey_or_colour
from ebm_dist.data.storage.protocol import Rows

_ONE_AT_A_TIME = threading.Lock()
"""On the inline backend several threads read one dataset, which may not be thread-safe: it may seek
in an open file, for example."""


SURVEY_S, NUM_SURVEYED = 2.0, 64
"""Limits of the survey of a dataset before a run; all samples of arrays are read."""
_BLOCK = 4096
"""Rows of an array that are checked together; limited because the checks make copies."""


class Items(Protocol):
    """Samples by index."""

    where: str
    """Names the samples in messages."""
    num_bytes: int
    """Size of arrays; 0 for a dataset, whose size is unknown."""

    def __len__(self) -> int: ...

    def example(self) -> tuple[np.ndarray, int | None]:
        """The first event, unconverted, and its label."""
        ...

    def num_classes(self) -> int | None:
        """Number of classes; None if it is unknown without reading every sample."""
        ...

    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty if they have no names."""
        ...

    def surveyed(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The part of `rows` to read before a run, in blocks."""
        ...

    def take(self, rows: np.ndarray, layout: Layout) -> Rows:
        """The samples at the indices `rows` (num,), num >= 1.

        Raises:
            UserError: names a sample that cannot be read or does not fit `layout`.
        """
        ...


class Arrays:
    """Events (N, *event) and labels (N,) in memory. Not copied."""

    def __init__(self, x: np.ndarray, label: np.ndarray | None, where: str) -> None:
        if x.ndim == 0 or (label is not None and label.shape != x.shape[:1]):
            came = "" if label is None else f" and labels of shape {label.shape}"
            raise UserError(
                f"{where}: expected events (N, *event) and N labels or none, got events of shape "
                f"{x.shape}{came}"
            )
        if label is not None and (label.dtype.kind not in "iu" or (label < 0).any()):
            came = label.dtype if label.dtype.kind not in "iu" else label.min()
            raise UserError(f"{where}: labels must be integers from 0, got {came}")
        self.where = where
        self.num_bytes = x.nbytes + (0 if label is None else label.nbytes)
        self._x = x
        self._label = label

    def __len__(self) -> int:
        return len(self._x)

    def example(self) -> tuple[np.ndarray, int | None]:
        return self._x[0], None if self._label is None else int(self._label[0])

    def num_classes(self) -> int | None:
        return None if self._label is None else int(self._label.max()) + 1

    def classes(self) -> tuple[str, ...]:
        return ()

    def surveyed(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), _BLOCK):
            yield rows[start : start + _BLOCK]

    def take(self, rows: np.ndarray, layout: Layout) -> Rows:
        x, label = self._x[rows], None
        if self._label is None:
            _check_label(None, layout, self._name(0))
        else:
            label = self._label[rows].astype(np.int64)
            highest = int(label.argmax())
            _check_label(int(label[highest]), layout, self._name(rows[highest]))
        if x.shape[1:] == layout.spec.shape:
            with contextlib.suppress(UserError):  # the loop below then names the sample
                return fit_numbers(x, layout, self.where), label
        return np.stack([fit(self._x[row], layout, self._name(row)) for row in rows]), label

    def _name(self, row: int) -> str:
        return f"{self.where}: sample {row}"


class Indexable:
    """A map-style dataset: `__len__`, and `__getitem__` of an event or (event, label)."""

    num_bytes = 0

    def __init__(self, dataset: Any, where: str) -> None:
        if isinstance(dataset, type) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            is_class = isinstance(dataset, type)
            came = f"the class {dataset.__name__}" if is_class else f"a {type(dataset).__name__}"
            raise UserError(
                f"{where}: expected a map-style dataset, which has __len__ and __getitem__, got "
                f"{came}; write what can only be iterated as shards"
            )
        self.where = where
        self._dataset = dataset
        try:
            self._num = len(dataset)
        except Exception as error:
            raise UserError(f"{where}: __len__ raises {named(error)}") from error

    def __len__(self) -> int:
        return self._num

    def example(self) -> tuple[np.ndarray, int | None]:
        return self._read(0)

    def num_classes(self) -> int | None:
        return len(self.classes()) or None

    def classes(self) -> tuple[str, ...]:
        names = getattr(self._dataset, "classes", ())  # as torchvision's datasets have
        return tuple(map(str, names)) if isinstance(names, list | tuple) else ()

    def surveyed(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        until = time.monotonic() + SURVEY_S
        for row in spread(rows, NUM_SURVEYED):
            yield row[None]
            if time.monotonic() > until:
                return

    def take(self, rows: np.ndarray, layout: Layout) -> Rows:
        xs, labels = [], []
        for row in rows.tolist():
            x, label = self._read(row)
            where = self._name(row)
            _check_label(label, layout, where)
            xs.append(fit(x, layout, where))
            labels.append(label)
        return np.stack(xs), np.array(labels, np.int64) if layout.labelled else None

    def _read(self, row: int) -> tuple[np.ndarray, int | None]:
        where = self._name(row)
        try:
            with _ONE_AT_A_TIME:
                return _event_and_label(self._dataset[row], where)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{where}: __getitem__ raises {named(error)}") from error

    def _name(self, row: int) -> str:
        return f"{self.where}: sample {row}"


def spread(rows: np.ndarray, num: int) -> np.ndarray:
    """At most `num` of `rows`, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), num)).astype(np.int64))]


def items_of(data: Any, where: str) -> Items:
    """`data` as samples by index.

    Args:
        data: events (N, *event), a tuple of events and labels (N,), or a map-style dataset.

    Raises:
        UserError: `data` is none of these.
    """
    if isinstance(data, Tensor | np.ndarray):
        return Arrays(as_array(data, where), None, where)
    if isinstance(data, tuple):
        if len(data) != 2:
            raise UserError(f"{where}: expected (events, labels), got a tuple of {len(data)}")
        return Arrays(as_array(data[0], where), as_array(data[1], where), where)
    return Indexable(data, where)


def as_array(x: Any, where: str) -> np.ndarray:
    """A tensor, array or PIL image as an array; a PIL image becomes uint8, (H, W) or (H, W, 3)."""
    if isinstance(x, Image.Image):
        return np.asarray(grey_or_colour(x, where))
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if not isinstance(x, np.ndarray | np.generic):
        raise UserError(
            f"{where}: an event must be a tensor, a numpy array or a PIL image, got "
            f"{type(x).__name__}"
        )
    if x.dtype.kind not in "buif":
        raise UserError(f"{where}: is of dtype {x.dtype}, expected plain real numbers")
    return np.asarray(x)


def _event_and_label(item: Any, where: str) -> tuple[np.ndarray, int | None]:
    if not isinstance(item, tuple | list):
        return as_array(item, where), None
    if len(item) not in (1, 2):
        raise UserError(
            f"{where}: expected an event or (event, label), got a {type(item).__name__} of "
            f"{len(item)}"
        )
    # Reads an image that was opened lazily.
    return as_array(item[0], where), _label(item[1], where) if len(item) == 2 else None


def _label(value: Any, where: str) -> int | None:
    if value is None:
        return None
    number = value.item() if isinstance(value, Tensor | np.ndarray) and not value.shape else value
    if isinstance(number, int | np.integer) and not isinstance(number, bool) and number >= 0:
        return int(number)
    raise UserError(f"{where}: its label must be an integer from 0, got {value!r:.60}")


def _check_label(label: int | None, layout: Layout, where: str) -> None:
    check_label(label, layout, where, advice="label all or none")
