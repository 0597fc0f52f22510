"""The shared memory of a run on a node: a directory in /dev/shm that no single process owns.

A shard maps its chains there. So they outlive its process, and the workers of the node read and
write them in place. The system never removes such files, so the runs do:

- Every part of the run on the node holds a shared lock on the directory while it lives; the kernel
  releases the lock of a process that dies. So the files of a killed shard remain until its
  successor starts, as long as any part of the node lives.
- Every part that starts, of any run of this user, removes the directories that no process has
  locked: they belong to killed drivers, or to nodes that Ray has declared dead.
- At the end of a run, one part on each node removes the directory, because the driver cannot reach
  the memory of other nodes.

One case remains: all parts of a run on a node die at once, and another run of the user starts a
part there before the first successor does, which takes seconds. The chains then return to the last
checkpoint, as after the loss of a node, and the log says how many. A further process on each node
to hold the lock would not help: it can be killed too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ebm_dist.files.private import open_private

ROOT = Path("/dev/shm")

OWNER_S = 10.0
"""Seconds for which a shard waits for its predecessor to release the files. A process that Ray
reports as dead has ended, unless its node could not be reached for a while."""


class NotMapped(Exception):
    """Chains cannot be in shared memory, so they are in the memory of the shard's process."""


@dataclass(frozen=True, slots=True)
class RunMemory:
    """Names the directories of one attempt at a run, one on each node."""

    run: str
    attempt: str
    """Unique to the attempt, so that files of an earlier attempt are never used."""

    def hold(self, node: str, reserve: int = 0) -> NodeMemory:
        """Make the directory of `node`, and hold its lock as long as this process lives.

        Args:
            node: this node; part of the name, because the nodes of a test may share one /dev/shm.
            reserve: bytes that must remain free.
        """
        if not ROOT.is_dir():
            return NodeMemory(trouble=f"there is no {ROOT}")
        remove_abandoned()
        path = ROOT / f"{_prefix()}{self.run}-{self.attempt}-{node[:12]}"
        while True:
            try:
                with contextlib.suppress(FileExistsError):
                    path.mkdir(mode=0o700)
                descriptor = open_private(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                return NodeMemory(trouble=f"{path}: {error.strerror}")
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            # Another process may have removed it before it was locked.
            if _is_at(descriptor, path):
                return NodeMemory(path, descriptor, reserve=reserve)
            os.close(descriptor)


class NodeMemory:
    """The locked directory of a run on this node."""

    def __init__(
        self,
        path: Path | None = None,
        descriptor: int = -1,
        *,
        reserve: int = 0,
        trouble: str = "",
    ) -> None:
        """
        Args:
            path: None if there is no directory, for the reason in `trouble`.
            descriptor: the open directory, which has the lock.
        """
        self.path = path
        self._descriptor = descriptor
        self._reserve = reserve
        self._trouble = trouble
        self._owned: list[int] = []

    def claim(self, name: str, num_bytes: int) -> Path:
        """The subdirectory `name`, for `num_bytes` of this process alone.

        It has the files of the previous owner, if there was one.

        Raises:
            NotMapped: too little memory is free, or the previous owner is still alive.
        """
        if self.path is None:
            raise NotMapped(self._trouble)
        path = self.path / name
        self._own(self.path / f"{name}.owner")
        if not path.exists():
            # Checked before writing: in a full /dev/shm, a write to a sparse file kills the writer,
            # which may be Ray, whose object store grows over time.
            found = os.statvfs(self.path)
            free = found.f_bavail * found.f_frsize
            if free < num_bytes + self._reserve:
                # Does not name the free bytes, so that equal shards log equal lines.
                raise NotMapped(
                    f"{ROOT} has no room for {-(-num_bytes >> 20)} MiB beside the "
                    f"{self._reserve >> 20} MiB that Ray's objects may take"
                )
        return path

    def _own(self, lock: Path) -> None:
        deadline = time.monotonic() + OWNER_S
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NotMapped(f"{lock}: {error.strerror}") from None
        while not _locks(descriptor):
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise NotMapped(f"{lock} is still held by the process before")
            time.sleep(0.02)
        self._owned.append(descriptor)

    def remove(self) -> None:
        """Remove this directory, even if others hold it, and all that no process holds."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            remove_abandoned()

    def close(self) -> None:
        """Release all locks."""
        for descriptor in self._owned:
            os.close(descriptor)
        self._owned.clear()
        if self.path is not None:
            os.close(self._descriptor)
            self.path = None


def remove_abandoned() -> None:
    """Remove the directories of this user's runs on this node that no process has locked."""
    for path in ROOT.glob(_prefix() + "*"):
        with contextlib.suppress(OSError):  # of another user, or removed meanwhile
            descriptor = open_private(path)
            if _locks(descriptor) and _is_at(descriptor, path):
                shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)


def _prefix() -> str:
    return f"ebm_dist-{os.geteuid()}-"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _locks(descriptor: int) -> bool:
    """Take the exclusive lock; False if another process has a lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
