"""The pool of worker processes: start, first weights, replacement after a death, retirement."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from ebm_dist.cluster.backend import (
    Backend,
    Handle,
    ObjectLost,
    PartDied,
    Ref,
    fault_of_the_machine,
)
from ebm_dist.controller.clients import WorkerClient
from ebm_dist.controller.retry import MAX_ATTEMPTS, MAX_STARTS
from ebm_dist.controller.workers.load import LoadQueue, Member
from ebm_dist.core.errors import RunFailed

log = logging.getLogger("ebm_dist.run")


class WorkerPool:
    """Starts, replaces and ends workers. A worker serves once it holds weights."""

    def __init__(
        self,
        backend: Backend,
        *,
        start_timeout_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            start_timeout_s: a worker without weights after this time is removed.
        """
        self._backend = backend
        self._spawn: Callable[[int], WorkerClient] | None = None
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self.weights: Ref[np.ndarray] | None = None
        self.version = -1
        self.members = LoadQueue(clock)
        self._next_index = 0
        self.loading: dict[Ref[int], Member] = {}
        """Members that were sent their first weights, by the reference of the answer."""
        self._without_weights: list[Member] = []
        """Members whose first weights were lost on the way; the next version goes to them."""

    def start(self, num: int, spawn: Callable[[int], WorkerClient]) -> None:
        """Start the first `num` workers.

        Args:
            spawn: starts a process for the worker of that number, also for a replacement.
        """
        self._spawn = spawn
        for _ in range(num):
            self.join(spawn(self._next_index))

    def __iter__(self) -> Iterator[WorkerClient]:
        """All workers, including those that start or retire."""
        return (member.worker for member in self.members)

    @property
    def handles(self) -> list[Handle]:
        return [worker.handle for worker in self]

    def start_again(self, dead: Handle) -> None:
        """Replace a worker that died before the run began."""
        self._renew(next(member for member in self.members if member.worker.handle is dead))

    def set_weights(self, weights: Ref[np.ndarray], version: int) -> None:
        """Set the weights of all rounds that start from now on.

        Raises:
            ValueError: `version` is older than the last.
        """
        if version < self.version:
            raise ValueError(f"weights of version {version} after version {self.version}")
        first, self.weights, self.version = self.version < 0, weights, version
        if first:
            for member in self.members:
                member.since = self._clock()  # the timeout does not cover the start of the run
                self._send_weights(member)
        while self._without_weights:
            self._send_weights(self._without_weights.pop())

    @property
    def next_index(self) -> int:
        """Number of the next worker that joins; no number is used twice."""
        return self._next_index

    def join(self, worker: WorkerClient) -> None:
        """Add a worker; it serves once it holds weights."""
        member = self.members.add(self._next_index, worker)
        self._next_index += 1
        self._send_weights(member)

    def retire(self, member: Member) -> None:
        """Give `member` no more rounds, and end its process when it has finished its own."""
        self._forget(member)
        self.members.stop(member, "retiring")
        self.release_if_done(member)

    def release_if_done(self, member: Member) -> None:
        """End the process of a retiring worker that has no round left."""
        if member.state == "retiring" and member.load == 0 and member in self.members:
            self._remove(member)

    def admit(self, ref: Ref[int]) -> tuple[Member, str] | None:
        """Let the member whose answer `ref` has arrived serve.

        Returns:
            The member and the reason, if it died or failed instead.
        """
        member = self.loading.pop(ref)
        try:
            self._backend.get(ref, timeout=30.0)
        except PartDied as died:
            # The weights may be lost, with their node or with the rank that should have sent
            # them, while the worker is alive.
            if not isinstance(died, ObjectLost) and not self._backend.alive(member.worker.handle):
                return member, f"it died before it held weights: {died}"
            self._without_weights.append(member)
            return None
        except Exception as error:
            if (fault := fault_of_the_machine(error)) is None:
                raise
            return member, f"it could not take the weights: {fault}"
        member.num_starts = 0
        self.members.serve(member)
        return None

    def send_again(self) -> None:
        """Send current weights to the members whose first weights are lost."""
        for ref, member in list(self.loading.items()):
            assert member.sent is not None
            if member.sent is not self.weights and self._backend.lost(member.sent):
                del self.loading[ref]
                self._send_weights(member)

    def remove_overdue(self, now: float) -> None:
        """Remove the workers that did not start in time."""
        for member in list(self.loading.values()):
            if now - member.since > self._start_timeout_s:
                log.info(
                    f"{member.worker.name} did not start in {self._start_timeout_s:.0f} s "
                    f"(runtime.start_timeout_s) and is given up; {self.members.num_serving} "
                    "workers serve"
                )
                self._remove(member)

    def replace(self, member: Member, why: str) -> None:
        """Start another process for a dead worker; remove one that was retiring.

        Raises:
            RunFailed: it died too often since its last commit, or while it started.
        """
        name, retiring = member.worker.name, member.state == "retiring"
        if member.state == "starting":
            member.num_starts += 1
        else:
            member.failures += 1
        if member.num_starts >= MAX_STARTS:
            raise RunFailed(
                f"{name} was started {MAX_STARTS} times in a row and died each time before it held "
                f"weights: {why}. If memory ran out, lower workers.num_workers"
            )
        if member.failures > MAX_ATTEMPTS:
            raise RunFailed(f"{name} died {MAX_ATTEMPTS} times without finishing a round: {why}")
        successor = "the other workers repeat" if retiring else "another process repeats"
        log.info(f"{name} died ({why}); {successor} its rounds")
        self.members.add_load(member, -member.load)
        if retiring:
            self._remove(member)
            return
        self._forget(member)
        self._renew(member)
        self._send_weights(member)

    def _renew(self, member: Member) -> None:
        assert self._spawn is not None
        self._backend.kill(member.worker.handle)
        self.members.renew(member, self._spawn(member.index))

    def _send_weights(self, member: Member) -> None:
        if self.weights is not None:
            member.sent = self.weights
            self.loading[member.worker.hold(self.weights, self.version)] = member

    def _remove(self, member: Member) -> None:
        self._forget(member)
        self.members.remove(member)
        self._backend.kill(member.worker.handle)

    def _forget(self, member: Member) -> None:
        if member in self._without_weights:
            self._without_weights.remove(member)
        self.loading = {ref: other for ref, other in self.loading.items() if other is not member}
