"""A worker gives the same chains to the bit, whether they are sent to it or lie in shared rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebm_dist import energies, samplers
from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout

SPEC = EventSpec((1, 4, 4), "image")
SAMPLER = {"step_size": 0.05, "noise_std": 0.02, "clamp": (-1.0, 1.0), "num_steps": 3}


def make(storage: str, directory: str | None, clock) -> tuple[Shard, Worker, np.ndarray]:
    shard = Shard(
        BufferConfig(capacity=12, reinit_prob=0.3, storage=storage, lease_timeout_s=10.0),  # type: ignore[arg-type]
        SPEC,
        index=0,
        capacity=12,
        max_lease=4,
        seed=3,
        directory=directory,
        num_grants=2,
        clock=clock,
    )
    energy = energies.FAMILY.section("mlp", event_shape=(1, 4, 4))
    sampler = samplers.FAMILY.section("langevin", **SAMPLER)
    worker = Worker(energy, sampler, SPEC, storage=storage)  # type: ignore[arg-type]
    module = energy.build(seed=1)
    return shard, worker, FlatLayout.of(module).pack(module).numpy()


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "uint8"])
def test_rounds_by_rows_are_rounds_by_value_bit_for_bit(storage, tmp_path) -> None:
    ends, replies = [], []
    for directory in (None, str(tmp_path / "shard")):
        shard, worker, weights = make(storage, directory, lambda: 0.0)
        for lease_id in range(8):
            lease = shard.checkout(lease_id, 4, by_rows=directory is not None)
            assert (lease.grant is None) == (directory is None)
            reply = shard.checkin(worker.run_round(lease, weights, lease_id, 3))
            assert reply.accepted
            shard.take(lease_id)
            replies.append(reply.stats)
        ends.append(shard.snapshot().arrays)
    for name, array in ends[0].items():
        assert np.array_equal(array, ends[1][name]), name
    assert replies[:8] == replies[8:]


def test_the_energy_of_a_rounded_chain_is_that_of_where_it_is_stored(tmp_path) -> None:
    shard, worker, weights = make("uint8", str(tmp_path / "shard"), lambda: 0.0)
    shard.checkin(worker.run_round(shard.checkout(0, 4, by_rows=True), weights, 5, 3))
    _, negatives = shard.take(0)
    energy = energies.FAMILY.section("mlp", event_shape=(1, 4, 4)).build(seed=1)
    with torch.no_grad():
        expected = energy(torch.from_numpy(negatives.x)).numpy()
    assert np.allclose(negatives.energy, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("when", ["before it reads", "before it writes"])
def test_a_worker_that_is_overtaken_changes_nothing_and_counts_as_late(when, tmp_path) -> None:
    now = [0.0]
    shard, worker, weights = make("float32", str(tmp_path / "shard"), lambda: now[0])
    lease = shard.checkout(0, 4, by_rows=True)
    before = shard.snapshot().arrays

    def overtake() -> None:
        now[0] = 11.0
        for lease_id in (1, 2, 3):  # all rows change hands
            shard.checkout(lease_id, 4, by_rows=True)

    if when == "before it reads":
        overtake()
    else:
        worker._run = _then(overtake, worker._run)  # type: ignore[method-assign]
    reply = shard.checkin(worker.run_round(lease, weights, 1, 3))
    assert not reply.accepted
    assert reply.lease_id == 0
    assert reply.counts.late_checkins == 1
    for name in ("position", "energy", "version", "age", "chain_id"):
        assert np.array_equal(before[name], shard.snapshot().arrays[name]), name


def _then(after, run):
    def both(*args):
        chain = run(*args)
        after()
        return chain

    return both
