"""Parts of a run on Ray are killed with SIGKILL, one after another, and the run goes on."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from graph_runs import Running, assert_bitwise_equal, children, mapped, rows, run

pytestmark = pytest.mark.ray

RAY = ("runtime.backend=ray", "workers.num_workers=2")
CAPACITY = 96


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    run_dir = tmp_path_factory.mktemp("failures") / "async"
    graph = Running(
        run_dir,
        *RAY,
        "run.steps=1000000",
        "flow.mode=async",
        "flow.max_lag=4",
        "checkpoint.every=50",
        "learner.num_ranks=2",
        "evaluation.every=40",
        "evaluation.fidelity=false",
        "learner.timeout_s=20",
    )
    try:
        graph.wait(lambda: graph.step >= 60, "the first updates", 400)
        yield graph
    finally:
        graph.end()


def goes_on(graph: Running, num: int = 60) -> None:
    """Updates past all that were done so far are made."""
    goal = graph.step + num
    graph.wait(lambda: graph.step >= goal, f"update {goal}")


def report(part: str, times: tuple[float, float]) -> None:
    print(f"{part}: noticed after {times[0]:.1f} s, replaced after {times[1]:.1f} s")


def test_a_killed_worker_is_replaced_and_its_rounds_redone(running: Running) -> None:
    report("worker", running.kill("worker-0"))
    goes_on(running)


def test_a_killed_shard_keeps_its_chains_and_refuses_the_old_leases(running: Running) -> None:
    report("shard", running.kill("shard-1"))
    running.wait(lambda: "is back with all 48 chains" in running.log, "the chains of the shard")
    assert "rolled back" not in running.log
    goes_on(running)


def test_a_killed_hub_costs_no_update(running: Running) -> None:
    before = running.step
    report("hub", running.kill("hub"))
    goes_on(running)
    steps = [row["step"] for row in rows(running.dir) if "flow/lag_max" in row]
    # Rows may be doubled or be lost in the hub's own queue; a gap would be updates unseen.
    near = [step for step in steps if step >= before]
    assert set(range(before, before + 40)) - set(near) <= set(range(before, before + 5))


def test_a_killed_evaluator_costs_no_update_and_the_next_measures_again(running: Running) -> None:
    report("evaluator", running.kill("evaluator"))
    before = running.step
    goes_on(running, 120)
    running.wait(
        lambda: any(r["step"] > before and "energy/test" in r for r in rows(running.dir)),
        "a measurement by the new evaluator",
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_learner_rank_sends_the_learners_back_to_the_last_cut(
    rank: int, running: Running
) -> None:
    restored = running.log.count("the learners go on after")
    report(f"learner rank {rank}", running.kill(f"learner-{rank}"))
    running.wait(lambda: running.log.count("the learners go on after") > restored, "the learners")
    found = re.findall(r"going back (\d+) updates to step_(\d+)", running.log)
    assert 0 <= int(found[-1][0]) <= 50 + 5
    assert int(found[-1][1]) % 50 == 0
    # Shards and workers did not go back with them.
    assert running.log.count("is back with") == 1
    goes_on(running)


def test_afterwards_the_run_stops_on_request_and_every_row_kept_the_invariants(
    running: Running,
) -> None:
    running.family |= children(running.process.pid)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(120) == 75
    assert "stopped at update" in running.log
    seen = [row for row in rows(running.dir) if "buffer/capacity" in row]
    superseded = running.dir / "metrics.superseded.jsonl"
    everything = seen + [
        row
        for row in map(json.loads, superseded.read_text().splitlines())
        if "buffer/capacity" in row
    ]
    for row in everything:
        assert row["buffer/free"] + row["buffer/leased"] + row["buffer/ready"] == CAPACITY
        assert row["buffer/capacity"] == CAPACITY
        assert 0 <= row["flow/lag_mean"] <= row["flow/lag_max"] <= 4
    order = sorted(everything, key=lambda row: (row["epoch"], row["step"]))
    versions = [row["weights/version"] for row in order]
    assert versions == sorted(versions), "versions went back"
    assert max(row["epoch"] for row in order) == 2
    assert order[-1]["fault/restarts"] == 6
    left = [pid for pid in running.family if Path(f"/proc/{pid}").exists() and not _zombie(pid)]
    assert not left, f"processes left behind: {left}"
    assert not mapped(running.dir), "shared memory left behind"


def _zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    return True


def test_in_sync_mode_any_killed_part_leaves_the_weights_bitwise_the_same(tmp_path: Path) -> None:
    steps = ("run.steps=160", "sampler.num_steps=40", "checkpoint.every=10")
    graph = Running(tmp_path / "killed", *RAY, *steps)
    try:
        graph.wait(lambda: graph.step >= 12, "the first updates", 400)
        for part in ("worker-0", "shard-0", "learner-0", "hub", "shard-1", "worker-1"):
            report(f"sync, {part}", graph.kill(part))
            goal = graph.step + 5
            graph.wait(lambda goal=goal: graph.step >= goal, f"update {goal}")
        assert graph.process.wait(300) == 0
    finally:
        graph.end()
    assert graph.log.count("going back") == 3
    run(tmp_path / "whole", *steps)
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "killed")
