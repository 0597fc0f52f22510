"""Nodes die with negatives and weights that others wait for: raylets stand for the nodes."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.access import find_token, make_token
from ebm_dist.cluster.backend import ActorOptions, ObjectLost
from ebm_dist.cluster.ray_backend import RayBackend
from ebm_dist.config.sections import FlowConfig
from ebm_dist.controller.clients import LearnerClient, ShardClient, WorkerClient
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.negatives.asynchronous import AsyncNegatives
from ebm_dist.controller.negatives.delivery import Delivery
from ebm_dist.controller.negatives.source import Consumed
from ebm_dist.controller.retry import Redo
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.core.types import EventSpec, Lease, MovedChains, NegativeArrays

pytestmark = pytest.mark.ray

# A lease is 800 KiB: what is under 100 KiB rides along with Ray's answers and is never lost.
CAPACITY, CHAINS, BATCH, SPEC = 256, 64, 128, EventSpec((3200,), "real")
NUM_WEIGHTS = 100_000


class Mover:
    """A worker without a network."""

    def hold(self, weights: np.ndarray, version: int) -> int:
        return version

    def run_round(
        self, lease: Lease | None, weights: np.ndarray, version: int, num_steps: int
    ) -> MovedChains | None:
        if lease is None:
            return None
        assert lease.position is not None
        assert weights.shape == (NUM_WEIGHTS,)
        position = (lease.position + 1).astype(np.float32)
        return MovedChains.of(
            lease,
            position=position,
            energy=position.sum(1),
            log_weight=lease.log_weight,
            version=version,
            num_steps=num_steps,
        )


class Rank:
    """A learner rank without a model; its weights lie in the store of its node."""

    def fetched(self, *negatives: NegativeArrays) -> None:
        assert all(part.x.shape == (CHAINS, *SPEC.shape) for part in negatives)

    def update(
        self, step: int, lr: float, after: Any, parts: Any, *negatives: Any
    ) -> dict[str, float]:
        return {}

    def published(self, average: bool) -> tuple[bool, np.ndarray, None]:
        return True, np.zeros(NUM_WEIGHTS), None


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # As in test_run_elastic: the user's own token, which this process may have read already.
    if find_token() is None:
        make_token()
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "4",
    }.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1)
        made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


class Graph:
    """Two shards and two workers on the nodes beside the head, ranks where they are told."""

    def __init__(self, backend: RayBackend, nodes: list[str], rank_nodes: list[str]) -> None:
        self.backend, self.nodes = backend, list(nodes)
        self.counts: Counter[str] = Counter()
        self.progress = Progress()
        self.shards = Shards(backend, [CAPACITY // 2] * 2)
        self.shards.start(self.shard)
        self.workers = WorkerPool(backend)
        self.workers.start(2, self.worker)
        self.learners = LearnerGroup(
            backend,
            lambda rank, node: LearnerClient(
                backend.spawn(
                    Rank, f"learner-{rank}", ActorOptions(node=rank_nodes[rank], any_order=True)
                )
            ),
            num_ranks=len(rank_nodes),
            port=None,
            start_timeout_s=60.0,
            call_timeout_s=60.0,
        )
        backend.await_started([*self.shards.handles, *self.workers.handles, *self.learners.handles])
        self.scheduler = RoundScheduler(
            backend,
            self.shards,
            self.workers,
            on_replaced=lambda shard: Redo(),
            on_rejected=lambda shard: Redo(),
            num_chains=CHAINS,
            depth=2,
            hang_s=120.0,
        )
        config = FlowConfig(mode="async", max_lag=4, stall_timeout_s=60)
        self.flow = AsyncNegatives(
            backend,
            self.shards,
            config,
            self.scheduler,
            self.progress,
            lambda name, num: self.counts.update({name: num}),
            num_negatives=BATCH,
            num_chains=CHAINS,
            num_steps=10,
        )
        self.delivery = Delivery(
            backend,
            self.learners,
            self.scheduler,
            self.flow,
            self.flow.top_up,
            num_negatives=BATCH,
            timeout=60.0,
        )
        self.weights = backend.put(np.zeros(NUM_WEIGHTS))
        self.scheduler.set_weights(self.weights, 0)

    def shard(self, index: int) -> ShardClient:
        config = BufferConfig(capacity=CAPACITY, num_shards=2, reinit_prob=0.0)
        options = {"index": index, "capacity": CAPACITY // 2, "max_lease": CHAINS, "seed": 1}
        handle = self.backend.spawn(
            partial(Shard, config, SPEC, **options),
            f"shard-{index}",
            ActorOptions(any_order=True, node=self.nodes[index % len(self.nodes)]),
        )
        return ShardClient(handle)

    def worker(self, index: int) -> WorkerClient:
        node = self.nodes[index % len(self.nodes)]
        options = ActorOptions(any_order=True, node=node)
        return WorkerClient(self.backend.spawn(Mover, f"worker-{index}", options))

    def update(self, kill: Callable[[Consumed], None] = lambda consumed: None) -> list[int]:
        """One update, `kill` being called with its negatives in flight; the lags."""
        consumed = self.flow.take_negatives()
        kill(consumed)
        self.delivery.bring(consumed, self.progress.step)
        replies = self.learners.update(self.progress.step, 0.1, BATCH, consumed.negatives)
        for reply in replies:
            self.backend.get(reply, 20.0)
        self.progress.step += 1
        self.progress.version += 1
        self.scheduler.set_weights(self.weights, self.progress.version)
        return [consumed.version - lease.version for lease in consumed.leases]

    def check(self) -> None:
        for ref in [shard.status() for shard in self.shards]:
            counts = self.backend.get(ref, 30.0).counts
            assert counts.free + counts.leased + counts.ready == CAPACITY // 2


@pytest.fixture
def backend(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayBackend]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes know no tests
    made = RayBackend(cluster.address, namespace="lost", start_timeout_s=120.0)
    try:
        yield made
    finally:
        made.close()
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_negatives_and_weights_lost_with_their_nodes_cost_neither_the_ranks_nor_the_run(
    cluster: Any,
    backend: RayBackend,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", logger="ebm_dist.run")
    monkeypatch.setattr(logging.getLogger("ebm_dist.run"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("ebm_dist.run"), "propagate", False)
    head = cluster.head_node.node_id
    first, second = (node for node in cluster.list_all_nodes() if node.node_id != head)
    graph = Graph(backend, [first.node_id, second.node_id], rank_nodes=[head, second.node_id])
    for _ in range(4):
        graph.update()
    graph.check()

    def kill(node: Any) -> None:
        # The store of a node is in its raylet. Ray notices two seconds later.
        cluster.remove_node(node, allow_graceful=False)
        graph.nodes = [n for n in graph.nodes if n != node.node_id]

    began = [0.0]

    def kill_holder(consumed: Consumed) -> None:
        """Kill the first node once an update takes something of its shard: not each does."""
        if any(lease.shard == 0 for lease in consumed.leases):
            began[0] = time.monotonic()
            kill(first)

    while not began[0]:
        graph.update(kill_holder)
    took = time.monotonic() - began[0]
    assert graph.counts["flow/lost"] in (CHAINS, 2 * CHAINS), "a node's shard had handed some over"
    assert took < 30
    for _ in range(10):
        assert max(graph.update()) <= 4
    graph.check()
    assert not graph.learners.lost()
    assert sum(line.startswith("shard-0 died") for line in caplog.messages) == 1
    started = "worker-1 runs as process"  # is all that is said of it
    assert all(line.startswith(started) for line in caplog.messages if "worker-1" in line)

    # Weights that nobody has fetched before their node goes: its rank was the first to hold them.
    # Rounds and newcomers under them wait for the next; no round is given up for it.
    handle = backend.spawn(Rank, "source", ActorOptions(aside=True, node=second.node_id))
    lost = LearnerClient(handle).published(False)
    backend.get(lost[0], 20.0)
    graph.nodes = [head]
    cluster.remove_node(second, allow_graceful=False)
    graph.progress.version += 1
    graph.scheduler.set_weights(lost[1], graph.progress.version)
    killed = time.monotonic()
    while not backend.lost(lost[1]):
        graph.scheduler.poll(0.2)
        graph.flow.top_up()
        assert time.monotonic() - killed < 30, "Ray has not noticed"
    with pytest.raises(ObjectLost):
        backend.get(lost[1], 20.0)
    for _ in range(20):  # past as many tries as a round has
        graph.scheduler.poll(0.2)
        graph.flow.top_up()
    graph.progress.version += 1
    graph.scheduler.set_weights(graph.weights, graph.progress.version)
    graph.scheduler.redo_lost()
    consumed = graph.flow.take_negatives()
    assert len(consumed.negatives) == BATCH // CHAINS
    graph.check()
