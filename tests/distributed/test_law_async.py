"""With frozen weights the law of the negatives is the same, however many move them ahead."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import ActorOptions, Backend
from ebm_dist.cluster.inline import InlineBackend
from ebm_dist.cluster.ray_backend import RayBackend
from ebm_dist.config.sections import FlowConfig
from ebm_dist.controller.clients import ShardClient, WorkerClient
from ebm_dist.controller.negatives.asynchronous import AsyncNegatives
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.core.section import Section
from ebm_dist.core.types import EventSpec
from ebm_dist.energies import EnergyConfig
from ebm_dist.samplers import SamplerConfig

PRECISION, STEP, CHAINS, NUM_STEPS, UPDATES = 1.5, 0.3, 2000, 20, 40
VARIANCE = 2 / (PRECISION * (2 - PRECISION * STEP))
"""Of Langevin chains on E(x) = a x^2 / 2 at T=1: 2T / (a (2 - a h)), where exp(-E) has 1/a."""


class Parts(Section):
    energy: EnergyConfig
    sampler: SamplerConfig


def negatives(backend: Backend, num_workers: int) -> tuple[np.ndarray, int]:
    """x (N,) of all updates, and the greatest lag."""
    spec = EventSpec((1,), "real")
    parts = Parts.model_validate(
        {
            "energy": {"name": "quadratic", "precision": [PRECISION], "learnable": True},
            "sampler": {"name": "langevin", "step_size": STEP, "temperature": 1.0},
        }
    )
    capacity = 20 * CHAINS
    buffer = BufferConfig(capacity=2 * capacity, num_shards=2, reinit_prob=0.0)

    def shard(index: int) -> ShardClient:
        make = partial(
            Shard, buffer, spec, index=index, capacity=capacity, max_lease=CHAINS, seed=7
        )
        return ShardClient(backend.spawn(make, f"shard-{index}", ActorOptions(any_order=True)))

    make = partial(Worker, parts.energy, parts.sampler, spec)

    def worker(index: int) -> WorkerClient:
        return WorkerClient(backend.spawn(make, f"worker-{index}", ActorOptions(num_threads=1)))

    shards, workers = Shards(backend, [capacity] * 2), WorkerPool(backend)
    shards.start(shard)
    workers.start(num_workers, worker)
    backend.await_started([*shards.handles, *workers.handles])
    progress = Progress()

    def fail(index: int) -> Any:
        raise AssertionError(f"part {index} died")

    scheduler = RoundScheduler(
        backend,
        shards,
        workers,
        on_replaced=fail,
        on_rejected=fail,
        num_chains=CHAINS,
        depth=2,
        hang_s=1e9,
    )
    flow = AsyncNegatives(
        backend,
        shards,
        FlowConfig(mode="async", max_lag=8, stall_timeout_s=120),
        scheduler,
        progress,
        lambda name, num: None,
        num_negatives=2 * CHAINS,
        num_chains=CHAINS,
        num_steps=NUM_STEPS,
    )
    weights = backend.put(np.array([PRECISION], np.float32))
    scheduler.set_weights(weights, 0)
    out, lag = [], 0
    for _ in range(UPDATES):
        taken = flow.take_negatives()
        lag = max(lag, *(taken.version - lease.version for lease in taken.leases))
        out += [backend.get(ref, 60.0).x[:, 0] for _, ref in taken.negatives]
        progress.step += 1
        progress.version += 1
        scheduler.set_weights(weights, progress.version)
    assert len({member.index for member in scheduler.workers.members}) == num_workers
    assert scheduler.restarts == 0
    return np.concatenate(out), lag


def assert_stationary(x: np.ndarray) -> None:
    # Twenty steps forget (1 - a h)^40 = 4e-11 of where a chain was: draws are independent.
    num = len(x)
    assert num == 2 * CHAINS * UPDATES
    assert abs(np.mean(x**2) - VARIANCE) < 4 * VARIANCE * math.sqrt(2 / num)
    assert abs(VARIANCE - 1 / PRECISION) > 4 * VARIANCE * math.sqrt(2 / num)
    assert abs(np.mean(x)) < 4 * math.sqrt(VARIANCE / num)
    assert abs(np.mean(x**4) / VARIANCE**2 - 3) < 4 * math.sqrt(96 / num)


def test_inline_negatives_follow_the_law_of_the_unadjusted_chain() -> None:
    x, lag = negatives(InlineBackend(), 1)
    assert lag <= 1
    assert_stationary(x)


@pytest.mark.ray
@pytest.mark.slow
def test_async_with_eight_workers_has_the_law_of_inline() -> None:
    backend = RayBackend("local", namespace="law", start_timeout_s=300)
    try:
        x, lag = negatives(backend, 8)
    finally:
        backend.close()
    assert 1 <= lag <= 8, "rounds ran ahead"
    assert_stationary(x)
