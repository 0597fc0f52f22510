"""Where a Ray of this user's keeps its sessions: where nobody else can enter.

Ray makes its own directories, and the sockets in them, writable by everybody, and its token does
not guard the sockets: another user could put one in the place of the raylet's. So they lie below a
directory of mode 700. `launch/local.sh` does the same.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from ebm_dist.core.errors import UserError
from ebm_dist.files.private import is_private, scratch

MAX_SOCKET_PATH = 107 if sys.platform.startswith("linux") else 103
"""Bytes of a Unix socket's path."""
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path below the directory."""


def temp_root() -> Path:
    """Where Ray keeps its sessions if it is told nothing else."""
    on_linux = os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    return Path(os.environ.get("RAY_TMPDIR") or on_linux or "/tmp")


def private_temp_dir() -> Path:
    """A directory for Ray's sessions that others cannot enter.

    Raises:
        UserError: there is none, or its path is too long for Ray's sockets.
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
    """Address of the Ray that this user (or root) started last here; empty if none is noted.

    Everybody may leave such a note in Ray's usual directory, and would be shown the token.
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
