"""`flow.mode: sync` gives the same weights, bit for bit, however the run is spread and broken."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch
from graph_runs import (
    TEMPERED,
    assert_bitwise_equal,
    newest_step,
    run,
    start,
    wait_for,
    weights,
)

from ebm_dist.samplers.compile import compiler


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("sync") / "inline"
    assert run(run_dir).finished
    return run_dir


def kill_after_checkpoint(run_dir: Path, step: int, *overrides: str) -> None:
    """Start a run and SIGKILL its driver once the checkpoint of `step` is there."""
    process = start(run_dir, *overrides)
    try:
        wait_for(
            lambda: newest_step(run_dir) >= step or process.poll() is not None, 400, "a checkpoint"
        )
        assert process.poll() is None, (run_dir.parent / f"{run_dir.name}.out").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run_dir / "export").exists(), "the run was over before it was killed"


def test_two_runs_of_one_seed_are_bitwise_equal_and_of_two_seeds_are_not(
    inline: Path, tmp_path: Path
) -> None:
    run(tmp_path / "again")
    assert_bitwise_equal(inline, tmp_path / "again")
    run(tmp_path / "other", "run.seed=4")
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(inline, tmp_path / "other")


def assert_resumed_equals_uninterrupted(
    tmp_path: Path, *overrides: str, both: tuple[str, ...] = ()
) -> None:
    """A run of `overrides` and `both` against an unbroken inline one of `both` alone."""
    overrides = (*overrides, *both)
    kill_after_checkpoint(tmp_path / "killed", 4, *overrides, "run.steps=4000")
    newest = newest_step(tmp_path / "killed")
    steps = f"run.steps={newest + 6}"
    assert run(tmp_path / "killed", *overrides, steps, resume="must").step == newest + 6
    run(tmp_path / "whole", *both, steps)
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "killed")


def test_a_run_killed_half_way_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    assert_resumed_equals_uninterrupted(tmp_path)


needs_compiler = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"cannot compile: {compiler.missing()}"
)


@pytest.mark.slow
@pytest.mark.ray
@needs_compiler
def test_compiled_rounds_are_bitwise_alike_inline_and_on_four_workers_killed_and_resumed(
    inline: Path, tmp_path: Path
) -> None:
    compiled = "sampler.engine=compiled"
    run(tmp_path / "here", compiled)
    log = (tmp_path / "here" / "run.log").read_text()
    assert "compiled runs blocks of 4 steps" in log
    with pytest.raises(AssertionError, match="differ"):  # to the last bit; it did run compiled
        assert_bitwise_equal(inline, tmp_path / "here")
    run(tmp_path / "ray4", compiled, "runtime.backend=ray", "workers.num_workers=4")
    assert_bitwise_equal(tmp_path / "here", tmp_path / "ray4")
    assert_resumed_equals_uninterrupted(tmp_path, both=(compiled,))


@pytest.mark.ray
def test_one_ray_worker_is_bitwise_inline(inline: Path, tmp_path: Path) -> None:
    run(tmp_path / "ray1", "runtime.backend=ray")
    assert_bitwise_equal(inline, tmp_path / "ray1")


@pytest.mark.ray
def test_four_ray_workers_killed_with_their_driver_and_resumed_are_bitwise_inline(
    tmp_path: Path,
) -> None:
    assert_resumed_equals_uninterrupted(tmp_path, "runtime.backend=ray", "workers.num_workers=4")


@pytest.mark.ray
def test_chains_at_moving_levels_killed_with_their_driver_and_resumed_are_bitwise_inline(
    tmp_path: Path,
) -> None:
    ray = ("runtime.backend=ray", "workers.num_workers=2")
    assert_resumed_equals_uninterrupted(tmp_path, *ray, both=TEMPERED)


@pytest.mark.ray
def test_chains_that_start_from_data_are_bitwise_the_same_on_ray(tmp_path: Path) -> None:
    cd = ("buffer.init=data", "buffer.reinit_prob=1.0", "buffer.data_noise_std=0.1")
    run(tmp_path / "inline", *cd)
    run(tmp_path / "ray", *cd, "runtime.backend=ray", "workers.num_workers=3")
    assert_bitwise_equal(tmp_path / "inline", tmp_path / "ray")


@pytest.mark.ray
def test_two_learner_ranks_equal_one_to_rounding(tmp_path: Path) -> None:
    # Plain SGD: Adam would blow the rounding of a gradient near zero up to a whole step.
    sgd = ("learner.optimizer=sgd", "learner.lr=0.05")
    run(tmp_path / "one", *sgd)
    run(tmp_path / "early", *sgd, "run.steps=1")
    run(tmp_path / "two", *sgd, "runtime.backend=ray", "learner.num_ranks=2")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    early = weights(tmp_path / "early")
    assert max(float((one[name] - early[name]).abs().max()) for name in one) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
