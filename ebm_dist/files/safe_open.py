"""Opens files of a run directory that another person may have written: regular files, never links.

Through a link, a run could overwrite, or a report could publish, files of the user that the
author of the directory cannot access. A FIFO or a device could block the reader for ever. Files may
belong to another user, so that shared directories work.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedRandom, BufferedReader, FileIO
from pathlib import Path

from ebm_dist.core.errors import UserError


class NotRegular(OSError, UserError):
    """A link, FIFO, device or directory was found in place of a file of a run."""


def open_to_read(path: str | os.PathLike[str], *, follow: bool = False) -> BufferedReader:
    """Open the regular file at `path` for reading.

    Args:
        follow: allow links, for a path that the user has given.

    Raises:
        NotRegular, OSError: it is not a regular file, or cannot be opened.
    """
    return open(_descriptor(path, os.O_RDONLY, follow), "rb")


def open_to_append(path: str | os.PathLike[str]) -> FileIO:
    """Open or create the regular file at `path`, unbuffered: writes reach the kernel at once."""
    return open(_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab", buffering=0)


def open_to_repair(path: str | os.PathLike[str]) -> BufferedRandom:
    """Open the regular file at `path` for reading and writing at any position."""
    return open(_descriptor(path, os.O_RDWR), "rb+")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of the regular file at `path`."""
    with open_to_read(path) as file:
        return file.read()


def sha256(path: str | os.PathLike[str], *, follow: bool = False) -> str:
    """The SHA-256 of the regular file at `path`, in hexadecimal; `follow` as in `open_to_read`."""
    with open_to_read(path, follow=follow) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_directory(path: Path) -> None:
    """Create the directory `path` of a run, unless it exists; a link to one is refused."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise NotRegular(
            f"{path}: is a link, and a run writes into directories of its own alone; put the "
            "directory itself in its place, or the whole run elsewhere with --run-dir"
        )


def _descriptor(path: str | os.PathLike[str], flags: int, follow: bool = False) -> int:
    # Without O_NONBLOCK, opening a FIFO would wait for its other end.
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotRegular(f"{path}: is a link; put the file itself in its place") from None
        if error.errno == errno.ENXIO:
            raise _no_file(path, "FIFO or socket") from None
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (status.st_nlink <= 1 or flags & os.O_ACCMODE == 0):
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise NotRegular(
            f"{path}: has a second name (a hard link), whose content a run would change; put a "
            "copy in its place"
        )
    raise _no_file(path, "directory" if stat.S_ISDIR(status.st_mode) else "FIFO or device")


def _no_file(path: str | os.PathLike[str], what: str) -> NotRegular:
    return NotRegular(f"{path}: is a {what}, expected a file")
