"""Reads arrays of plain numbers from `.npy` and `.npz`; checks sizes before it allocates memory.

numpy's own loader is not used, since it trusts the sizes in a header and may unpickle.
"""

from __future__ import annotations

import io
import lzma
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ebm_dist.core.errors import UserError
from ebm_dist.files.safe_open import open_to_read

MAX_NPY_HEADER = 4096
"""Largest size of an npy header; numpy parses it as a Python literal, in quadratic time."""
MAX_NPZ_BYTES = 4 * 2**30
"""Largest size of all arrays of a .npz, uncompressed; a few megabytes could expand to more."""
_MAX_MEMBERS = 64


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    num_bytes: int

    @property
    def order(self) -> Any:
        return "F" if self.fortran else "C"


def read_npy(data: bytes, where: str) -> np.ndarray:
    """The array in `data`; raises UserError, which names `where`, if it is not plain numbers."""
    stream = io.BytesIO(data)
    header = _read_header(stream, len(data), where)
    flat = np.frombuffer(data, dtype=header.dtype, offset=stream.tell())
    return flat.reshape(header.shape, order=header.order)


def open_npy(path: Path) -> np.ndarray:
    """The array in the file `path`, memory-mapped, so that it may be larger than memory."""
    with open_to_read(path, follow=True) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        header = _read_header(file, size, str(path))
        if header.num_bytes == 0:  # an empty file cannot be mapped
            return np.empty(header.shape, header.dtype)
        start = file.tell()
        return np.memmap(file, header.dtype, "r", start, header.shape, order=header.order)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays in the file `path` by name."""
    try:
        with open_to_read(path, follow=True) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if len(members) > _MAX_MEMBERS or size > MAX_NPZ_BYTES:
                raise UserError(
                    f"{path}: {len(members)} arrays of {size} bytes unpacked; at most "
                    f"{_MAX_MEMBERS} of {MAX_NPZ_BYTES} are read; save larger ones as .npy"
                )
            return {
                member.filename.removesuffix(".npy"): _read_member(archive, member, path)
                for member in members
            }
    except UserError:
        raise
    # zipfile raises these for damage, encryption and unsupported compression.
    except (
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error),
        *(RuntimeError, NotImplementedError, ValueError),
    ) as error:
        raise UserError(f"{path}: not a whole .npz ({error}); write it by numpy.savez") from None


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    where = f"{path}: {member.filename}"
    with archive.open(member) as stream:
        header = _read_header(stream, member.file_size, where)
        # One byte more than claimed, because zipfile checks the checksum at the end of a member.
        data = stream.read(header.num_bytes + 1)
    if len(data) != header.num_bytes:
        raise UserError(f"{where}: is cut or damaged; write it again by numpy.savez")
    return np.frombuffer(data, header.dtype).reshape(header.shape, order=header.order)


def _read_header(stream: BinaryIO | Any, size: int, where: str) -> _Header:
    """The header of an array, which with its header has `size` bytes."""
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy format version {version}")
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(stream, max_header_size=MAX_NPY_HEADER)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{where}: not a readable .npy ({reason}); write it by numpy.save"
        ) from None
    if dtype.hasobject or dtype.kind not in "buif":
        raise UserError(
            f"{where}: .npy of dtype {dtype}, which is not plain numbers (object arrays are "
            "pickles and are never read); store uint8 or float32"
        )
    expected, follow = math.prod(shape) * dtype.itemsize, size - stream.tell()
    # Checked before memory is allocated: the header of a small file may claim terabytes.
    if min(shape, default=0) < 0 or expected != follow:
        raise UserError(
            f"{where}: .npy header claims shape {shape} of {dtype}, {expected} bytes, but "
            f"{follow} follow; the file is damaged, write it again"
        )
    return _Header(shape, fortran, dtype, expected)
