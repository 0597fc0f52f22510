"""The driver is killed with SIGKILL at random moments, and each time a new one goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import Popen

import pytest
from graph_runs import assert_bitwise_equal, newest_step, run, start, wait_for

# Many chains and few updates between: cuts are differences, and one is nearly always being written.
OVERRIDES = ("buffer.capacity=960", "checkpoint.every=3", "checkpoint.keep=2")
RAY = ("runtime.backend=ray", "workers.num_workers=2")

MOMENTS = ("writing", "any", "writing", "start")

# Forked off a process that has torch and DeepSpeed, a run starts in a fraction of a second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["ebm_dist.run.train", "ebm_dist.learner.engine", "deepspeed", "graph_runs"]
)


def half_written(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".step_*.part"))


def alive(process: BaseProcess | Popen[bytes]) -> bool:
    return process.poll() is None if isinstance(process, Popen) else process.is_alive()


def kill_one_life(run_dir: Path, rng: random.Random, *, moment: str, ray: bool) -> bool:
    """Start a driver and kill it.

    Args:
        moment: `start`, while it starts or resumes; `any`, in its first seconds of training;
            `writing`, once a checkpoint is half-written.

    Returns:
        Whether a checkpoint was half-written when it died.
    """
    begun = newest_step(run_dir)
    options = (*OVERRIDES, f"run.steps={max(begun, 0) + 3000}")
    process: BaseProcess | Popen[bytes]
    if ray:
        process = start(run_dir, *options, *RAY)
    else:
        process = FORKS.Process(target=run, args=(run_dir, *options))
        process.start()
    try:
        if moment != "start":  # after a resume the first cut is a new one
            wait_for(
                lambda: newest_step(run_dir) > begun or not alive(process),
                120,
                "a first checkpoint",
            )
        time.sleep(rng.uniform(0.0, 2.0))
        assert process.pid is not None
        if moment == "writing":
            deadline = time.monotonic() + 60
            while True:
                assert time.monotonic() < deadline, "no checkpoint is being written"
                assert alive(process), "the run ended by itself"
                if not half_written(run_dir):
                    continue
                time.sleep(rng.uniform(0.0, 0.01))
                # Stopped, so that it cannot finish between the look and the kill: a checkpoint
                # takes a hundredth of a second to write.
                os.kill(process.pid, signal.SIGSTOP)
                if half_written(run_dir):
                    break
                os.kill(process.pid, signal.SIGCONT)
        assert alive(process), (run_dir.parent / f"{run_dir.name}.txt").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait() if isinstance(process, Popen) else process.join()
    return half_written(run_dir)


def survive(tmp_path: Path, *, num_kills: int, ray: set[int], seed: int) -> int:
    """Kill and resume, then finish; the result is that of a run that was left alone.

    Returns:
        How many kills left a half-written checkpoint.
    """
    rng, torn = random.Random(seed), 0
    run_dir = tmp_path / "killed"
    for kill in range(num_kills):
        moment = MOMENTS[kill % len(MOMENTS)]
        torn += kill_one_life(run_dir, rng, moment=moment, ray=kill in ray)
    steps = f"run.steps={max(newest_step(run_dir), 0) + 4}"
    assert run(run_dir, *OVERRIDES, steps, resume="auto").finished
    assert not half_written(run_dir)
    run(tmp_path / "whole", *OVERRIDES, steps)
    assert_bitwise_equal(tmp_path / "whole", run_dir)
    print(f"{num_kills} kills, {torn} of them in a half-written checkpoint; {steps}")
    return torn


def test_a_driver_killed_three_times_ends_with_the_weights_of_one_left_alone(
    tmp_path: Path,
) -> None:
    assert survive(tmp_path, num_kills=3, ray=set(), seed=1) >= 1


@pytest.mark.slow
@pytest.mark.ray
def test_a_driver_killed_twenty_times_ends_with_the_weights_of_one_left_alone(
    tmp_path: Path,
) -> None:
    """Three of the lives are on Ray: killed at any moment, while writing, and while it starts."""
    assert survive(tmp_path, num_kills=20, ray={5, 10, 15}, seed=2) >= 5
