"""Reads CIFAR-10 and CIFAR-100 from their python or binary archives."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.shards import BROKEN, Header, reason
from ebm_dist.data.sources.original import Original, Samples, of_arrays
from ebm_dist.data.sources.restricted_pickle import read_plain_pickle

_TEN = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_MAX_FILE = 256 * 2**20


@dataclass(frozen=True, slots=True)
class _Set:
    name: str
    title: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    num_classes: int
    labels: str
    """Key of the labels in the python archive."""
    num_label_bytes: int
    """Bytes before the pixels of a record in the binary archive; the last one is the class."""
    names: str | None = None
    """The file of the python archive with `fine_label_names`."""


CIFAR10 = _Set(
    *("cifar10", "CIFAR-10", tuple(f"data_batch_{k}" for k in range(1, 6)), ("test_batch",)),
    *(10, "labels", 1),
)
CIFAR100 = _Set("cifar100", "CIFAR-100", ("train",), ("test",), 100, "fine_labels", 2, "meta")


def load(which: _Set, source: Path | None) -> Original:
    """Read the python or the binary archive, or the directory unpacked from one of them."""
    stem = which.title.lower()
    if source is None:
        raise UserError(
            f"{which.name}: needs --source, the file {stem}-python.tar.gz or {stem}-binary.tar.gz "
            "(https://www.cs.toronto.edu/~kriz/cifar.html) or the directory unpacked from it"
        )
    files = _files(which, source)

    def split(stems: tuple[str, ...]) -> Samples:
        parts = []
        for stem in stems:
            if stem in files:
                parts.append(_python(which, files[stem], f"{source}: {stem}"))
            elif f"{stem}.bin" in files:
                parts.append(_binary(which, files[f"{stem}.bin"], f"{source}: {stem}.bin"))
            else:
                raise UserError(f"{source}: has no {stem} or {stem}.bin; fetch the archive again")
        x, label = (np.concatenate(arrays) for arrays in zip(*parts))
        return of_arrays(x, label)

    return Original(
        which.name,
        f"{which.title} (Krizhevsky 2009), its own train and test parts",
        Layout(EventSpec((3, 32, 32), "image", which.num_classes), 256, labelled=True),
        _classes(which, files, source),
        {"train": split(which.train), "test": split(which.test)},
    )


def _classes(which: _Set, files: dict[str, bytes], source: Path) -> tuple[str, ...]:
    """The names of the classes; their numbers if the files do not have the names."""
    if which.num_classes == 10:
        return _TEN
    names: Any = None
    if which.names in files:
        meta = read_plain_pickle(files[which.names], where=f"{source}: {which.names}")
        names = meta.get("fine_label_names") if isinstance(meta, dict) else None
    elif "fine_label_names.txt" in files:
        names = files["fine_label_names.txt"].decode("ascii", "replace").split()
    if isinstance(names, list) and len(names) == which.num_classes:
        return tuple(
            name.decode("latin-1") if isinstance(name, bytes) else str(name) for name in names
        )
    return tuple(map(str, range(which.num_classes)))


def _files(which: _Set, source: Path) -> dict[str, bytes]:
    """The required files of the archive or directory, by base name."""
    stems = (*which.train, *which.test)
    wanted = {*stems, *(f"{stem}.bin" for stem in stems)}
    if which.names is not None:
        wanted |= {which.names, "fine_label_names.txt"}
    files: dict[str, bytes] = {}

    def keep(name: str, size: int, read: Callable[[], bytes]) -> None:
        if size > _MAX_FILE:
            raise UserError(f"{source}: {name} has {size} bytes, at most {_MAX_FILE} are read")
        files[name] = read()

    try:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.name in wanted and path.is_file():
                    keep(path.name, path.stat().st_size, path.read_bytes)
        elif source.is_file():
            with tarfile.open(source, tarinfo=Header) as archive:
                for info in archive:
                    name = Path(info.name).name
                    member = archive.extractfile(info) if name in wanted and info.isreg() else None
                    if member is not None:
                        keep(name, info.size, member.read)
        else:
            raise UserError(
                f"{source}: is missing; --source takes {which.title}'s archive or directory"
            )
    except BROKEN as error:
        raise UserError(
            f"{source}: not a whole archive ({reason(error)}); fetch it again"
        ) from None
    return files


def _binary(which: _Set, data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    num = which.num_label_bytes
    record = num + 3 * 32 * 32
    if not data or len(data) % record:
        raise UserError(f"{where}: {len(data)} bytes, not a multiple of {record}; fetch it again")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    return _checked(which, records[:, num:], records[:, num - 1], where)


def _python(which: _Set, data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = read_plain_pickle(data, where=where)
    x = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get(which.labels) if isinstance(batch, dict) else None
    if not (
        isinstance(x, np.ndarray)
        and isinstance(labels, list)
        and x.shape == (len(labels), 3 * 32 * 32)
        and all(type(label) is int and 0 <= label <= 255 for label in labels)
    ):
        raise UserError(
            f"{where}: expected 'data' (N, 3072) and N integer {which.labels!r}; this is not a "
            f"batch of {which.title}'s python archive"
        )
    return _checked(which, x, np.array(labels, dtype=np.uint8), where)


def _checked(
    which: _Set, x: np.ndarray, label: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    last = which.num_classes - 1
    if len(label) == 0 or label.max() > last:
        raise UserError(
            f"{where}: {len(label)} labels, of which some are not 0 to {last}; is it {which.title}?"
        )
    return x.reshape(-1, 3, 32, 32), label
