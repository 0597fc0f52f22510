"""The private directory in which a local Ray keeps its sessions.

Ray makes its directories and the sockets in them writable by all users, and its token does not
protect the sockets: another user could replace that of the raylet. So they lie below a directory of
mode 700. `launch/local.sh` does the same.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from ebm_dist.core.errors import UserError
from ebm_dist.files.private import is_private, scratch

MAX_SOCKET_PATH = 107 if sys.platform.startswith("linux") else 103
"""Maximum length of a Unix socket's path, in bytes."""
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path of a socket below the directory."""


def temp_root() -> Path:
    """Ray's default parent directory of its sessions."""
    on_linux = os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    return Path(os.environ.get("RAY_TMPDIR") or on_linux or "/tmp")


def private_temp_dir() -> Path:
    """A directory for Ray's sessions that only this user can enter.

    Raises:
        UserError: it cannot be created, or its path is too long for Ray's sockets.
    """
    root = temp_root().absolute()
    private = root if is_private(root) else root / f"ebm_dist-{os.geteuid()}"
    length = len(os.fsencode(private)) + len(SOCKET)
    if length > MAX_SOCKET_PATH:
        key = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
        raise UserError(
            f"{key}: {root} is too long: the path of a socket would have {length} characters, and "
            f"{MAX_SOCKET_PATH} are possible; set RAY_TMPDIR to a shorter directory, such as /tmp"
        )
    return (private if private == root else scratch(root)) / "ray"


def noted_cluster() -> str:
    """Address of the Ray that this user (or root) started last here; empty if there is none.

    Ray notes it in a file. Notes of other users are ignored: this process would send them the
    token.
    """
    root = temp_root()
    for directory in (root / f"ebm_dist-{os.geteuid()}", root):
        try:
            path = directory / "ray" / "ray_current_cluster"
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        with open(descriptor) as note:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.geteuid()):
                return note.read(300).strip()
    return ""
