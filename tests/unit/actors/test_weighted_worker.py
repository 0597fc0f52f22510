"""A round on weighted chains: what the learner is shown, what is resampled, what comes back."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ebm_dist.actors.worker import Worker
from ebm_dist.config.run_config import load
from ebm_dist.core.types import EventSpec, Lease, MovedChains
from ebm_dist.core.weights import FlatLayout

sys.path.insert(0, str(Path(__file__).parents[1] / "buffer"))
from shards import make_shard, move
from small_runs import SMALL, curve, run

NUM = 4096


def round_of(threshold: float, sampler: str = "{name: mala, step_size: 0.5}") -> tuple:
    """A lease of draws from N(0, 4^2), weighted as such, and its round under E(x) = x^2."""
    config = load(SMALL, [f"sampler={sampler}"])
    worker = Worker(
        config.energy, config.sampler, EventSpec((1,), "real"), resample_threshold=threshold
    )
    g = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(NUM, 1, generator=g).numpy()
    rows = np.arange(NUM)
    minus_log_q = 0.5 * (x[:, 0] / 4) ** 2 + math.log(4 * math.sqrt(2 * math.pi))
    lease = Lease(
        lease_id=7,
        shard=0,
        shard_epoch=0,
        slots=rows,
        generations=rows,
        chain_id=rows,
        seed=11,
        deadline=0.0,
        position=x,
        log_weight=minus_log_q.astype(np.float32),
        version=np.full(NUM, -1),
        energy=np.zeros(NUM, np.float32),
    )
    module = config.energy.build()
    moved = worker.run_round(lease, FlatLayout.of(module).pack(module).numpy(), 5, 6)
    assert isinstance(moved, MovedChains)
    return lease, moved


def log_mean(log_weight: np.ndarray) -> float:
    return float(np.logaddexp.reduce(log_weight.astype(np.float64)) - math.log(len(log_weight)))


def test_the_learner_is_shown_the_chains_before_they_move_with_the_weights_of_its_version() -> None:
    lease, moved = round_of(0.01)
    shown = moved.negatives
    assert shown is not None
    assert moved.ancestors is None
    np.testing.assert_array_equal(shown.x, lease.position)
    np.testing.assert_allclose(shown.energy, lease.position[:, 0] ** 2, rtol=1e-5)
    assert (shown.version == 5).all()
    # Between what was shown and what the next jump is measured at, every chain has moved.
    assert float(np.abs(moved.position - lease.position).min()) >= 0
    assert float((moved.position != lease.position).mean()) > 0.9
    # E = x^2 is N(0, 1/2) with Z = sqrt(pi): importance sampling from N(0, 16).
    w = np.exp(shown.log_weight.astype(np.float64))
    error = w.std() / w.mean() / math.sqrt(NUM)
    assert abs(log_mean(shown.log_weight) - 0.5 * math.log(math.pi)) < 4 * error
    second = (w * shown.x[:, 0] ** 2).sum() / w.sum()
    spread = math.sqrt(float((w**2 * (shown.x[:, 0] ** 2 - 0.5) ** 2).sum())) / w.sum()
    assert abs(second - 0.5) < 4 * spread


def test_resampled_chains_part_before_they_are_seen_and_keep_the_mean_weight() -> None:
    lease, moved = round_of(0.5)
    shown, ancestors = moved.negatives, moved.ancestors
    assert shown is not None
    assert ancestors is not None
    # The learner still has the weighted ones, all different.
    np.testing.assert_array_equal(shown.x, lease.position)
    assert len(np.unique(ancestors)) < 0.6 * NUM
    assert np.ptp(moved.log_weight) == 0
    assert log_mean(moved.log_weight) == pytest.approx(log_mean(shown.log_weight), abs=1e-5)
    # Copies have moved by noise of their own; only moves refused six times over leave twins.
    assert len(np.unique(moved.position)) > 0.95 * NUM
    # They now follow exp(-x^2): variance 1/2, of which an average over NUM is off by this much,
    # and by the copies' common ancestors.
    error = 0.5 * math.sqrt(2 / NUM) * math.sqrt(NUM / len(np.unique(ancestors)) + 1)
    assert abs(float(moved.position.var()) - 0.5) < 4 * error


def test_a_copy_has_the_age_of_the_chain_that_it_continues() -> None:
    shard = make_shard(capacity=8, max_lease=8, config={"jarzynski": True})
    first = shard.checkout(1, 4)
    assert first is not None
    shard.checkin(move(first))
    shard.take(1)
    # All eight, of which four have an age of one.
    lease = shard.checkout(2, 8)
    assert lease is not None
    old = int(np.flatnonzero(np.isin(lease.slots, first.slots))[0])
    new = int(np.flatnonzero(~np.isin(lease.slots, first.slots))[0])
    ancestors = np.array([old] * 5 + [new] * 3)
    shard.checkin(move(lease, ancestors=ancestors))
    ages = shard.snapshot().arrays["age"][lease.slots]
    assert ages.tolist() == [2] * 5 + [1] * 3
    assert shard.counts().resampled == 1


def test_an_update_may_have_more_negatives_than_data(tmp_path: Path) -> None:
    # 4 leases of 64 from 2 shards of 128, beside a batch of 128.
    run(tmp_path / "r", "buffer.num_negatives=256", "tracking.log_every=1", "run.steps=3")
    per_update = curve(tmp_path / "r", "flow/mcmc_steps_per_update")
    assert set(per_update.values()) == {256 * 4}
