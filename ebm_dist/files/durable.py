"""Atomic and durable writes of files and directories: they survive a power failure, or do not
appear at all."""

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
"""Names of existing files that the output of a command may not replace."""
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""Errors of file systems that do not support a call: CIFS, FUSE, Lustre, some NFS."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, which replaces `path` when the block ends without an exception.

    A reader sees either the old content or the new. After an exception the old content remains, and
    no temporary file.

    Raises:
        NotRegular: `path` is a directory, FIFO or device.
        OSError: the write fails.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise NotRegular(f"{path}: expected a file, found a directory, FIFO or device")
    part = _beside(path, "part")
    # Exclusive creation: no one else can have put a link at this name.
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


def link_or_copy(file: Path, target: Path) -> None:
    """Make `target` a hard link to `file`, or a copy on a file system without them."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def replace_text(path: Path, text: str) -> None:
    """Make `text` the content of `path`, in UTF-8 whatever the locale."""
    with replacing(path) as file:
        file.write(text.encode(errors="replace"))  # a lone surrogate has no encoding


def write_output(path: Path, text: str) -> None:
    """Write the output of a command to `path`, from --out, and create its parent directories.

    Raises:
        UserError: the write fails, and leaves no file behind; or `path` is a file of a run.
    """
    if path.name in _OF_A_RUN and path.exists():
        raise UserError(f"--out: {path} is a file that a run or an export needs; name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error.strerror or error})") from None


@contextlib.contextmanager
def new_directory(final: Path, *, replace: bool, family: str | None = None) -> Iterator[Path]:
    """A temporary directory, renamed to `final` when the block ends without an exception.

    Its files are synced to disk before the rename.

    Args:
        replace: whether it may replace a directory that is not empty.
        family: a pattern of names; the name of `final` when left out. Temporary directories that
            killed writers of such names left beside `final` are removed.
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
                path.chmod(mode)  # safetensors creates files readable by their owner only
                sync(path)
            sync(part)
            _install(part, final, replace)
            # Removed last: a writer killed earlier leaves its lock, which marks the directory as
            # abandoned for the next writer.
            (final / _LOCK).unlink()
        sync(final.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for path in _siblings(final, family, "old"):
        shutil.rmtree(path, ignore_errors=True)


def refuse_link(path: Path) -> None:
    """Raise `NotRegular` if `path` is a link, which a new directory would replace."""
    if path.is_symlink():
        raise NotRegular(f"{path}: is a link; name the directory that it leads to, or remove it")


def lock(file: IO[bytes]) -> bool | None:
    """Take the exclusive lock of `file`, until it is closed.

    Returns:
        True on success, False if another process holds it, None if the file system has no locks.
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
    """Sync `path` to disk: the content of a file, or the entries of a directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a directory that we may write and not read
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Without fsync a rename may not be durable; checksums detect files torn by a crash.
        if error.errno not in _UNSUPPORTED:
            raise


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:8]}.{kind}")


def _siblings(final: Path, family: str, kind: str) -> list[Path]:
    """Temporary directories of `new_directory` beside `final`, for names that match `family`."""
    ours = re.compile(rf"\.(?:{family})\.[0-9a-f]{{8}}\.{kind}")
    with contextlib.suppress(OSError):
        return [path for path in final.parent.iterdir() if ours.fullmatch(path.name)]
    return []


def _lock_new_directory(final: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary directory beside `final`, and its lock, which is held.

    Before the lock exists, another writer may consider the directory abandoned and remove it; then
    this function tries again.
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
    """Whether the writer of `part` is dead, so that its lock is free. False without file locks."""
    try:
        with (part / _LOCK).open("rb+") as file:
            return lock(file) is True
    except FileNotFoundError:
        return True  # the writer was killed before it made the lock
    except OSError:
        return False


def _install(part: Path, final: Path, replace: bool) -> None:
    """Rename `part` to `final`. With `replace` an existing `final` is moved aside first, because a
    rename replaces empty directories only."""
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
