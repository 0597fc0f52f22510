"""How long the learner waits for negatives, and what the workers did in the meantime."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ebm_dist.controller.workers.load import LoadQueue


@dataclass(frozen=True, slots=True)
class Load:
    """Shares of a stretch of time, in [0, 1]."""

    learner_wait: float
    """Of it, what the learner waited for negatives."""
    worker_idle: float
    """Of the workers' time, what they had no round."""
    idle_in_wait: float
    """The same of the time that the learner waited: workers that more of would be of no use."""


@dataclass(frozen=True, slots=True)
class _Sums:
    time: float
    waited: float
    served: float
    idle: float
    served_in_wait: float
    idle_in_wait: float


class Utilisation:
    """Adds up waits, the one that is still going on included."""

    def __init__(self, seats: LoadQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self._seats = seats
        self._clock = clock
        self._began: tuple[float, float, float] | None = None
        self._waited = self._served_in_wait = self._idle_in_wait = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self._began = (self._clock(), *self._seats.seconds())
        try:
            yield
        finally:
            sums = self.sums()
            self._began = None
            self._waited = sums.waited
            self._served_in_wait, self._idle_in_wait = sums.served_in_wait, sums.idle_in_wait

    def sums(self) -> _Sums:
        """Everything so far, in seconds; those of workers summed over them."""
        now, (served, idle) = self._clock(), self._seats.seconds()
        began = self._began or (now, served, idle)
        return _Sums(
            time=now,
            waited=self._waited + now - began[0],
            served=served,
            idle=idle,
            served_in_wait=self._served_in_wait + served - began[1],
            idle_in_wait=self._idle_in_wait + idle - began[2],
        )


def load_between(before: _Sums, after: _Sums) -> Load:
    def share(part: str, whole: str) -> float:
        total = getattr(after, whole) - getattr(before, whole)
        return (getattr(after, part) - getattr(before, part)) / total if total > 0 else 0.0

    return Load(
        learner_wait=share("waited", "time"),
        worker_idle=share("idle", "served"),
        idle_in_wait=share("idle_in_wait", "served_in_wait"),
    )
