"""Reads IDX files, the format of MNIST and similar sets, gzipped or plain."""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.files.safe_open import open_to_read

MAX_BYTES = 2**30
"""Largest size of one file, uncompressed; EMNIST's largest has 550 MB."""


def read_first_whole(paths: Sequence[Path], *, num_dims: int) -> np.ndarray:
    """The first readable file of `paths`, since one may be a truncated download of the other."""
    for path in paths[:-1]:
        with contextlib.suppress(UserError):
            return read_idx(path, num_dims=num_dims)
    return read_idx(paths[-1], num_dims=num_dims)


def read_idx(path: Path, *, num_dims: int) -> np.ndarray:
    """The array of a uint8 IDX file: the bytes 0, 0, 8, the number of dimensions, sizes, data.

    Raises:
        UserError: the file is not IDX, is truncated, or has another number of dimensions.
    """
    try:
        with (
            open_to_read(path, follow=True) as file,
            gzip.open(file) if path.suffix == ".gz" else file as stream,
        ):
            header = stream.read(4 + 4 * num_dims)
            if len(header) < 4 + 4 * num_dims or header[:4] != bytes([0, 0, 8, num_dims]):
                raise ValueError(f"its header is {header[:4].hex()}, not 000008{num_dims:02x}")
            shape = struct.unpack(f">{num_dims}I", header[4:])
            size = math.prod(shape)
            if not 0 < size <= MAX_BYTES:
                raise ValueError(f"it claims {size} bytes")
            # One byte more than claimed detects a longer file without unpacking a gzip bomb.
            data = stream.read(size + 1)
            if len(data) != size:
                raise ValueError(f"it claims {size} bytes and holds {min(len(data), size + 1)}")
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: not a whole IDX file ({error}); fetch it again") from None
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
