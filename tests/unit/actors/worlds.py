"""A whole flow of negatives in one thread: shards, workers, the pool, and a learner that counts."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from simulation import SimBackend, SimWorker

from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import ActorOptions, Ref
from ebm_dist.config.sections import FlowConfig
from ebm_dist.controller.clients import ShardClient, WorkerClient
from ebm_dist.controller.negatives import MODES
from ebm_dist.controller.retry import Redo
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.core.types import EventSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "buffer"))

from shards import Numbered

WEIGHTS: Ref[np.ndarray] = Ref()
"""A worker of the simulation looks at the version alone."""
SPEC = EventSpec((3,), "real")
CAPACITY, CHAINS, BATCH, NUM_STEPS = 48, 4, 8, 10


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def said() -> list[str]:
    """The lines that a run has for whoever watches it, from now on and until the next call."""
    handler = _Said()
    logger = logging.getLogger("ebm_dist.run")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    return handler.lines


class World:
    """Two shards, some workers, a pool, a flow, and a learner that only counts versions."""

    def __init__(
        self,
        *,
        seed: int = 0,
        num_workers: int = 3,
        max_delay: int = 6,
        kill_worker: float = 0.0,
        kill_shard: float = 0.0,
        directory: Path | None = None,
        capacity: int = CAPACITY,
        max_ticks: int = 10**6,
        nodes: tuple[str | None, ...] = (None,),
        scattered: bool = True,
        tick_s: float = 0.0,
        lease_timeout_s: float = 120.0,
        carries: bool = False,
        **flow: Any,
    ) -> None:
        """
        Args:
            max_ticks: of one update; longer is a deadlock.
            nodes: shards and workers are put on them in turn.
            tick_s: the clocks of shards and pool go on by so much a tick; the pool's own when 0.
            directory: shards map their chains there, each under its node's name.
            carries: chains have a clock, and label, condition and pair of a datum.
        """
        self.config = FlowConfig(**({"stall_timeout_s": 30} | flow))
        self.max_lag = self.config.max_lag
        self.capacity = capacity
        self.max_ticks = max_ticks
        self.nodes = nodes
        self.rng = np.random.default_rng(seed)
        self.kills = (kill_worker, kill_shard)
        self.directory = directory
        self.counts: Counter[str] = Counter()
        self.said = said()
        self.now = 0.0
        self.tick_s = tick_s
        self.lease_timeout_s = lease_timeout_s
        self.carries = carries
        self.ticks_left = max_ticks
        self.backend = SimBackend(
            delay=lambda: int(self.rng.integers(1, max_delay + 1)),
            eager=lambda: bool(self.rng.random() < 0.5),
            on_tick=self.misfortune,
            scattered=scattered,
        )
        backend: Any = self.backend
        clock: Any = {"clock": lambda: self.now} if tick_s else {}
        self.shards = Shards(backend, [capacity // 2] * 2)
        self.shards.start(self.spawn_shard)
        self.worker_pool = WorkerPool(backend, **clock)
        self.worker_pool.start(num_workers, self.spawn_worker)
        self.progress = Progress()
        self.scheduler = RoundScheduler(
            backend,
            self.shards,
            self.worker_pool,
            on_replaced=lambda shard: Redo(),
            on_rejected=lambda shard: Redo(),
            num_chains=CHAINS,
            depth=2,
            hang_s=2.0 * lease_timeout_s if tick_s else 1e9,
            **clock,
        )
        self.flow = MODES[self.config.mode](
            backend,
            self.shards,
            self.config,
            self.scheduler,
            self.progress,
            lambda name, num: self.counts.update({name: num}),
            num_negatives=BATCH,
            num_chains=CHAINS,
            num_steps=NUM_STEPS,
        )
        self.scheduler.set_weights(WEIGHTS, 0)

    @property
    def workers(self) -> list[WorkerClient]:
        return list(self.worker_pool)

    def spawn_worker(self, index: int) -> WorkerClient:
        node = self.nodes[index % len(self.nodes)]
        within = {"within": str(self.memory_of(node))} if self.directory else {}
        handle = self.backend.spawn(
            partial(SimWorker, **within), f"worker-{index}", ActorOptions(node=node)
        )
        return WorkerClient(handle)

    def memory_of(self, node: str | None) -> Path:
        assert self.directory is not None
        path = self.directory / str(node)
        path.mkdir(exist_ok=True)
        return path

    def spawn_shard(self, index: int) -> ShardClient:
        node = self.nodes[index % len(self.nodes)]
        options: dict[str, Any] = {
            "config": BufferConfig(
                capacity=self.capacity, reinit_prob=0.2, lease_timeout_s=self.lease_timeout_s
            ),
            "spec": SPEC,
            "index": index,
            "capacity": self.capacity // 2,
            "max_lease": CHAINS,
            "seed": 1,
            "directory": self.memory_of(node) / str(index) if self.directory else None,
            "num_grants": 6,
            "clock": lambda: self.now,
        }
        if self.carries:
            carried = {"context": Numbered.context}
            options["config"] = BufferConfig(**(options["config"].model_dump() | carried))
            options |= {"data": Numbered(), "fields": Numbered.fields}
        return ShardClient(
            self.backend.spawn(partial(Shard, **options), f"shard-{index}", ActorOptions(node=node))
        )

    def misfortune(self) -> None:
        self.now += self.tick_s
        self.ticks_left -= 1
        if self.ticks_left < 0:
            raise AssertionError("deadlock: the update is not made")
        for parts, chance in ((self.workers, self.kills[0]), (self.shards, self.kills[1])):
            if self.rng.random() < chance:
                self.backend.kill(parts[int(self.rng.integers(len(parts)))].handle)

    def update(self, busy_ticks: int = 0) -> tuple[list[int], np.ndarray]:
        """One update; returns the lags at consumption and the negatives."""
        self.ticks_left = self.max_ticks
        taken = self.flow.take_negatives()
        assert taken.version == self.progress.version
        x = []
        for lease, (num, ref) in zip(taken.leases, taken.negatives, strict=True):
            negatives = self.backend.get(ref, 1.0)
            assert num == lease.num_chains == len(negatives.x) == CHAINS
            assert (negatives.version == lease.version).all()
            x.append(negatives.x)
        for _ in range(busy_ticks):  # the learner computes, rounds go on
            self.scheduler.poll(0.0)
            self.flow.top_up()
        self.progress.step += 1
        self.progress.version += 1
        self.scheduler.set_weights(WEIGHTS, self.progress.version)
        self.check()
        return [taken.version - lease.version for lease in taken.leases], np.concatenate(x)

    def check(self) -> None:
        identities: list[int] = []
        for shard in self.shards:
            if shard.handle.dead:
                continue
            counts = shard.handle.part.counts()
            assert counts.free + counts.leased + counts.ready == self.capacity // 2
            identities += shard.handle.part.identities().tolist()
            if self.carries:
                check_carried(shard.handle.part.snapshot().arrays)
        assert len(set(identities)) == len(identities)


def check_carried(arrays: dict[str, np.ndarray]) -> None:
    """What the chains of a snapshot carry is of one `Numbered` datum each, and their clocks agree
    with their ages."""
    label, clock, condition, pair = (
        arrays[f"context/{name}"] for name in ("label", "clock", "condition", "pair")
    )
    datum = pair[:, 0]
    assert np.array_equal(pair, np.repeat(datum[:, None], 3, 1))
    assert np.array_equal(label, datum % 7)
    assert np.array_equal(condition, np.stack([datum + 0.25, datum + 0.5], 1))
    age = arrays["age"]  # in rounds, of which those that are repaired take fewer steps
    assert ((NUM_STEPS // 4 * age <= clock) & (clock <= NUM_STEPS * age)).all()
