"""The Ray of a local run is killed under it: the run says so, keeps what it can, can be resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from graph_runs import children, newest_step, pids, rows, start, wait_for

pytestmark = pytest.mark.ray

OPTIONS = (
    "runtime.backend=ray",
    "run.steps=1000000",
    "flow.mode=async",
    "checkpoint.every=1000000",
    "flow.stall_timeout_s=10",
)


def process_of_ray(driver: int, name: str) -> int:
    """The child of the process `driver` that runs Ray's program `name`."""
    for pid in children(driver):
        with contextlib.suppress(OSError):
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            if program.endswith(f"/{name}"):
                return pid
    raise AssertionError(f"no {name} among the children of {driver}")


@pytest.mark.timeout(900)
def test_a_hung_shard_is_replaced_and_a_dead_control_store_ends_the_run_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "r"
    process = start(run_dir, *OPTIONS)

    def step() -> int:
        return max((row["step"] for row in rows(run_dir)), default=0)

    def log() -> str:
        return (run_dir / "run.log").read_text()

    try:
        wait_for(lambda: step() > 5, 500, "the first updates")
        os.kill(pids(run_dir)["shard-0"], signal.SIGSTOP)
        wait_for(lambda: "shard-0 is back with all" in log(), 300, "another shard")
        assert "worker-0 died" not in log()
        reached = step()
        wait_for(lambda: step() > reached + 5, 300, "more updates")
        os.kill(process_of_ray(process.pid, "gcs_server"), signal.SIGKILL)
        killed = time.monotonic()
        assert process.wait(300) == 1
        # By itself Ray ends the driver after 60 s, without a word of ours.
        print(f"ended {time.monotonic() - killed:.1f} s after the control store was killed")
        error = (tmp_path / "r.out").read_text()
        assert "error: Ray on this machine died: its control store was ended by SIGKILL" in error
        assert f"--run-dir {run_dir} --resume must" in error
        assert newest_step(run_dir) > reached
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


@pytest.mark.timeout(900)
def test_a_dead_raylet_is_named_and_no_part_is_blamed(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    process = start(run_dir, *OPTIONS)
    try:
        wait_for(lambda: len(rows(run_dir)) > 5, 500, "the first updates")
        os.kill(process_of_ray(process.pid, "raylet"), signal.SIGKILL)
        assert process.wait(300) == 1
        error = (tmp_path / "r.out").read_text()
        assert "error: Ray on this machine died: its raylet was ended by SIGKILL" in error
        assert f"--run-dir {run_dir} --resume must" in error
        assert "shard-0 died" not in (run_dir / "run.log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
