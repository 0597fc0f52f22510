"""Reads events, and labels if there are any, from a `.npz` or `.npy` file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.data.config import DataConfig
from ebm_dist.data.format.npy import open_npy, read_npz
from ebm_dist.data.sources import labels as labels_file
from ebm_dist.data.sources.original import Original, of_storage
from ebm_dist.data.storage.indexed import Indexed
from ebm_dist.data.storage.items import Arrays

HOLDOUT = 0.1
_LABELS = {"y", "label", "labels", "target", "targets", "cls"}
_TEST = ("test", "valid", "validation", "val")
"""Names of a test part, in order of preference."""


def load(source: Path | None, labels: Path | None) -> Original:
    """The arrays of `source`; a tenth is held out if it has no test part.

    The arrays of a .npz are identified by name: `x` and `y`, `x_train` and `y_train`, `test_images`
    and `test_labels`, or a single array of any name.
    """
    if source is None or source.suffix.lower() not in (".npy", ".npz"):
        came = "none" if source is None else str(source)
        raise UserError(f"arrays: needs --source, a file FILE.npz or FILE.npy; got {came}")
    notes: tuple[str, ...] = ()
    parts = {"train": (open_npy(source), None)} if source.suffix.lower() == ".npy" else {}
    if not parts:
        parts, notes = _parts(read_npz(source), source)
    classes: tuple[str, ...] = ()
    if labels is not None:
        if len(parts) > 1 or parts["train"][1] is not None:
            raise UserError(f"--labels: {source} has labels or a test part already; leave it out")
        rows = [label for _, label in labels_file.read_rows(labels)]
        index = labels_file.classes_of(rows, labels)
        parts = {"train": (parts["train"][0], np.array([index[row] for row in rows]))}
        classes = tuple(index)
    items = {
        split: Arrays(x, None if y is None else _flat(y), f"{source}: {split}")
        for split, (x, y) in parts.items()
    }
    if "test" not in items:
        notes += (f"no test part: a sample in {1 / HOLDOUT:.0f}, by its index, is held out",)
    config = DataConfig(
        source="given", target="numpy:ndarray", holdout=0.0 if "test" in items else HOLDOUT
    )
    storage = Indexed(config, items["train"], items.get("test"))
    law = f"arrays of {source.name}"
    return of_storage(storage, "arrays", law, classes=classes, notes=notes)


def _flat(y: np.ndarray) -> np.ndarray:
    """Labels (N,) from (N,) or (N, 1), the shape in MedMNIST."""
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def _parts(
    held: dict[str, np.ndarray], source: Path
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray | None]], tuple[str, ...]]:
    found: dict[str, dict[bool, list[str]]] = {}
    for name in held:
        words = set(re.split(r"[^a-z]+", name.lower()))
        split = next((word for word in _TEST if word in words), "train")
        found.setdefault(split, {True: [], False: []})[bool(words & _LABELS)].append(name)
    if "train" not in found or any(
        len(names[False]) != 1 or len(names[True]) > 1 for names in found.values()
    ):
        listed = ", ".join(f"{name} {x.shape}" for name, x in held.items()) or "nothing"
        raise UserError(
            f"{source}: holds {listed}; expected one array of events, with labels or without: x "
            "and y, or x_train, y_train, x_test and y_test; rename them"
        )
    test = next((word for word in _TEST if word in found), None)
    splits = {"train": "train"} | ({"test": test} if test else {})
    parts = {
        split: (
            held[found[name][False][0]],
            held[names[0]] if (names := found[name][True]) else None,
        )
        for split, name in splits.items()
    }
    others = [name for name in found if name not in splits.values()]
    return parts, tuple(f"left out: {found[name][False][0]}, a second test part" for name in others)
