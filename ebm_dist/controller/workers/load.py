"""The workers of the pool: who may be given a round, who is idle, who starts and who leaves.

A seat starts, serves and retires. It is given nothing before it holds weights, and nothing once it
is told to go; what it has by then it finishes.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ebm_dist.cluster.backend import Ref
from ebm_dist.controller.clients import WorkerClient

State = Literal["starting", "serving", "retiring"]


@dataclass(slots=True, eq=False)
class Seat:
    """One worker of the pool, whichever process holds it at the moment."""

    index: int
    worker: WorkerClient
    since: float
    """When its present process was asked for, on the pool's clock."""
    state: State = "starting"
    sent: Ref[np.ndarray] | None = None
    """The weights that its present process was sent to begin with."""
    load: int = 0
    """Rounds before it."""
    busy_since: float = 0.0
    """When it can have begun the first of them, on the pool's clock."""
    num_starts: int = 0
    """Deaths in a row before it held weights."""
    failures: int = 0
    """Deaths after that, without a commit between."""

    @property
    def node(self) -> str | None:
        return self.worker.node


class _Queue:
    """Seats by load; of one load, the one that has had it longest comes first.

    A newcomer that was never tried would keep the failures of its predecessor on its count.
    """

    def __init__(self) -> None:
        self._by_load: dict[int, OrderedDict[Seat, None]] = {}

    def put(self, seat: Seat) -> None:
        self._by_load.setdefault(seat.load, OrderedDict())[seat] = None

    def drop(self, seat: Seat) -> None:
        seats = self._by_load[seat.load]
        del seats[seat]
        if not seats:
            del self._by_load[seat.load]

    def first(self) -> Seat | None:
        # A handful of loads, however many seats there are.
        return next(iter(self._by_load[min(self._by_load)])) if self._by_load else None


class LoadQueue:
    """All seats, the ones that serve in order of their load, and how long they had nothing."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seats: dict[int, Seat] = {}
        self._everywhere = _Queue()
        self._on_node: dict[str | None, _Queue] = defaultdict(_Queue)
        self._num_retiring = 0
        self._num_serving = 0
        self._num_idle = 0
        self._last = clock()
        self._serving_s = 0.0
        self._idle_s = 0.0
        self._idle_before = 0.0

    def __iter__(self) -> Iterator[Seat]:
        return iter(list(self._seats.values()))

    def __len__(self) -> int:
        """Seats that serve or will: those that leave do not count."""
        return len(self._seats) - self._num_retiring

    def __contains__(self, seat: Seat) -> bool:
        return self._seats.get(seat.index) is seat

    @property
    def num_serving(self) -> int:
        return self._num_serving

    def add(self, index: int, worker: WorkerClient) -> Seat:
        seat = self._seats[index] = Seat(index, worker, self._clock())
        return seat

    def open(self, seat: Seat) -> None:
        """It holds weights: rounds may come."""
        assert seat.state == "starting", seat
        self._account()
        seat.state = "serving"
        self._num_serving += 1
        self._num_idle += seat.load == 0
        self._enqueue(seat)

    def close(self, seat: Seat, state: State) -> None:
        """No more rounds for it; those that it has stay on its count."""
        if seat.state == "serving":
            self._account()
            self._num_serving -= 1
            self._num_idle -= seat.load == 0
            self._dequeue(seat)
        self._num_retiring += (state == "retiring") - (seat.state == "retiring")
        seat.state = state

    def renew(self, seat: Seat, worker: WorkerClient) -> None:
        """Another process takes the seat, without rounds and without weights."""
        self.close(seat, "starting")
        seat.load = 0
        seat.worker = worker
        seat.since = self._clock()

    def remove(self, seat: Seat) -> None:
        self.close(seat, "retiring")
        self._num_retiring -= 1
        del self._seats[seat.index]

    def first(self, node: str | None = None) -> Seat | None:
        """Who is given the next round: the one with the fewest before it, on `node` of equals."""
        anywhere = self._everywhere.first()
        if node is not None and node in self._on_node:
            local = self._on_node[node].first()
            # A worker elsewhere that has less to do is sooner done, the way included: energies
            # take longer than a copy of the chains.
            if local is not None and anywhere is not None and local.load <= anywhere.load:
                return local
        return anywhere

    def load(self, seat: Seat, change: int) -> None:
        """Rounds given to `seat`, or taken from it."""
        serving = seat.state == "serving"
        if serving:
            self._account()
            self._dequeue(seat)
            self._num_idle -= seat.load == 0
        if change < 0 or seat.load == 0:
            seat.busy_since = self._clock()
        seat.load = max(0, seat.load + change)
        if serving:
            self._num_idle += seat.load == 0
            self._enqueue(seat)

    def seconds(self) -> tuple[float, float]:
        """Seconds that seats have served, and those of them without a round, summed over seats."""
        self._account()
        return self._serving_s, self._idle_s

    def take_idle_seconds(self) -> float:
        """Mean seconds that a seat had no round since the last call."""
        _, idle = self.seconds()
        before, self._idle_before = self._idle_before, idle
        return (idle - before) / max(1, self._num_serving)

    def _account(self) -> None:
        now = self._clock()
        passed, self._last = now - self._last, now
        self._serving_s += passed * self._num_serving
        self._idle_s += passed * self._num_idle

    def _enqueue(self, seat: Seat) -> None:
        self._everywhere.put(seat)
        self._on_node[seat.node].put(seat)

    def _dequeue(self, seat: Seat) -> None:
        self._everywhere.drop(seat)
        self._on_node[seat.node].drop(seat)
