"""The workers as processes: they join, are given weights, are replaced when they die, and leave."""

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
from ebm_dist.controller.rounds.round import MAX_ATTEMPTS, MAX_STARTS
from ebm_dist.controller.workers.load import LoadQueue, Seat
from ebm_dist.core.errors import RunFailed

log = logging.getLogger("ebm_dist.run")


class WorkerPool:
    """Opens a seat when its process holds weights, and closes it before the process ends."""

    def __init__(
        self,
        backend: Backend,
        *,
        start_timeout_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            start_timeout_s: a worker that does not hold weights by then is given up.
        """
        self._backend = backend
        self._spawn: Callable[[int], WorkerClient] | None = None
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self.weights: Ref[np.ndarray] | None = None
        self.version = -1
        self.seats = LoadQueue(clock)
        self._next_index = 0
        self.arriving: dict[Ref[int], Seat] = {}
        """Seats whose process has been sent weights, by the reference of its answer."""
        self._empty_handed: list[Seat] = []
        """Newcomers whose weights were lost on the way; the next ones are sent to them."""

    def start(self, num: int, spawn: Callable[[int], WorkerClient]) -> None:
        """Start the first `num`.

        Args:
            spawn: starts a process for the worker of that number, the first time and later on.
        """
        self._spawn = spawn
        for _ in range(num):
            self.join(spawn(self._next_index))

    def __iter__(self) -> Iterator[WorkerClient]:
        """Those there are, the ones that start or leave included."""
        return (seat.worker for seat in self.seats)

    @property
    def handles(self) -> list[Handle]:
        return [worker.handle for worker in self]

    def start_again(self, dead: Handle) -> None:
        """Another process for a worker that died before the run began."""
        self._renew(next(seat for seat in self.seats if seat.worker.handle is dead))

    def set_weights(self, weights: Ref[np.ndarray], version: int) -> None:
        """Weights of the rounds started from now on.

        Raises:
            ValueError: `version` is older than the last.
        """
        if version < self.version:
            raise ValueError(f"weights of version {version} after version {self.version}")
        first, self.weights, self.version = self.version < 0, weights, version
        if first:
            for seat in self.seats:
                seat.since = self._clock()  # what came before them was the start of the run
                self._send_weights(seat)
        while self._empty_handed:
            self._send_weights(self._empty_handed.pop())

    @property
    def next_index(self) -> int:
        """Number of the next worker that joins; none is given twice."""
        return self._next_index

    def join(self, worker: WorkerClient) -> None:
        """A newcomer; it serves from when it holds weights."""
        seat = self.seats.add(self._next_index, worker)
        self._next_index += 1
        self._send_weights(seat)

    def retire(self, seat: Seat) -> None:
        """Give `seat` no more rounds, and let it go when it has finished those that it has."""
        self._forget(seat)
        self.seats.close(seat, "retiring")
        self.release_if_done(seat)

    def release_if_done(self, seat: Seat) -> None:
        """End the process of a worker that is to leave and has no round any more."""
        if seat.state == "retiring" and seat.load == 0 and seat in self.seats:
            self._remove(seat)

    def welcome(self, ref: Ref[int]) -> tuple[Seat, str] | None:
        """The answer `ref` of a newcomer is there: open its seat.

        Returns:
            The seat of a newcomer that died or failed instead, and why.
        """
        seat = self.arriving.pop(ref)
        try:
            self._backend.get(ref, timeout=30.0)
        except PartDied as died:
            # The weights may be what is lost, with their node or with the rank that was to send
            # them: then the newcomer is well.
            if not isinstance(died, ObjectLost) and not self._backend.alive(seat.worker.handle):
                return seat, f"it did not live to hold weights: {died}"
            self._empty_handed.append(seat)
            return None
        except Exception as error:
            if (fault := fault_of_the_machine(error)) is None:
                raise
            return seat, f"it could not take the weights: {fault}"
        seat.num_starts = 0
        self.seats.open(seat)
        return None

    def send_again(self) -> None:
        """Send the weights to the newcomers that still wait for some that are lost."""
        for ref, seat in list(self.arriving.items()):
            assert seat.sent is not None
            if seat.sent is not self.weights and self._backend.lost(seat.sent):
                del self.arriving[ref]
                self._send_weights(seat)

    def give_up_the_overdue(self, now: float) -> None:
        """Do without the workers that Ray has not started by now."""
        for seat in list(self.arriving.values()):
            if now - seat.since > self._start_timeout_s:
                log.info(
                    f"{seat.worker.name} did not start in {self._start_timeout_s:.0f} s "
                    f"(runtime.start_timeout_s); {self.seats.num_serving} workers go on without it"
                )
                self._remove(seat)

    def replace(self, seat: Seat, why: str) -> None:
        """Another process for a dead worker; none for one that was to leave.

        Raises:
            RunFailed: it died too often without a commit between, or while it started.
        """
        name, leaves = seat.worker.name, seat.state == "retiring"
        if seat.state == "starting":
            seat.num_starts += 1
        else:
            seat.failures += 1
        if seat.num_starts >= MAX_STARTS:
            raise RunFailed(
                f"{name} was started {MAX_STARTS} times in a row and died each time before it held "
                f"weights: {why}. If memory ran out, lower workers.num_workers"
            )
        if seat.failures > MAX_ATTEMPTS:
            raise RunFailed(f"{name} died {MAX_ATTEMPTS} times without finishing a round: {why}")
        heirs = "the others redo" if leaves else "another one redoes"
        log.info(f"{name} died ({why}); {heirs} its rounds")
        self.seats.load(seat, -seat.load)
        if leaves:
            self._remove(seat)
            return
        self._forget(seat)
        self._renew(seat)
        self._send_weights(seat)

    def _renew(self, seat: Seat) -> None:
        assert self._spawn is not None
        self._backend.kill(seat.worker.handle)
        self.seats.renew(seat, self._spawn(seat.index))

    def _send_weights(self, seat: Seat) -> None:
        if self.weights is not None:
            seat.sent = self.weights
            self.arriving[seat.worker.hold(self.weights, self.version)] = seat

    def _remove(self, seat: Seat) -> None:
        self._forget(seat)
        self.seats.remove(seat)
        self._backend.kill(seat.worker.handle)

    def _forget(self, seat: Seat) -> None:
        if seat in self._empty_handed:
            self._empty_handed.remove(seat)
        self.arriving = {ref: other for ref, other in self.arriving.items() if other is not seat}
