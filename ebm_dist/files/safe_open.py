"""Opening the files of a run directory, which may be a stranger's: regular files, never a link.

A link would have the run write over, or a report show, what its reader may see and its author may
not; a FIFO or a device would hold the reader up for ever. Shared directories stay possible: files
may belong to somebody else.
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
    """A link, FIFO, device or directory stands where a file of a run is expected."""


def open_to_read(path: str | os.PathLike[str], *, follow: bool = False) -> BufferedReader:
    """The regular file at `path`.

    Args:
        follow: links may lead to it, since the user named it himself.

    Raises:
        NotRegular, OSError: it is none, or cannot be opened.
    """
    return open(_descriptor(path, os.O_RDONLY, follow), "rb")


def open_to_append(path: str | os.PathLike[str]) -> FileIO:
    """The regular file at `path`, made if missing, unbuffered: a returned write is the kernel's."""
    return open(_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab", buffering=0)


def open_to_repair(path: str | os.PathLike[str]) -> BufferedRandom:
    """The regular file at `path`, as it is, to read and to write anywhere in it."""
    return open(_descriptor(path, os.O_RDWR), "rb+")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of the regular file at `path`."""
    with open_to_read(path) as file:
        return file.read()


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of the regular file at `path`."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_directory(path: Path) -> None:
    """Make the directory `path` of a run, unless it is there; a link to one will not do."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise NotRegular(
            f"{path}: is a link, and a run writes into directories of its own alone; put the "
            "directory itself in its place, or the whole run elsewhere with --run-dir"
        )


def _descriptor(path: str | os.PathLike[str], flags: int, follow: bool = False) -> int:
    # Without O_NONBLOCK the call itself would wait for the other end of a FIFO.
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
