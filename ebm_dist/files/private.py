"""Private directories of this user below shared ones such as /tmp and /dev/shm."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from ebm_dist.core.errors import UserError

ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_private(path: Path) -> int:
    """Open a directory that belongs to this user and is closed to others.

    Raises:
        OSError: `path` is anything else. In /tmp and /dev/shm any user may create any name, so the
            name proves nothing, and a link could lead anywhere.
    """
    descriptor = os.open(path, ENTER)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(descriptor)
        raise PermissionError(1, "belongs to another user or is open to others", str(path))
    return descriptor


def is_private(path: Path) -> bool:
    """Whether `path` is a directory that `open_private` accepts."""
    try:
        os.close(open_private(path))
    except OSError:
        return False
    return True


def own_directory(path: Path) -> Path:
    """Create `path` as a private directory of this user, unless it is one already.

    Raises:
        UserError: it cannot be created, or another user owns the name.
    """
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        descriptor = os.open(path, ENTER)
        try:
            # A directory that others could only read is made private. One that others could write
            # is refused below, since they may have written there.
            found = os.fstat(descriptor)
            if found.st_uid == os.geteuid() and not found.st_mode & 0o022:
                os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
        os.close(open_private(path))
    except OSError as error:
        raise UserError(
            f"{path}: expected a directory of this user's that nobody else may enter, but it "
            f"cannot be used ({error.strerror}); remove it, or set TMPDIR to a directory of yours"
        ) from None
    return path


def scratch(root: Path | None = None) -> Path:
    """This user's private directory below `root`; below the temporary directory when left out.

    Raises:
        UserError: see `own_directory`.
    """
    return own_directory((root or Path(tempfile.gettempdir())) / f"ebm_dist-{os.geteuid()}")
