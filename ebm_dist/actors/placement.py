"""Which actor gets which cores, threads, devices and, on a cluster, which node."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from ebm_dist.actors.handles import Handle, Node
from ebm_dist.errors import UserError
from ebm_dist.section import Section


class RuntimeConfig(Section):
    """Where the graph runs."""

    backend: Literal["inline", "ray"] = "ray"
    """inline: every part in this process, no Ray. ray: actors on a Ray cluster."""

    address: str = "local"
    """local: start a Ray on this machine; auto: the running cluster of this machine;
    HOST:PORT: that cluster. RAY_ADDRESS wins where set."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where torch finds it."""

    start_timeout_s: PositiveFloat = 120.0
    """Seconds that the actors may take to start before the run gives up."""

    cpus_per_worker: PositiveFloat = 1.0
    """Ray CPUs that a worker claims on a cluster; on a local Ray nothing is claimed."""

    object_store_mb: PositiveInt | None = None
    """Size of a local Ray's object store in MiB; sized from the config when left out."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Threads and GPU shares by role."""

    device: str
    worker_threads: int
    learner_threads: int
    worker_gpus: float
    learner_gpus: float


def available_cores() -> int:
    """Cores this process may run on (a container's share, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(
    runtime: RuntimeConfig,
    *,
    mode: Literal["sync", "async"],
    num_workers: int,
    num_ranks: int,
    worker_threads: int | None,
    learner_threads: int | None,
    num_cores: int,
    num_gpus: int,
) -> Plan:
    """Share `num_cores` cores and `num_gpus` GPUs out among workers and learner ranks.

    Sampling and learning alternate in `sync` and inline, so each may use every core while
    the other waits. In `async` the workers are always busy and take all cores between them;
    a learner rank's short step borrows from them, which costs less than cores set aside
    for it would.

    Raises:
        UserError: runtime.device asks for CUDA where there is none.
    """
    device = runtime.device
    if device == "auto":
        device = "cuda" if num_gpus > 0 else "cpu"
    if device == "cuda" and num_gpus == 0:
        raise UserError(
            "runtime.device: expected a machine with a CUDA device, found none; "
            "set runtime.device to cpu or auto"
        )
    # Inline parts run one after the other, whatever their number.
    lanes = 1 if runtime.backend == "inline" else num_workers
    ranks = 1 if runtime.backend == "inline" else num_ranks
    gpus = (0.0, 0.0)
    if device == "cuda" and runtime.backend == "ray":
        parts = num_workers + num_ranks
        if num_gpus >= parts:
            gpus = (1.0, 1.0)
        elif num_gpus > num_ranks:
            # Learner ranks own their GPUs (NCCL refuses two ranks on one); workers share the rest.
            gpus = (_fraction(num_gpus - num_ranks, num_workers), 1.0)
        elif num_ranks == 1:
            gpus = (_fraction(num_gpus, parts), _fraction(num_gpus, parts))
        else:
            raise UserError(
                f"learner.num_ranks: {num_ranks} ranks and {num_workers} workers need at least "
                f"{num_ranks + 1} GPUs, the cluster has {num_gpus}; lower learner.num_ranks to 1 "
                "to let learner and workers share, or set runtime.device to cpu"
            )
    return Plan(
        device=device,
        worker_threads=worker_threads or max(1, num_cores // lanes),
        learner_threads=learner_threads
        or max(1, num_cores // ranks if mode == "sync" else num_cores // (2 * ranks)),
        worker_gpus=gpus[0],
        learner_gpus=gpus[1],
    )


def _fraction(gpus: int, parts: int) -> float:
    """A share of which `parts` fit on `gpus` devices; one actor never straddles two of them."""
    per_device = -(-parts // gpus)
    return int(10_000 / per_device) / 10_000


VIEW_S = 5.0
"""Ray's view of free resources is some 0.1 s old: within this time we keep our own account."""


class Placer:
    """Puts shards on the nodes of a cluster in turn, and each worker beside the fewest others.

    Reserving a placement group for every node would do the same for a pool of fixed size; a group
    cannot grow, and says only afterwards on which node it is.
    """

    def __init__(
        self,
        look: Callable[[], list[Node]],
        shards: Sequence[Handle],
        workers: Sequence[Handle],
        need: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            look: Ray's view of the nodes, empty where there is nothing to choose from.
            shards, workers: those there are, kept up to date by whoever owns the lists.
            need: resources that a worker claims, by Ray's names.
        """
        self._look = look
        self._shards = shards
        self._workers = workers
        self._need = {name: amount for name, amount in need.items() if amount > 0}
        self._clock = clock
        self._seen_at = -VIEW_S
        self._free: dict[str, dict[str, float]] = {}
        self.clustered = False
        """Whether there are nodes to choose from."""

    def for_shard(self, home: str | None = None) -> str | None:
        """The node with the fewest shards; of equals the one with room for more workers.

        Args:
            home: where its predecessor has its chains mapped; it goes there if the node is there.
        """
        if home is not None:
            self._seen_at = -VIEW_S  # it may have died with its node a moment ago
        free = self._view()
        if home in free:
            return home
        held = Counter(shard.node for shard in self._shards)
        return min(free, key=lambda node: (held[node], -self._room(free[node])), default=None)

    def for_worker(self, avoid: Collection[str | None] = ()) -> str | None:
        """A node with room for one more worker: the one with the fewest for each of its shards.

        Args:
            avoid: nodes that are taken only if there is no other.
        """
        free = self._view()
        shards = Counter(shard.node for shard in self._shards)
        workers = Counter(worker.node for worker in self._workers)
        open_ = [node for node, resources in free.items() if self._room(resources) >= 1]
        if not open_:
            return None

        def crowd(node: str) -> tuple[bool, float, float]:
            # Where no shard is, chains come over the network: such nodes fill up last.
            ratio = (workers[node] + 1) / (shards[node] or 0.1)
            return node in avoid, ratio, -self._room(free[node])

        node = min(open_, key=crowd)
        for name, amount in self._need.items():
            free[node][name] = free[node].get(name, 0.0) - amount
        return node

    def for_ranks(self, held: Sequence[str | None], num_gpus: float) -> list[str] | None:
        """A node that stays for each learner rank: its own, or the one with the fewest ranks.

        Args:
            held: where they are; what they claim there is free before their successors start.
            num_gpus: that each of them claims.

        Returns:
            None where they do not all fit.
        """
        free = self._view()
        room = {n: free[n].get("GPU", 0.0) + num_gpus * held.count(n) + 1e-6 for n in free}
        placed = [node for node in held if node in room]
        for node in placed:
            room[node] -= num_gpus
        out = []
        for own in held:
            node = own
            if node not in room:
                open_ = [n for n in room if room[n] >= num_gpus]
                if not open_:
                    return None
                node = min(open_, key=lambda n: (placed.count(n), -room[n]))
                placed.append(node)
                room[node] -= num_gpus
            out.append(node)
        for node in free:
            free[node]["GPU"] = max(0.0, room[node])
        return out

    def draining(self) -> set[str]:
        """Nodes that are about to leave."""
        leaving = {node.id for node in self._look() if node.draining}
        for node in leaving:  # whatever comes now goes elsewhere, however old the view is
            self._free.pop(node, None)
        return leaving

    def _room(self, free: Mapping[str, float]) -> float:
        rooms = [(free.get(name, 0.0) + 1e-6) // amount for name, amount in self._need.items()]
        return min(rooms, default=float("inf"))

    def _view(self) -> dict[str, dict[str, float]]:
        now = self._clock()
        if now - self._seen_at >= VIEW_S:
            self._seen_at = now
            nodes = self._look()
            self.clustered = bool(nodes)
            self._free = {node.id: dict(node.free) for node in nodes if not node.draining}
        return self._free
