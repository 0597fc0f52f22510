"""CIFAR-10, from either of its archives."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.shards import BROKEN, Header, reason
from ebm_dist.data.sources.original import Original, Samples, of_arrays
from ebm_dist.data.sources.restricted_pickle import read_plain_pickle

LAYOUT = Layout(EventSpec((3, 32, 32), "image", 10), 256, labelled=True)

_CLASSES = (
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
_MAX_FILE = 64 * 2**20
_TRAIN = tuple(f"data_batch_{k}" for k in range(1, 6))


def load(source: Path | None) -> Original:
    """The python or the binary archive, or the directory unpacked from either."""
    if source is None:
        raise UserError(
            "cifar10: needs --source, the file cifar-10-python.tar.gz or cifar-10-binary.tar.gz "
            "(https://www.cs.toronto.edu/~kriz/cifar.html) or the directory unpacked from it"
        )
    files = _files(source)

    def split(stems: tuple[str, ...]) -> Samples:
        parts = []
        for stem in stems:
            if stem in files:
                parts.append(_python(files[stem], f"{source}: {stem}"))
            elif f"{stem}.bin" in files:
                parts.append(_binary(files[f"{stem}.bin"], f"{source}: {stem}.bin"))
            else:
                raise UserError(f"{source}: has no {stem} or {stem}.bin; fetch the archive again")
        x, label = (np.concatenate(arrays) for arrays in zip(*parts))
        return of_arrays(x, label)

    return Original(
        "cifar10",
        "CIFAR-10 (Krizhevsky 2009), its own train and test parts",
        LAYOUT,
        _CLASSES,
        {"train": split(_TRAIN), "test": split(("test_batch",))},
    )


def _files(source: Path) -> dict[str, bytes]:
    """The batch files by base name, from the archive or the directory."""
    stems = (*_TRAIN, "test_batch")
    wanted = {*stems, *(f"{stem}.bin" for stem in stems)}
    files: dict[str, bytes] = {}

    def keep(name: str, size: int, read: Callable[[], bytes]) -> None:
        if size > _MAX_FILE:
            raise UserError(f"{source}: {name} has {size} bytes; a batch has about 30 million")
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
            raise UserError(f"{source}: is missing; --source takes CIFAR-10's archive or directory")
    except BROKEN as error:
        raise UserError(
            f"{source}: not a whole archive ({reason(error)}); fetch it again"
        ) from None
    return files


def _binary(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + 3 * 32 * 32
    if not data or len(data) % record:
        raise UserError(f"{where}: {len(data)} bytes, not a multiple of {record}; fetch it again")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    return _checked(records[:, 1:], records[:, 0], where)


def _python(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = read_plain_pickle(data, where=where)
    x = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get("labels") if isinstance(batch, dict) else None
    if not (
        isinstance(x, np.ndarray)
        and isinstance(labels, list)
        and x.shape == (len(labels), 3 * 32 * 32)
        and all(type(label) is int and 0 <= label <= 255 for label in labels)
    ):
        raise UserError(
            f"{where}: expected 'data' (N, 3072) and N integer 'labels'; this is not a batch of "
            "CIFAR-10's python archive"
        )
    return _checked(x, np.array(labels, dtype=np.uint8), where)


def _checked(x: np.ndarray, label: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    if len(label) == 0 or label.max() > 9:
        raise UserError(
            f"{where}: {len(label)} labels, of which some are not 0 to 9; is it CIFAR-10?"
        )
    return x.reshape(-1, 3, 32, 32), label
