"""A worker on a GPU: rounds depend on their lease alone, and long ones wait as often as short."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from ebm_dist import energies, samplers
from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPEC = EventSpec((1, 8, 8), "image")
SAMPLER = {"step_size": 0.05, "noise_std": 0.02, "clamp": (-1.0, 1.0), "num_steps": 3}


def make(storage: str, engine: str, *, steady: bool = False) -> tuple[Shard, Worker, np.ndarray]:
    shard = Shard(
        BufferConfig(capacity=16, reinit_prob=0.3, storage=storage),  # type: ignore[arg-type]
        SPEC,
        index=0,
        capacity=16,
        max_lease=8,
        seed=3,
    )
    energy = energies.FAMILY.section("mlp", event_shape=(1, 8, 8))
    sampler = samplers.FAMILY.section("langevin", **SAMPLER, engine=engine)
    worker = Worker(energy, sampler, SPEC, device="cuda", storage=storage, steady=steady)  # type: ignore[arg-type]
    module = energy.build(seed=1)
    return shard, worker, FlatLayout.of(module).pack(module).numpy()


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_two_workers_make_the_same_rounds(storage, engine) -> None:
    ends = []
    for _ in range(2):
        # Steady: which round is the first compiled one would depend on the compiler's speed.
        shard, worker, weights = make(storage, engine, steady=True)
        for lease_id in range(4):
            moved = worker.run_round(shard.checkout(lease_id, 8), weights, lease_id, 3)
            reply = shard.checkin(moved)
            assert reply.accepted
            assert all(np.isfinite(value) for value in reply.stats.values())
            shard.take(lease_id)
        ends.append(shard.snapshot().arrays["position"])
    assert np.array_equal(ends[0], ends[1])


def test_a_round_of_many_steps_waits_as_often_as_one_of_few() -> None:
    shard, worker, weights = make("float32", "eager")
    waits = []
    before = torch.cuda.get_sync_debug_mode()
    for lease_id, num_steps in enumerate((3, 3, 30)):  # the first allocates
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                moved = worker.run_round(shard.checkout(lease_id, 8), weights, 0, num_steps)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        shard.checkin(moved)
        shard.take(lease_id)
        waits.append(len(caught))
    assert waits[1] == waits[2]
