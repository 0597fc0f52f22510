"""Where the shards of one machine keep their chains: in memory that no process owns."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/dev/shm")


@contextlib.contextmanager
def slots_directory(run_dir: Path) -> Iterator[Path | None]:
    """A directory in shared memory for the time of a run; None where there is no such memory.

    Attempts that were killed leave theirs behind. Whoever comes next, of whatever run, removes
    those that nobody holds any more.
    """
    if not ROOT.is_dir():
        yield None
        return
    prefix = f"ebm_dist-{os.getuid()}-"
    for abandoned in ROOT.glob(prefix + "*"):
        if (lock := _hold(abandoned)) is not None:
            shutil.rmtree(abandoned, ignore_errors=True)
            os.close(lock)
    name = hashlib.blake2b(str(run_dir.absolute()).encode(), digest_size=6).hexdigest()
    path = ROOT / f"{prefix}{name}-{os.getpid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    lock = _hold(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _hold(path: Path) -> int | None:
    """A lock on the directory, which ends with this process; None if another one has it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
