"""Parts of a run on Ray and its driver are killed, and every chain keeps what it carries."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from graph_runs import (
    NUM_LEVELS,
    TEMPERED,
    TINY,
    Running,
    assert_bitwise_equal,
    chains,
    newest_step,
    run,
)

pytestmark = pytest.mark.ray

CAPACITY, NUM_STEPS = TINY["buffer"]["capacity"], 20
CHAINS = (*TEMPERED, f"sampler.num_steps={NUM_STEPS}", "buffer.reinit_prob=0.05")
RAY = (*CHAINS, "runtime.backend=ray", "workers.num_workers=2", "checkpoint.every=10")


def assert_every_chain_once_with_its_context(run_dir: Path) -> dict[str, np.ndarray]:
    """The chains of the newest checkpoint."""
    found = chains(run_dir)
    assert np.array_equal(found["chain_id"], np.arange(CAPACITY))
    level, clock, age = (found[name] for name in ("context/level", "context/clock", "age"))
    assert np.isin(level, range(NUM_LEVELS)).all()
    assert len(np.unique(level)) == NUM_LEVELS
    # The clock is committed beside the level: it tells of a commit that was made by half.
    assert np.array_equal(clock, NUM_STEPS * age)
    assert len(np.unique(age)) > 5
    assert np.isfinite(found["position"]).all()
    return found


def kill(graph: Running, *parts: str) -> None:
    """SIGKILL one part after another; five updates more are made after each."""
    for part in parts:
        graph.kill(part)
        goal = graph.step + 5
        graph.wait(lambda goal=goal: graph.step >= goal, f"update {goal}")


@pytest.mark.slow
def test_killed_workers_shards_and_drivers_leave_every_chain_once_with_its_context(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "async"
    # No chain restarts, and a round that is too old is dropped: none has fewer steps.
    flow = ("flow.mode=async", "flow.max_lag=4", "flow.stale=drop", "buffer.reinit_prob=0")
    # A run as long as this is said to be would try to compile its steps.
    options = (*RAY, *flow, "run.steps=1000000", "sampler.engine=eager")
    graph = Running(run_dir, *options)
    try:
        graph.wait(lambda: newest_step(run_dir) >= 20, "a checkpoint", 400)
        kill(graph, "worker-0", "shard-1", "shard-0")
        assert graph.log.count("is back with all 48 chains") == 2
        past = graph.step + 10
        graph.wait(lambda: newest_step(run_dir) >= past, "a checkpoint of the chains since")
        os.kill(graph.process.pid, signal.SIGKILL)
    finally:
        graph.end()
    step = newest_step(run_dir)
    before = assert_every_chain_once_with_its_context(run_dir)

    graph = Running(run_dir, *options, "--resume", "must")
    try:
        graph.wait(lambda: graph.step >= step + 10, "the resumed updates", 400)
        kill(graph, "shard-1", "worker-1")
        graph.wait(lambda: graph.step >= step + 60, "a move of every chain")
        graph.process.send_signal(signal.SIGTERM)
        assert graph.process.wait(120) == 75
    finally:
        graph.end()
    assert newest_step(run_dir) >= step + 60
    after = assert_every_chain_once_with_its_context(run_dir)
    assert (after["age"] >= before["age"]).all(), "chains were begun anew"
    assert (after["age"] > before["age"]).mean() > 0.9
    assert (before["context/level"] != after["context/level"]).any()


@pytest.mark.slow
def test_in_sync_mode_killed_workers_and_shards_leave_chains_and_weights_bitwise_the_same(
    tmp_path: Path,
) -> None:
    steps = "run.steps=160"
    graph = Running(tmp_path / "killed", *RAY, steps)
    try:
        graph.wait(lambda: graph.step >= 12, "the first updates", 400)
        kill(graph, "worker-0", "shard-0", "shard-1")
        assert graph.process.wait(300) == 0
    finally:
        graph.end()
    run(tmp_path / "whole", *CHAINS, steps)
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "killed")
    killed = assert_every_chain_once_with_its_context(tmp_path / "killed")
    whole = chains(tmp_path / "whole")
    # A generation counts the voided leases too, and no version is given twice.
    names = whole.keys() - {"generation", "version"}
    different = [name for name in sorted(names) if not np.array_equal(whole[name], killed[name])]
    assert not different
