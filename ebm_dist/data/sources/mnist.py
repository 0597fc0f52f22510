"""Reads MNIST, Fashion-MNIST and similar sets (EMNIST, KMNIST, …) from their IDX files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.idx import read_first_whole
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.sources.original import Original, Samples, of_arrays

DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
"""Directory of the IDX files of Debian's package dataset-fashion-mnist."""

_GARMENTS = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_SETS = {
    "mnist": ("MNIST (LeCun, Cortes & Burges)", tuple(str(digit) for digit in range(10))),
    "fashion-mnist": ("Fashion-MNIST (Xiao, Rasul & Vollgraf 2017)", _GARMENTS),
}
LAYOUT = Layout(EventSpec((1, 28, 28), "image", 10), 256, labelled=True)

# torchvision and the set's own page write `-idx3`, Kaggle's copies `.idx3`.
_IMAGES = re.compile(r"(?:(.+)-)?(train|t10k|test)-images[-.]idx3-ubyte(?:\.gz)?")


def load(name: str, directory: Path | None) -> Original:
    """Read the IDX files of `directory`. `name` is not checked: both sets have the same format."""
    if directory is None:
        raise UserError(
            f"{name}: needs --source, the directory of its four IDX files (train-images-idx3-ubyte "
            "and so on, gzipped or plain)"
        )

    def split(stem: str) -> Samples:
        images = _read(directory, f"{stem}-images-idx3-ubyte", num_dims=3)
        labels = _read(directory, f"{stem}-labels-idx1-ubyte", num_dims=1)
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max() > 9:
            raise UserError(
                f"{directory}: {stem} has images {images.shape} and labels {labels.shape} up to "
                f"{labels.max()}; expected N images of 28x28 and N labels 0 to 9; fetch them "
                "again, or prepare another set of IDX files as idx"
            )
        return of_arrays(images[:, None], labels)

    law, classes = _SETS[name]
    splits: dict[SplitName, Samples] = {"train": split("train"), "test": split("t10k")}
    return Original(name, f"{law}, its own train and test parts", LAYOUT, classes, splits)


def load_any(source: Path | None) -> Original:
    """Read any set of IDX files: images of one size, with or without labels and a test part.

    Args:
        source: the directory of the files; if it has several sets, as EMNIST's, the directory and
            the name of the set, such as `gzip/emnist-letters`.
    """
    if source is None:
        raise UserError(
            "idx: needs --source, the directory of [NAME-]train-images-idx3-ubyte[.gz] and so on"
        )
    directory, prefix, stems = _find(source)
    notes: tuple[str, ...] = ()
    parts: dict[SplitName, tuple[np.ndarray, np.ndarray | None]] = {}
    for split in ("train", "test"):
        if (stem := stems.get(split)) is None:
            continue
        images = _read(directory, f"{stem}-images-idx3-ubyte", num_dims=3)
        labels = None
        if _files(directory, f"{stem}-labels-idx1-ubyte"):
            labels = _read(directory, f"{stem}-labels-idx1-ubyte", num_dims=1)
        if labels is not None and len(labels) != len(images):
            raise UserError(
                f"{directory}: {stem} has {len(images)} images and {len(labels)} labels; fetch "
                "them again"
            )
        parts[split] = images, labels
    size = parts["train"][0].shape[1:]
    for images, labels in parts.values():
        if images.shape[1:] != size or (labels is None) != (parts["train"][1] is None):
            raise UserError(
                f"{directory}: its test images are not of the size of its training images, or one "
                "of the two parts lacks labels; fetch them again"
            )
    if prefix.startswith("emnist"):
        notes = ("EMNIST stores its images lying on their side; they were turned upright",)
        parts = {split: (x.swapaxes(1, 2), label) for split, (x, label) in parts.items()}
        size = size[::-1]
    values = np.unique(np.concatenate([y for _, y in parts.values() if y is not None] or [[]]))
    classes = _names(directory / f"{prefix}-mapping.txt", [int(value) for value in values])
    splits: dict[SplitName, Samples] = {
        # EMNIST's letters count from 1.
        split: of_arrays(x[:, None], None if y is None else np.searchsorted(values, y))
        for split, (x, y) in parts.items()
    }
    spec = EventSpec((1, *size), "image", len(classes) or None)
    layout = Layout(spec, 256, labelled=bool(classes))
    law = f"IDX files {prefix or directory.name}"
    return Original("idx", law, layout, classes, splits, notes=notes)


def _find(source: Path) -> tuple[Path, str, dict[SplitName, str]]:
    """The directory, the name of the set, and the prefix of its file names by split."""
    directory, wanted = (source, None) if source.is_dir() else (source.parent, source.name)
    if not directory.is_dir():
        raise UserError(f"{source}: is missing; --source takes the directory of IDX files")
    sets: dict[str, dict[SplitName, str]] = {}
    for path in sorted(directory.iterdir()):
        if found := _IMAGES.fullmatch(path.name):
            name, part = found[1] or "", found[2]
            stem = f"{name}-{part}" if name else part
            sets.setdefault(name, {})["train" if part == "train" else "test"] = stem
    chosen = sets.get(wanted) if wanted is not None else next(iter(sets.values()), None)
    if chosen is None or "train" not in chosen:
        held = f" (it holds {', '.join(sorted(sets))})" if any(sets) else ""
        raise UserError(
            f"{source}: has no {wanted + '-' if wanted else ''}train-images-idx3-ubyte, plain or "
            f"gzipped{held}; point --source at the directory of IDX files"
        )
    if wanted is None and len(sets) > 1:
        listed = ", ".join(sorted(filter(None, sets)))
        raise UserError(
            f"{source}: holds several sets ({listed}); name one of them, as --source "
            f"{source / max(sets)}"
        )
    return directory, wanted if wanted is not None else next(iter(sets)), chosen


def _names(mapping: Path, values: Iterable[int]) -> tuple[str, ...]:
    """The names of the labels `values`. A line of EMNIST's mapping file has a label and the code of
    its character."""
    names = {value: str(value) for value in values}
    if mapping.is_file() and mapping.stat().st_size < 2**16:
        for line in mapping.read_text(encoding="ascii", errors="replace").splitlines():
            label, _, codes = line.partition(" ")
            code = codes.split(" ")[0]
            if label.isdecimal() and code.isdecimal() and int(label) in names:
                names[int(label)] = chr(int(code)) if 32 < int(code) < 127 else code
    return tuple(names.values())


def _read(directory: Path, stem: str, *, num_dims: int) -> np.ndarray:
    if found := _files(directory, stem):
        return read_first_whole(found, num_dims=num_dims)
    raise UserError(
        f"{directory / stem}: is missing, and so is {stem}.gz; point --source at the directory "
        "of the IDX files (Debian has Fashion-MNIST's: `apt-get install dataset-fashion-mnist`)"
    )


def _files(directory: Path, stem: str) -> list[Path]:
    names = [stem, stem.replace("-idx", ".idx")]
    paths = [directory / f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
    return [path for path in paths if path.is_file()]
