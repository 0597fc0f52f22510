"""No wait without an end: what is waited for is a queue, which somebody should fill."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ebm_dist.cluster.backend import Backend, Handle, PartDied, Ref, T
from ebm_dist.core.errors import RunFailed


@dataclass(frozen=True, slots=True)
class Queue:
    """Something that the run waits to find an entry in."""

    name: str
    filled_by: str
    remedy: str


WORKERS = Queue(
    "the queue of workers that hold weights",
    "Ray, which starts them",
    "free resources for runtime.cpus_per_worker, or lower workers.num_workers",
)
NEGATIVES = Queue(
    "the queue of committed negatives",
    "the workers",
    "lower sampler.num_steps or workers.num_chains if they are only slow",
)
FREE_CHAINS = Queue(
    "the queue of free chains",
    "the learner, and leases that expire (buffer.lease_timeout_s)",
    "raise buffer.capacity",
)
LATE_ROUNDS = Queue(
    "the queue of rounds that flow.max_steps_per_update leaves no steps to repair or replace",
    "the workers that hold them",
    "raise flow.max_steps_per_update or flow.max_lag",
)
SPARE_STEPS = Queue(
    "the MCMC steps that flow.min_steps_per_update asks for",
    "the workers",
    "lower flow.min_steps_per_update, or raise workers.max_workers",
)
CREDITS = Queue(
    "the credits for further rounds",
    "the learner's updates",
    "raise flow.max_lag; if it does not help, this is a fault of ebm_dist",
)
DELIVERY = Queue(
    "the object stores of the learner ranks' nodes",
    "the shards' nodes, over the network",
    "raise flow.stall_timeout_s if the network is only slow",
)


HALT_CHECK_S = 1.0
"""Longest time for which a wait does not check whether the run is to end."""


class Stalled(RunFailed):
    """A queue stayed as it was for flow.stall_timeout_s."""

    def __init__(self, queue: Queue, timeout_s: float, detail: str) -> None:
        super().__init__(
            f"{detail}: nothing came into {queue.name} for {timeout_s:.0f} s "
            f"(flow.stall_timeout_s); it is filled by {queue.filled_by}; {queue.remedy}"
        )
        self.queue = queue


class Watchdog:
    """Raises once nothing has changed for the whole of its time."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._since = clock()
        self._seen: Hashable = None

    def look(
        self,
        state: Hashable,
        blocked: Callable[[], tuple[Queue, str]],
        mend: Callable[[float], bool] = lambda seconds: False,
    ) -> None:
        """Take note of `state`, anything that changes whenever there is progress.

        Args:
            blocked: says which queue it is, and what was waited for.
            mend: replaces what has hung for so many seconds, before the run is given up.

        Raises:
            Stalled: it has been the same for too long.
        """
        now = self._clock()
        if state != self._seen:
            self._seen, self._since = state, now
        elif now - self._since > self._timeout_s and not mend(self._timeout_s):
            raise Stalled(blocked()[0], self._timeout_s, blocked()[1])


def answer(backend: Backend, part: Handle, ref: Ref[T], timeout_s: float, detail: str) -> T:
    """The value of `ref`, which `part` was asked for.

    Raises:
        PartDied: it is gone; or it gave no answer in time, which ends it.
        Halted: the run is to end.
    """
    began = time.monotonic()
    # One call where the answer is there, as it mostly is. Where it is not, it is not asked for its
    # value again: what had come of it by then, from another node, would have to come anew.
    with contextlib.suppress(TimeoutError):
        return backend.get(ref, min(HALT_CHECK_S, timeout_s))
    while (left := began + timeout_s - time.monotonic()) > 0:
        backend.halt.check(began)
        if backend.wait([ref], min(HALT_CHECK_S, left)):
            break
    with contextlib.suppress(TimeoutError):
        return backend.get(ref, max(left, HALT_CHECK_S))
    backend.kill(part)
    raise PartDied(
        f"{detail}: {part.name} gave no answer for {timeout_s:.0f} s (flow.stall_timeout_s)"
    )
