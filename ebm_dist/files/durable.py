"""Files and directories that appear whole, and stay when the power fails, or do not appear."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ebm_dist.core.errors import UserError
from ebm_dist.files.safe_open import NotRegular

_LOCK = ".lock"
_OF_A_RUN = {
    *("config.yaml", "manifest.json", "metrics.jsonl", "histograms.jsonl", "run.log", _LOCK),
    *("config.json", "model.safetensors", "chains.safetensors", "checksums.json", "meta.json"),
}
"""Names that no output of another command may take from what is there."""
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""What file systems answer that do not know a call at all: CIFS, FUSE, Lustre, some NFS."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, which takes the place of `path` when the block ends without an exception.

    A reader sees the old content or the new. After an exception the old one is there, and nothing
    beside it.

    Raises:
        NotRegular: a directory, FIFO or device is in the way.
        OSError: the disk refuses.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise NotRegular(f"{path}: expected a file, found a directory, FIFO or device")
    part = _beside(path, "part")
    # O_EXCL: nobody can have laid a link where the new content goes.
    file = open(part, "xb")  # noqa: SIM115
    try:
        with file:
            yield file
            file.flush()
            _sync(file.fileno())
        part.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def replace_text(path: Path, text: str) -> None:
    """Make `text` the content of `path`, in UTF-8 whatever the locale."""
    with replacing(path) as file:
        file.write(text.encode(errors="replace"))  # half of a surrogate pair has no bytes


def write_output(path: Path, text: str, option: str = "--out") -> None:
    """Write what a command was asked for to `path`, its folders included.

    Raises:
        UserError: it cannot be written, and nothing is left there; or it is a run's own file.
    """
    if path.name in _OF_A_RUN and path.exists():
        raise UserError(f"{option}: {path} is a file that a run or an export needs; name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"{option}: cannot write {path} ({error.strerror or error})") from None


@contextlib.contextmanager
def new_directory(final: Path, *, replace: bool, family: str | None = None) -> Iterator[Path]:
    """A directory to fill, which becomes `final` when the block ends without an exception.

    Its files are on the disk before it has its name.

    Args:
        replace: whether it may take the place of another; else only that of an empty one.
        family: a pattern of names, that of `final` alone when left out. What killed writers of
            such directories left beside `final` is removed.
    """
    refuse_link(final)
    family = family or re.escape(final.name)
    for path in _siblings(final, family, "part"):
        if _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
    part, file = _lock_new_directory(final)
    try:
        with file:
            yield part
            mode = (part / _LOCK).stat().st_mode
            for path in part.iterdir():
                path.chmod(mode)  # safetensors makes its files for their owner alone
                sync(path)
            sync(part)
            _install(part, final, replace)
            # Only now: what is killed before has its lock, by which the next writer knows it.
            (final / _LOCK).unlink()
        sync(final.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for path in _siblings(final, family, "old"):
        shutil.rmtree(path, ignore_errors=True)


def refuse_link(path: Path) -> None:
    """Raise `NotRegular` where `path` is a link, in whose place a new directory would come."""
    if path.is_symlink():
        raise NotRegular(f"{path}: is a link; name the directory that it leads to, or remove it")


def lock(file: IO[bytes]) -> bool | None:
    """Take the exclusive lock of `file`, held until it is closed.

    Returns:
        False where another process has it, None where the file system knows no locks.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _UNSUPPORTED | {errno.ENOLCK}:
            return None
        raise
    return True


def sync(path: Path) -> None:
    """Have the file or the names in the directory `path` on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a directory in which we may write and not look
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # There a rename is as durable as it gets; checksums tell what a crash has torn.
        if error.errno not in _UNSUPPORTED:
            raise


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:8]}.{kind}")


def _siblings(final: Path, family: str, kind: str) -> list[Path]:
    """What `new_directory` made beside `final` for directories called `family`, a pattern."""
    ours = re.compile(rf"\.(?:{family})\.[0-9a-f]{{8}}\.{kind}")
    with contextlib.suppress(OSError):
        return [path for path in final.parent.iterdir() if ours.fullmatch(path.name)]
    return []


def _lock_new_directory(final: Path) -> tuple[Path, IO[bytes]]:
    """A new directory beside `final` and its lock, held.

    Another writer may take the directory for a dead one's until the lock is there; then it is
    made again.
    """
    while True:
        part = _beside(final, "part")
        part.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):
            file = (part / _LOCK).open("xb")
            if lock(file) is not False:
                return part, file
            file.close()


def _is_abandoned(part: Path) -> bool:
    """Whether its writer is dead: a living one holds the lock. Not known where there are none."""
    try:
        with (part / _LOCK).open("rb+") as file:
            return lock(file) is True
    except FileNotFoundError:
        return True  # killed before it had a lock
    except OSError:
        return False


def _install(part: Path, final: Path, replace: bool) -> None:
    """Rename `part` to `final`: a directory can only be renamed over an empty one."""
    if not replace or not final.exists():
        part.rename(final)
        return
    old = part.with_suffix(".old")
    final.rename(old)
    try:
        part.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)
