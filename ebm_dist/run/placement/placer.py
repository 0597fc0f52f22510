"""Chooses the node of each part: learner ranks first, then workers on the remaining resources."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ebm_dist.cluster.backend import Node
from ebm_dist.controller.clients import ShardClient, WorkerClient
from ebm_dist.core.errors import UserError
from ebm_dist.run.placement.gpu_shares import Shares, share_out
from ebm_dist.run.placement.plan import Plan

VIEW_S = 5.0
"""Seconds between queries of Ray's view, which lags by about 0.1 s; in between we keep our own
account of free resources."""
SPARE = 1e-6
"""Tolerance for sums of floats; Ray itself counts in steps of 1e-4."""


class Place(NamedTuple):
    """The node of a part, and its resources there."""

    node: str | None
    """None lets Ray choose."""
    num_gpus: float
    num_threads: int


class Ranks(NamedTuple):
    """Places of the learner ranks."""

    places: list[Place]
    yielding: list[WorkerClient]
    """Workers that must stop first, to free GPUs."""


class Placer:
    """Spreads shards over the nodes of a cluster, and puts each worker on the least loaded node.

    A placement group per node would do the same for a pool of fixed size. But a group cannot grow,
    and its nodes are known only after it is created.
    """

    def __init__(
        self,
        look: Callable[[], list[Node]],
        shards: Iterable[ShardClient],
        workers: Iterable[WorkerClient],
        plan: Plan,
        *,
        cpus_per_worker: float,
        num_workers: int,
        num_ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            look: returns Ray's view of the nodes; empty if there is only one machine.
            shards, workers: the owners of the parts, which hold the current ones.
            plan: of one machine, for parts whose node is not known.
            num_workers: the largest size of the pool.
        """
        self._look = look
        self._shards = shards
        self._workers = workers
        self._plan = plan
        self._cpus = cpus_per_worker
        self._num_workers = num_workers
        self._num_ranks = num_ranks
        self._clock = clock
        self._seen_at = -VIEW_S
        self._free: dict[str, dict[str, float]] = {}
        self._total: dict[str, dict[str, float]] = {}
        self._ranks: Sequence[str | None] = [None] * num_ranks
        self._rank_gpus = 0.0
        self._expected: Counter[str] = Counter()
        self.clustered = False
        """Whether there are several nodes to choose from."""

    # --- shards ---------------------------------------------------------------------------------

    def for_shard(self, home: str | None = None) -> str | None:
        """The node with the fewest shards; among equals, the one with room for most workers.

        Args:
            home: the node where the predecessor's chains are mapped; preferred if it is alive.
        """
        if home is not None:
            self._look_again()  # the node may have died a moment ago, with the shard
        free = self._view()
        if home in free:
            return home
        held = Counter(shard.node for shard in self._shards)
        room = {node: self._room(free[node], self.shares().large) for node in free}
        return min(self._computing(), key=lambda node: (held[node], -room[node]), default=None)

    # --- workers --------------------------------------------------------------------------------

    def for_worker(self, instead_of: WorkerClient | None = None) -> Place | None:
        """A node with room for another worker: the one with the fewest workers per shard.

        Args:
            instead_of: a worker that died; its node is used only if no other has room.

        Returns:
            None if no node has room.
        """
        free = self._view()
        others = [worker for worker in self._workers if worker is not instead_of]
        num_gpus = self.shares().next([worker.num_gpus for worker in others])
        if not self.clustered:
            return Place(None, num_gpus, self._plan.worker_threads)
        if not self._expected:
            self._expected = self._expect(free)
        room = self._left(free, others)
        workers = Counter(worker.node for worker in others)
        home = instead_of.node if instead_of is not None else None
        if instead_of is not None and home in room:  # Ray may not have freed its resources yet
            _claim(room[home], -self._cpus, -instead_of.num_gpus)
            left = self._total[home].get("CPU", 0.0) - self._cpus * workers[home]
            room[home]["CPU"] = min(room[home]["CPU"], left)
            room[home]["GPU"] = min(room[home]["GPU"], self._gpus_for_workers(home, others))
        for gpus in dict.fromkeys((num_gpus, self.shares().small)):
            node = self._choose(room, workers, gpus, avoid={home} if home else ())
            if node is not None:
                if node != home:
                    _claim(free[node], self._cpus, gpus)
                return Place(node, gpus, self._threads_of_worker(node, workers[node] + 1))
        return None

    def anywhere(self) -> Place:
        """A place without a node, for a worker that waits until Ray has room."""
        return Place(None, self.shares().small, self._plan.worker_threads)

    def _choose(
        self,
        room: Mapping[str, Mapping[str, float]],
        workers: Counter[str | None] | Counter[str],
        num_gpus: float,
        avoid: Collection[str] = (),
    ) -> str | None:
        shards = Counter(shard.node for shard in self._shards)

        def crowd(node: str) -> tuple[bool, float, float]:
            # Workers on a node without shards read chains over the network, so it fills up last.
            ratio = (workers[node] + 1) / (shards[node] or 0.1)
            return node in avoid, ratio, -self._room(room[node], num_gpus)

        open_ = [node for node, free in room.items() if self._room(free, num_gpus) >= 1]
        return min(open_, key=crowd, default=None)

    def _expect(self, free: Mapping[str, Mapping[str, float]]) -> Counter[str]:
        """The number of workers that each node will have in the full pool."""
        room = {node: dict(left) for node, left in self._left(free, ()).items()}
        expected: Counter[str] = Counter()
        held: list[float] = []
        for _ in range(self._num_workers):
            gpus = self.shares().next(held)
            if (node := self._choose(room, expected, gpus)) is None:
                break
            _claim(room[node], self._cpus, gpus)
            expected[node] += 1
            held.append(gpus)
        return expected

    def _threads_of_worker(self, node: str, num_there: int) -> int:
        if not (cores := int(self._total[node].get("CPU", 0))):
            return self._plan.worker_threads
        expected = self._expected[node] or -(-self._num_workers // len(self._total))
        return max(1, cores // max(expected, num_there))

    # --- learner ranks --------------------------------------------------------------------------

    def for_ranks(self, held: Sequence[str | None] | None = None) -> Ranks | None:
        """Places of the learner ranks on nodes that are not draining.

        A rank stays on its node if possible; the others go on as few nodes as possible. Ranks
        without GPUs are spread instead, so that each has more cores.

        Args:
            held: the current nodes of the ranks, whose GPUs are free before their successors start;
                the last placement when left out.

        Returns:
            None if they do not all fit, even without workers.
        """
        before = self._ranks if held is None else list(held)
        places = self._place_ranks(before, self._workers)
        if places is not None:
            return Ranks(places, [])
        places = self._place_ranks(before, ())
        return Ranks(places, self._in_the_way(places, before)) if places is not None else None

    def ranks_anywhere(self) -> list[Place]:
        """Places without nodes, for ranks that wait until Ray has room."""
        return [Place(None, self.shares().rank, self._plan.learner_threads)] * self._num_ranks

    def _in_the_way(
        self, places: Sequence[Place], held: Sequence[str | None]
    ) -> list[WorkerClient]:
        """Workers that must stop before ranks fit in their places."""
        yielding: list[WorkerClient] = []
        for node in {place.node for place in places if place.node is not None}:
            there = [worker for worker in self._workers if self._node_of(worker) == node]
            there.sort(key=lambda worker: -worker.num_gpus)
            needed = sum(place.num_gpus for place in places if place.node == node)
            room = self._gpus_for_ranks(node, held, self._workers)
            # It is unknown which fractions share a device, so all workers with fractions must stop.
            for worker in there:
                if room + SPARE >= needed and (not yielding or yielding[-1].num_gpus >= 1):
                    break
                yielding.append(worker)
                room += worker.num_gpus
        return yielding

    def _place_ranks(
        self, held: Sequence[str | None], workers: Iterable[WorkerClient]
    ) -> list[Place] | None:
        self._look_again()  # their node may have died a moment ago
        free, num_gpus = self._view(), self.shares().rank
        if num_gpus:
            room = {n: self._gpus_for_ranks(n, held, workers) + SPARE for n in free}
            nodes = _packed(held, room, num_gpus)
        else:
            nodes = _spread(held, self._computing())
        if nodes is None:
            return None
        self._ranks, self._rank_gpus = nodes.copy(), num_gpus
        return [Place(node, num_gpus, self._threads_of_rank(node, nodes)) for node in nodes]

    def _threads_of_rank(self, node: str, nodes: Sequence[str]) -> int:
        cores = int(self._total[node].get("CPU", 0))
        share = cores * self._plan.learner_share / nodes.count(node)
        return max(1, int(share)) if cores else self._plan.learner_threads

    # --- nodes ----------------------------------------------------------------------------------

    def shares(self) -> Shares:
        """GPU requests for the current nodes."""
        if not self.clustered or not self._plan.shares.rank:
            return self._plan.shares
        num_gpus = sum(int(total.get("GPU", 0)) for total in self._total.values())
        try:
            return share_out(num_gpus, self._num_ranks, self._num_workers)
        except UserError:  # nodes were lost; others may join
            return self._plan.shares

    def draining(self) -> set[str]:
        """Nodes that are being drained."""
        leaving = {node.id for node in self._look() if node.draining}
        for node in leaving:  # removed at once, even if the cached view is not due for an update
            self._free.pop(node, None)
        return leaving

    def _computing(self) -> list[str]:
        """The nodes with CPUs: a head node is often started without, for the driver alone."""
        free = self._view()
        return [n for n in free if self._total[n].get("CPU", 0) > 0] or list(free)

    def _node_of(self, part: WorkerClient) -> str | None:
        return part.node or part.runs_on

    def _gpus_for_workers(self, node: str, workers: Iterable[WorkerClient]) -> float:
        """GPUs of a node that neither the ranks nor `workers` hold."""
        claimed = sum(worker.num_gpus for worker in workers if self._node_of(worker) == node)
        ranks = self._ranks.count(node) * self._rank_gpus
        return self._total[node].get("GPU", 0.0) - ranks - claimed

    def _gpus_for_ranks(
        self, node: str, held: Sequence[str | None], workers: Iterable[WorkerClient]
    ) -> float:
        """GPUs of a node that neither `workers` nor other programs hold."""
        ours = [w.num_gpus for w in self._workers if self._node_of(w) == node]
        kept = [w.num_gpus for w in workers if self._node_of(w) == node]
        free = self._free[node].get("GPU", 0.0) + held.count(node) * self.shares().rank
        free += sum(ours) - sum(kept)
        return min(free, self._total[node].get("GPU", free + sum(kept)) - sum(kept))

    def _left(
        self, free: Mapping[str, Mapping[str, float]], workers: Iterable[WorkerClient]
    ) -> dict[str, dict[str, float]]:
        """`free`, less the GPUs given to ranks and `workers` that Ray may not count yet."""
        return {
            node: {
                **resources,
                "GPU": min(resources.get("GPU", 0.0), self._gpus_for_workers(node, workers)),
            }
            for node, resources in free.items()
        }

    def _room(self, free: Mapping[str, float], num_gpus: float) -> float:
        need = {"CPU": self._cpus, "GPU": num_gpus}
        rooms = [(free.get(k, 0.0) + SPARE) // n for k, n in need.items() if n > 0]
        return min(rooms, default=float("inf"))

    def _look_again(self) -> None:
        self._seen_at = -VIEW_S

    def _view(self) -> dict[str, dict[str, float]]:
        now = self._clock()
        if now - self._seen_at >= VIEW_S:
            self._seen_at = now
            nodes = self._look()
            self.clustered = bool(nodes)
            self._free = {node.id: dict(node.free) for node in nodes if not node.draining}
            self._total = {node.id: node.total or node.free for node in nodes if not node.draining}
        return self._free


def _claim(free: dict[str, float], cpus: float, gpus: float) -> None:
    free["CPU"] = free.get("CPU", 0.0) - cpus
    free["GPU"] = free.get("GPU", 0.0) - gpus


def _kept(held: Sequence[str | None], room: dict[str, float], need: float) -> list[str | None]:
    """The node of each rank if it has room for the rank, else None; reduces `room`."""
    out: list[str | None] = []
    for node in held:
        stays = node in room and room[node] >= need
        if stays:
            room[node] -= need  # type: ignore[index]
        out.append(node if stays else None)
    return out


def _packed(held: Sequence[str | None], room: dict[str, float], need: float) -> list[str] | None:
    """A node for each rank: one that has ranks already, else the smallest that holds the rest."""
    nodes = _kept(held, room, need)
    for index in range(len(nodes)):
        if nodes[index] is not None:
            continue
        left = nodes.count(None)
        open_ = [node for node in room if room[node] >= need]
        if not open_:
            return None

        def wasteful(node: str, left: int = left) -> tuple[bool, bool, float]:
            holds = room[node] // need
            return nodes.count(node) == 0, holds < left, holds if holds >= left else -holds

        node = min(open_, key=wasteful)
        nodes[index] = node
        room[node] -= need
    return nodes  # type: ignore[return-value]


def _spread(held: Sequence[str | None], open_: Sequence[str]) -> list[str] | None:
    nodes = _kept(held, dict.fromkeys(open_, 0.0), 0.0)
    if not open_:
        return None
    for index, node in enumerate(nodes):
        if node is None:
            nodes[index] = min(open_, key=nodes.count)
    return nodes  # type: ignore[return-value]
