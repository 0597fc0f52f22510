"""Bounds every wait of a run: each waits for an entry of a queue, and reports if none comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ebm_dist.cluster.backend import Backend, Handle, PartDied, Ref, T
from ebm_dist.core.errors import RunFailed


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue for whose next entry the run waits."""

    name: str
    filled_by: str
    """The part that adds entries."""
    remedy: str
    """What to do if none comes."""


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
    """A queue received no entry for flow.stall_timeout_s."""

    def __init__(self, queue: Queue, timeout_s: float, detail: str) -> None:
        super().__init__(
            f"{detail}: nothing came into {queue.name} for {timeout_s:.0f} s "
            f"(flow.stall_timeout_s); it is filled by {queue.filled_by}; {queue.remedy}"
        )
        self.queue = queue


class Watchdog:
    """Raises `Stalled` if a state does not change for `timeout_s` seconds."""

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
        """Compare `state`, which changes with any progress, with that of the last call.

        Args:
            blocked: returns the queue and what the run waits for.
            mend: replaces parts that have hung for so many seconds; returns whether it has
                replaced any, and then the wait goes on.

        Raises:
            Stalled: the state has not changed for the timeout.
        """
        now = self._clock()
        if state != self._seen:
            self._seen, self._since = state, now
        elif now - self._since > self._timeout_s and not mend(self._timeout_s):
            raise Stalled(blocked()[0], self._timeout_s, blocked()[1])


def answer(backend: Backend, part: Handle, ref: Ref[T], timeout_s: float, detail: str) -> T:
    """The result `ref` of a call of `part`.

    Raises:
        PartDied: the part is dead, or gave no answer in time and was killed.
        Halted: the run is to end.
    """
    began = time.monotonic()
    # Usually the value is available, and one call fetches it. Otherwise this waits without fetching
    # it, because an interrupted transfer from another node would start again.
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
