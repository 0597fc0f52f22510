"""MNIST and Fashion-MNIST, from their IDX files."""

from __future__ import annotations

import contextlib
import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.format.manifest import SplitName
from ebm_dist.data.sources.original import Original, Samples, of_arrays

DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the IDX files."""

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


def load(name: str, directory: Path | None) -> Original:
    """The IDX files of `directory`, gzipped or plain. The files do not tell the two sets apart."""
    if directory is None:
        raise UserError(
            f"{name}: needs --source, the directory of its four IDX files (train-images-idx3-ubyte "
            "and so on, gzipped or plain)"
        )

    def split(stem: str) -> Samples:
        images = _read_idx(directory, f"{stem}-images-idx3-ubyte", num_dims=3)
        labels = _read_idx(directory, f"{stem}-labels-idx1-ubyte", num_dims=1)
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max() > 9:
            raise UserError(
                f"{directory}: {stem} has images {images.shape} and labels {labels.shape} up to "
                f"{labels.max()}; expected N images of 28x28 and N labels 0 to 9; fetch them again"
            )
        return of_arrays(images[:, None], labels)

    law, classes = _SETS[name]
    splits: dict[SplitName, Samples] = {"train": split("train"), "test": split("t10k")}
    return Original(name, f"{law}, its own train and test parts", LAYOUT, classes, splits)


def _read_idx(directory: Path, stem: str, *, num_dims: int) -> np.ndarray:
    """A uint8 IDX file, gzipped or plain: 0, 0, 8, dimensions, big-endian sizes, bytes."""
    # torchvision and the set's own page write `-idx3`, Kaggle's copies `.idx3`.
    names = [stem, stem.replace("-idx", ".idx")]
    found = [
        directory / f"{name}{suffix}"
        for name in names
        for suffix in ("", ".gz")
        if (directory / f"{name}{suffix}").is_file()
    ]
    if not found:
        raise UserError(
            f"{directory / stem}: is missing, and so is {stem}.gz; point --source at the directory "
            "of the IDX files (Debian has Fashion-MNIST's: `apt-get install dataset-fashion-mnist`)"
        )
    # A download that was cut may lie beside the whole file.
    for path in found[:-1]:
        with contextlib.suppress(UserError):
            return _parse_idx(path, num_dims)
    return _parse_idx(found[-1], num_dims)


def _parse_idx(path: Path, num_dims: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * num_dims)
            if len(header) < 4 + 4 * num_dims or header[:4] != bytes([0, 0, 8, num_dims]):
                raise ValueError(f"its header is {header[:4].hex()}, not 000008{num_dims:02x}")
            shape = struct.unpack(f">{num_dims}I", header[4:])
            size = int(np.prod([int(n) for n in shape], dtype=object))
            if not 0 < size <= 2**30:
                raise ValueError(f"it claims {size} bytes")
            # One byte more than claimed, so that a longer file shows and a bomb does not unfold.
            data = stream.read(size + 1)
            if len(data) != size:
                raise ValueError(f"it claims {size} bytes and holds {min(len(data), size + 1)}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: not a whole IDX file ({error}); fetch it again") from None
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
