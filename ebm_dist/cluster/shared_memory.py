"""What the parts of a run have in common on a node: a directory in memory that no process owns.

A shard maps its chains there. So they outlive its process, and workers of the node read and write
them where they lie. Nobody but us ever removes such files:

- Every part of the run on the node, whatever it does, holds a shared lock on the directory for as
  long as it lives; the kernel drops the lock of a process that dies. So the others keep the files
  of a shard that was killed until its successor is there.
- Whoever starts on the node, of whatever run of this user, removes the directories that nobody
  holds: those of drivers that were killed, and of nodes that Ray had given up.
- At the end of a run one part on each node removes the directory for the driver, which does not
  reach the memory of others.

One case is left open: all parts of a run on a node die at once, and before the first successor is
up, within seconds, another run of the user starts something there. The chains then go back to the
last checkpoint, as they do with a lost node, and the log says how many. A process on each node that
does nothing but hold the lock would not close it: it can be killed like the others.
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
"""How long a shard waits for the process before it to let go of its files. What Ray calls dead has
ended; the process on a node that could not be reached for a while may live on."""


class NotMapped(Exception):
    """Why chains cannot lie in shared memory; they lie in the memory of the process then."""


@dataclass(frozen=True, slots=True)
class RunMemory:
    """Names the directories of one attempt at a run, one on each node."""

    run: str
    attempt: str
    """Another one for each: what an earlier attempt left behind is not the state to go on from."""

    def hold(self, node: str, reserve: int = 0) -> NodeMemory:
        """Make the directory of `node`, this machine, and hold it as long as this process lives.

        Args:
            node: is in the name, since the nodes of a test may have one memory between them.
            reserve: bytes that must stay free beside what is mapped.
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
            # Before it was locked it may have been taken for abandoned.
            if _is_at(descriptor, path):
                return NodeMemory(path, descriptor, reserve=reserve)
            os.close(descriptor)


class NodeMemory:
    """The directory of a run on this node, held."""

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
            path: None where there is none, for the reason in `trouble`.
            descriptor: has the lock.
        """
        self.path = path
        self._descriptor = descriptor
        self._reserve = reserve
        self._trouble = trouble
        self._owned: list[int] = []

    def claim(self, name: str, num_bytes: int) -> Path:
        """The directory `name` in this one, for this process alone to keep `num_bytes` in.

        The process that had it before leaves it behind as it was.

        Raises:
            NotMapped: there is no room, or that process still lives.
        """
        if self.path is None:
            raise NotMapped(self._trouble)
        path = self.path / name
        self._own(self.path / f"{name}.owner")
        if not path.exists():
            # Looked at first: a file of holes in a memory that is full kills whoever writes to it,
            # and the other who does is Ray, whose object store fills up bit by bit.
            found = os.statvfs(self.path)
            free = found.f_bavail * found.f_frsize
            if free < num_bytes + self._reserve:
                # Without what is free: it changes, and shards of one size are to say one thing.
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
        """Remove the directory, whoever else holds it; and those that nobody holds any more."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            remove_abandoned()

    def close(self) -> None:
        """Let go of it, as the end of the process would."""
        for descriptor in self._owned:
            os.close(descriptor)
        self._owned.clear()
        if self.path is not None:
            os.close(self._descriptor)
            self.path = None


def remove_abandoned() -> None:
    """Remove the directories of this user's runs on this node that no process holds."""
    for path in ROOT.glob(_prefix() + "*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone by now
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
    """Take the lock for this process alone, unless another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
