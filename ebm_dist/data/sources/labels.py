"""Reads a file of labels: JSON, CSV, TSV or npy."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ebm_dist.core.errors import UserError
from ebm_dist.data.format.npy import open_npy
from ebm_dist.files.safe_open import open_to_read

MAX_BYTES = 256 * 2**20
MAX_CLASSES = 10_000
_NAMES = ("file", "filename", "file_name", "image", "image_id", "img", "path", "name", "id")
_LABELS = ("label", "labels", "class", "class_name", "category", "target", "y")

Row = tuple[str | None, str]
"""Name and label of a sample; the name is None if the file lists labels in the samples' order."""


def read_rows(path: Path) -> list[Row]:
    """The labels in `path`.

    JSON: {"NAME": LABEL, …}, [["NAME", LABEL], …], [{"file": …, "label": …}, …], [LABEL, …], or one
    of these under the key "labels". CSV and TSV: columns of names and labels, found by their
    heads, or one column of labels. npy: (N,) integers.

    Raises:
        UserError: it is none of these.
    """
    if path.suffix.lower() == ".npy":
        values = open_npy(path)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise UserError(f"{path}: expected integers (N,), got {values.dtype} {values.shape}")
        return [(None, str(value)) for value in values.tolist()]
    with open_to_read(path, follow=True) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: has more than {MAX_BYTES} bytes; expected a file of labels")
    try:
        text = data.decode("utf-8-sig")
        if path.suffix.lower() == ".json":
            rows = _of_json(json.loads(text))
        else:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = _of_table(list(csv.reader(text.splitlines(), delimiter=delimiter)))
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(
            f"{path}: holds no labels that can be read ({error}); expected JSON such as "
            '{"a.png": "cat"}, or CSV with a head such as file,label'
        ) from None
    if not rows:
        raise UserError(f"{path}: holds no labels")
    return rows


def by_name(path: Path) -> dict[str, str]:
    """The labels in `path` by the names of the samples."""
    found: dict[str, str] = {}
    for name, label in read_rows(path):
        if name is None:
            raise UserError(
                f"{path}: holds labels without the names of their images; write rows of file,label"
            )
        if found.setdefault(name, label) != label:
            raise UserError(f"{path}: labels {name!r} both {found[name]!r} and {label!r}")
    return found


def classes_of(labels: Iterable[str], path: Path) -> dict[str, int]:
    """Class names in their order, with their indices: numbers by size, others by the alphabet."""
    names = set(labels)
    if len(names) > MAX_CLASSES:
        raise UserError(f"{path}: {len(names)} different labels; at most {MAX_CLASSES} are classes")
    numbers = all(name.isdecimal() and len(name) < 19 for name in names)
    ordered = sorted(names, key=int) if numbers else sorted(names)
    return {name: index for index, name in enumerate(ordered)}


def _of_json(value: Any) -> list[Row]:
    if isinstance(value, Mapping) and isinstance(value.get("labels"), list | dict):
        value = value["labels"]
    if isinstance(value, Mapping):
        return [(str(name), _text(label)) for name, label in value.items()]
    if not isinstance(value, list):
        raise ValueError("neither a list nor an object")
    return [_row(item) for item in value]


def _row(item: Any) -> Row:
    if isinstance(item, list) and len(item) == 2:
        return _text(item[0]), _text(item[1])
    if isinstance(item, Mapping):
        keys = {str(key).lower(): key for key in item}
        name, label = (next((k for k in some if k in keys), None) for some in (_NAMES, _LABELS))
        if label is None:
            raise ValueError(f"an entry with the keys {', '.join(keys)} and no label")
        return None if name is None else _text(item[keys[name]]), _text(item[keys[label]])
    return None, _text(item)


def _of_table(rows: list[list[str]]) -> list[Row]:
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        return []
    head = [cell.lower() for cell in rows[0]]
    label = next((head.index(name) for name in _LABELS if name in head), None)
    name = next((head.index(name) for name in _NAMES if name in head), None)
    if label is not None:
        rows = rows[1:]
    elif len(head) <= 2:
        name, label = (0, 1) if len(head) == 2 else (None, 0)
    else:
        raise ValueError(f"no column of {', '.join(head)} is named {' or '.join(_LABELS)}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(head) or not row[label]:
            raise ValueError(f"row {number} has {len(row)} cells for {len(head)}, or no label")
    return [(None if name is None else row[name], row[label]) for row in rows]


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"a name or label that is neither text nor a whole number: {value!r:.60}")
    return str(value)
