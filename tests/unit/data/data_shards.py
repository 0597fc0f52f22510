"""Shards for the tests of `ebm_dist.data`: small, written by hand where the program would not."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ebm_dist.data import DataConfig, DataStream


def npy(x: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, x, allow_pickle=True)
    return stream.getvalue()


def png(x: np.ndarray, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(x).save(stream, format=form)
    return stream.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered_shards(directory: Path, counts: Iterable[int], *, event: int = 1) -> str:
    """Plain shards whose sample i is the vector (i, …, i); the brace pattern that names them."""
    number = 0
    counts = list(counts)
    for index, count in enumerate(counts):
        members = []
        for _ in range(count):
            members.append((f"{number:06d}.npy", npy(np.full(event, number, np.float32))))
            members.append((f"{number:06d}.cls", str(number % 3).encode()))
            number += 1
        write_tar(directory / f"{index:02d}.tar", members)
    if len(counts) == 1:
        return str(directory / "00.tar")
    return str(directory / f"{{00..{len(counts) - 1:02d}}}.tar")


def numbered_config(source: str, **changes: object) -> DataConfig:
    values = {"source": source, "batch_size": 4, "shuffle": 16, "prefetch": 0, **changes}
    return DataConfig.model_validate(values)


def take(stream: DataStream, num_batches: int, num: int) -> list[int]:
    """The numbers of the next samples of numbered shards."""
    return [
        int(value)
        for _ in range(num_batches)
        for value in stream.next_batch(num).x[:, 0].round().tolist()
    ]
