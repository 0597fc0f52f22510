"""Measures how long the learner waits for negatives, and how long workers are idle."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ebm_dist.controller.workers.load import LoadQueue


@dataclass(frozen=True, slots=True)
class Load:
    """Shares of an interval of time, in [0, 1]."""

    learner_wait: float
    """Share of the time that the learner waited for negatives."""
    worker_idle: float
    """Share of the workers' time that was idle, without a round."""
    idle_in_wait: float
    """Idle share of the workers' time while the learner waited; if high, more will not help."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of seconds up to `time`; those of workers are summed over workers."""

    time: float
    waited: float
    served: float
    idle: float
    served_in_wait: float
    idle_in_wait: float


class Utilisation:
    """Sums the learner's waits, including one in progress, and the workers' idle time."""

    def __init__(self, members: LoadQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self._members = members
        self._clock = clock
        self._began: tuple[float, float, float] | None = None
        self._waited = self._served_in_wait = self._idle_in_wait = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the context as a wait of the learner."""
        self._began = (self._clock(), *self._members.seconds())
        try:
            yield
        finally:
            sums = self.sums()
            self._began = None
            self._waited = sums.waited
            self._served_in_wait, self._idle_in_wait = sums.served_in_wait, sums.idle_in_wait

    def sums(self) -> _Sums:
        """All sums up to now."""
        now, (served, idle) = self._clock(), self._members.seconds()
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
    """The shares of the interval between two results of `Utilisation.sums`."""

    def share(part: str, whole: str) -> float:
        total = getattr(after, whole) - getattr(before, whole)
        return (getattr(after, part) - getattr(before, part)) / total if total > 0 else 0.0

    return Load(
        learner_wait=share("waited", "time"),
        worker_idle=share("idle", "served"),
        idle_in_wait=share("idle_in_wait", "served_in_wait"),
    )
