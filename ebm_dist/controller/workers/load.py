"""The members of the worker pool, ordered by load, and their idle time.

A member starts, serves and retires. It gets no round before it holds weights and none while it
retires; it finishes the rounds that it already has.
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
class Member:
    """One worker of the pool. A new process may replace its process; the index stays."""

    index: int
    worker: WorkerClient
    node: str | None
    """Id of the node that was chosen for its process."""
    since: float
    """When its process was requested, on the pool's clock."""
    state: State = "starting"
    sent: Ref[np.ndarray] | None = None
    """The first weights that its process was sent."""
    load: int = 0
    """Rounds that it has been given and has not finished."""
    busy_since: float = 0.0
    """Earliest time at which the first of them can have begun, on the pool's clock."""
    num_starts: int = 0
    """Deaths in a row, each before it held weights."""
    failures: int = 0
    """Deaths since its last commit, each while it held weights."""
    compiling: bool = False
    """Whether its process compiled the steps when it ended its last round."""


class _Queue:
    """Members by load; among equals, the one that has had this load longest comes first.

    A replaced worker that never got a round would keep the failures of its predecessor.
    """

    def __init__(self) -> None:
        self._by_load: dict[int, OrderedDict[Member, None]] = {}

    def put(self, member: Member) -> None:
        self._by_load.setdefault(member.load, OrderedDict())[member] = None

    def drop(self, member: Member) -> None:
        members = self._by_load[member.load]
        del members[member]
        if not members:
            del self._by_load[member.load]

    def first(self) -> Member | None:
        # There are few distinct loads, however many members.
        return next(iter(self._by_load[min(self._by_load)])) if self._by_load else None


class LoadQueue:
    """All members, with those that serve in order of load, and the time they were idle."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._members: dict[int, Member] = {}
        self._everywhere = _Queue()
        self._on_node: dict[str, _Queue] = defaultdict(_Queue)
        self._num_retiring = 0
        self._num_serving = 0
        self._num_idle = 0
        self._last = clock()
        self._serving_s = 0.0
        self._idle_s = 0.0
        self._idle_before = 0.0

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        """Members that serve or start; those that retire do not count."""
        return len(self._members) - self._num_retiring

    def __contains__(self, member: Member) -> bool:
        return self._members.get(member.index) is member

    @property
    def num_serving(self) -> int:
        return self._num_serving

    @property
    def num_compiling(self) -> int:
        return sum(member.compiling for member in self._members.values())

    def add(self, index: int, worker: WorkerClient) -> Member:
        member = self._members[index] = Member(index, worker, worker.node, self._clock())
        return member

    def serve(self, member: Member) -> None:
        """`member` holds weights and may get rounds from now on."""
        assert member.state == "starting", member
        self._account()
        member.state = "serving"
        self._num_serving += 1
        self._num_idle += member.load == 0
        self._enqueue(member)

    def stop(self, member: Member, state: State) -> None:
        """Give `member` no more rounds; its load stays."""
        if member.state == "serving":
            self._account()
            self._num_serving -= 1
            self._num_idle -= member.load == 0
            self._dequeue(member)
        self._num_retiring += (state == "retiring") - (member.state == "retiring")
        member.state = state

    def renew(self, member: Member, worker: WorkerClient) -> None:
        """Give `member` another process, which has no rounds and no weights."""
        self.stop(member, "starting")
        member.load = 0
        member.compiling = False
        member.worker, member.node = worker, worker.node
        member.since = self._clock()

    def remove(self, member: Member) -> None:
        self.stop(member, "retiring")
        self._num_retiring -= 1
        del self._members[member.index]

    def first(self, node: str | None = None) -> Member | None:
        """The member to get the next round: the least loaded; among equals one on `node`."""
        anywhere = self._everywhere.first()
        if node is not None and node in self._on_node:
            local = self._on_node[node].first()
            # A less loaded worker on another node finishes sooner, even with the transfer: energies
            # take longer than a copy of the chains.
            if local is not None and anywhere is not None and local.load <= anywhere.load:
                return local
        return anywhere

    def add_load(self, member: Member, change: int) -> None:
        """Change the number of rounds of `member` by `change`."""
        serving = member.state == "serving"
        if serving:
            self._account()
            self._dequeue(member)
            self._num_idle -= member.load == 0
        if change < 0 or member.load == 0:
            member.busy_since = self._clock()
        member.load = max(0, member.load + change)
        if serving:
            self._num_idle += member.load == 0
            self._enqueue(member)

    def seconds(self) -> tuple[float, float]:
        """Seconds of service, and idle seconds among them, summed over members."""
        self._account()
        return self._serving_s, self._idle_s

    def take_idle_seconds(self) -> float:
        """Mean idle seconds per serving member since the last call."""
        _, idle = self.seconds()
        before, self._idle_before = self._idle_before, idle
        return (idle - before) / max(1, self._num_serving)

    def _account(self) -> None:
        now = self._clock()
        passed, self._last = now - self._last, now
        self._serving_s += passed * self._num_serving
        self._idle_s += passed * self._num_idle

    def _enqueue(self, member: Member) -> None:
        self._everywhere.put(member)
        if member.node is not None:
            self._on_node[member.node].put(member)

    def _dequeue(self, member: Member) -> None:
        self._everywhere.drop(member)
        if member.node is not None:
            self._on_node[member.node].drop(member)
