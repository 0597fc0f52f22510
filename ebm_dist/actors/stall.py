"""No wait without an end: what is waited for is a queue, which somebody should fill."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from ebm_dist.actors.handles import Backend, Ref
from ebm_dist.errors import RunFailed


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
UPDATES = Queue(
    "the learner ranks' answers to an update",
    "every learner rank (a rank's own wait for the others ends after learner.timeout_s)",
    "raise flow.stall_timeout_s if an update is only slow",
)
SHARDS = Queue(
    "a shard's answers",
    "the shard's process",
    "see the log of the shard; its node may be out of reach",
)


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

    def look(self, state: Hashable, blocked: Callable[[], tuple[Queue, str]]) -> None:
        """Take note of `state`, anything that changes whenever there is progress.

        Args:
            blocked: says which queue it is, and what was waited for.

        Raises:
            Stalled: it has been the same for too long.
        """
        now = self._clock()
        if state != self._seen:
            self._seen, self._since = state, now
        elif now - self._since > self._timeout_s:
            raise Stalled(blocked()[0], self._timeout_s, blocked()[1])


def answer(backend: Backend, ref: Ref, timeout_s: float, queue: Queue, detail: str) -> Any:
    """The value of `ref`.

    Raises:
        Stalled: it was not there in time.
    """
    try:
        return backend.get(ref, timeout_s)
    except TimeoutError as error:
        raise Stalled(queue, timeout_s, detail) from error
