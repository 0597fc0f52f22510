"""A run on a cluster whose nodes come and go: raylets of one machine stand for the nodes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_runs import children, mapped, newest_step, pids, rows, run, start, wait_for

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.cluster.access import find_token, make_token

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # The nodes have an outer address, and a run joins none of those without a token. It is the
    # user's own: a process reads its token once, and this one may have done so already.
    if find_token() is None:
        make_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


def drain(cluster: Any, node: Any) -> None:
    """What `ray drain-node` does: the node is announced to leave in ten minutes."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 600) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, reason, "test", deadline_ms
    )
    assert accepted, why


def test_a_joined_node_is_used_and_a_draining_one_is_left_without_losing_a_round(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    run_dir = tmp_path / "elastic"
    process = start(
        run_dir,
        "runtime.backend=ray",
        "run.steps=1000000",
        "flow.mode=async",
        "sampler.num_steps=200",  # the learner waits for rounds, whatever the size of the pool
        "sampler.engine=eager",  # a compiler would take the cores from the workers that start
        "flow.max_lag=4",
        "workers.num_workers=3",
        "workers.min_workers=1",
        "workers.max_workers=3",
        "checkpoint.every=100000",
    )

    def log() -> str:
        path = run_dir / "run.log"
        return path.read_text() if path.exists() else ""

    def alive() -> int:
        assert process.poll() is None, log() + (tmp_path / "elastic.out").read_text()
        return int(
            next((r["workers/alive"] for r in rows(run_dir)[::-1] if "workers/alive" in r), 0)
        )

    try:
        # There is room for one of the three: it is not waited for the others.
        wait_for(lambda: alive() == 1, 300, "the first worker")
        node = cluster.add_node(num_cpus=2)
        wait_for(lambda: alive() == 3, 300, "workers on the node that joined")
        drain(cluster, node)
        wait_for(lambda: log().count("its node is draining") == 2, 60, "the drain noticed")
        wait_for(lambda: alive() == 1, 60, "workers that left")
        seen = rows(run_dir)[-1]["step"]
        wait_for(lambda: rows(run_dir)[-1]["step"] > seen + 5, 60, "further updates")
        last = [row for row in rows(run_dir) if "fault/restarts" in row][-1]
        assert last["fault/restarts"] == 0, "they left, none was lost"
        assert last["buffer/expired_leases"] == last["buffer/late_checkins"] == 0
        assert last["flow/local_rounds"] > 0.2
        process.terminate()
        assert process.wait(120) == 75  # stopped by a signal, after a checkpoint
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_a_shard_leaves_a_draining_node_before_it_goes_and_no_chain_is_rolled_back(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that, a driver is killed on the way to its first update, and then a shard's process.

    Both nodes have one shared memory here, in which each run has one directory for each of them.
    """
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    node = cluster.add_node(num_cpus=1)
    run_dir = tmp_path / "leaving"
    options = (
        *("runtime.backend=ray", "run.steps=1000000", "flow.mode=async", "flow.max_lag=4"),
        *("workers.num_workers=2", "checkpoint.every=100000"),
    )

    def shards() -> dict[str, str]:
        """The directory of each shard whose chains are mapped, by its name."""
        found = [file for path in mapped(run_dir) for file in path.glob("shard_*/shape.json")]
        return {file.parent.name.split("-")[0]: file.parents[1].name for file in found}

    def killed() -> list[Path]:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        return mapped(run_dir)

    process = start(run_dir, *options)
    try:
        wait_for(lambda: len(set(shards().values())) == 2, 300, "shards on both nodes")
    finally:
        left = killed()
    assert len(left) == 2
    process = start(run_dir, *options)

    def log() -> str:
        path = run_dir / "run.log"
        return path.read_text() if path.exists() else ""

    def step() -> int:
        assert process.poll() is None, log() + (tmp_path / "leaving.out").read_text()
        return max((row["step"] for row in rows(run_dir)), default=0)

    try:
        wait_for(lambda: step() > 30, 300, "the first updates")
        assert not any(path.exists() for path in left), "what the killed one left is removed"
        assert set(shards()) == {"shard_0000", "shard_0001"}
        assert len(set(shards().values())) == len(mapped(run_dir)) == 2
        last = [row for row in rows(run_dir) if "flow/rounds_by_rows" in row][-1]
        # All that stay on their node, but for those that are under way.
        assert last["flow/local_rounds"] >= last["flow/rounds_by_rows"]
        assert last["flow/rounds_by_rows"] > 0.8 * last["flow/local_rounds"] > 0.2
        there = children(node.all_processes["raylet"][0].process.pid)
        (shard,) = (n for n, pid in pids(run_dir).items() if n.startswith("shard") and pid in there)
        pid = pids(run_dir)[shard]
        os.kill(pid, signal.SIGKILL)
        back = f"{shard} is back with all 48 chains"
        wait_for(lambda: back in log(), 60, "the shard on its node, with its chains")
        wait_for(lambda: pids(run_dir)[shard] != pid, 60, "the log of its process")
        assert pids(run_dir)[shard] in children(node.all_processes["raylet"][0].process.pid)
        seen = step()
        wait_for(lambda: step() > seen + 10, 60, "further updates")
        drain(cluster, node)
        wait_for(lambda: log().count("has left its node") == 1, 60, "the shard's move")
        assert len(set(shards().values())) == 1, "its files went with it"
        seen = step()
        wait_for(lambda: step() > seen + 10, 60, "further updates")
        last = [row for row in rows(run_dir) if "fault/restarts" in row][-1]
        assert last["fault/restarts"] == 1
        assert last["buffer/late_checkins"] == last["buffer/expired_leases"] == 0
        cluster.remove_node(node, allow_graceful=False)
        seen = step()
        wait_for(lambda: step() > seen + 10, 120, "updates without the node")
        assert "rolled back" not in log()
        assert len(re.findall(r"shard-\d died", log())) == 1
        process.terminate()
        assert process.wait(120) == 75
        assert not mapped(run_dir), "shared memory left behind"
        found = checkpoint.latest(run_dir)
        assert found is not None
        ids = [found.arrays(name)["chain_id"] for name in found.names if name.startswith("shard_")]
        assert sorted(np.concatenate(ids).tolist()) == list(range(96))
        ages = [row["chain/age_mean"] for row in rows(run_dir) if "chain/age_mean" in row]
        assert ages[-1] > 0.5 * max(ages), "none began anew but by buffer.reinit_prob"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_learner_ranks_leave_draining_nodes_and_the_result_stays_bit_for_bit(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    head, node = cluster.head_node, cluster.add_node(num_cpus=2)
    ranks = ("learner.num_ranks=2", "flow.mode=sync", "checkpoint.every=100000")
    run_dir = tmp_path / "leaving"
    process = start(run_dir, "runtime.backend=ray", "run.steps=1000000", *ranks)

    def log() -> str:
        path = run_dir / "run.log"
        return path.read_text() if path.exists() else ""

    def step() -> int:
        assert process.poll() is None, log() + (tmp_path / "leaving.out").read_text()
        return max((row["step"] for row in rows(run_dir)), default=0)

    def ranks_on(node: Any) -> int:
        there = children(node.all_processes["raylet"][0].process.pid)
        return sum(pids(run_dir).get(f"learner-{rank}") in there for rank in range(2))

    def leave(left: Any, to: Any) -> None:
        drain(cluster, left)
        wait_for(lambda: ranks_on(to) == 2, 120, "the ranks' move")
        assert ranks_on(left) == 0
        seen = step()
        wait_for(lambda: step() > seen + 10, 60, "further updates")

    try:
        wait_for(lambda: step() > 10, 300, "the first updates")
        # Ray has put each rank where it liked: after this both are on the node that joined.
        leave(head, node)
        other = cluster.add_node(num_cpus=2)
        leave(node, other)
        moves = re.findall(r"left the node.*go on from update (\d+) after (\S+) s", log())
        assert 1 <= len(moves) <= 2
        wait_for(lambda: log().count("has left its node") >= 2, 60, "the shards' moves")
        cluster.remove_node(node, allow_graceful=False)
        seen = step()
        wait_for(lambda: step() > seen + 10, 120, "updates without the node")
        assert "going back" not in log()
        assert rows(run_dir)[-1]["flow/rounds_by_rows"] > 0
        process.terminate()
        assert process.wait(120) == 75
        assert not mapped(run_dir), "shared memory left behind"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    seen = rows(run_dir)
    assert [row["step"] for row in seen] == list(range(1, len(seen) + 1)), "none lost, none twice"
    assert [row["weights/version"] for row in seen] == [row["step"] for row in seen]
    # The learners were replaced, but none of them had died.
    assert seen[-1]["fault/restarts"] == 0
    monkeypatch.delenv("RAY_ADDRESS")
    stayed = tmp_path / "stayed"
    steps = newest_step(run_dir)
    run(stayed, "runtime.backend=ray", *ranks, f"run.steps={steps}")
    found, whole = checkpoint.latest(run_dir), checkpoint.latest(stayed)
    assert found is not None
    assert whole is not None
    assert found.step == whole.step == steps
    for name in whole.names:
        left, right = found.arrays(name), whole.arrays(name)
        different = [key for key in right if not np.array_equal(left[key], right[key])]
        assert not different, f"{name}: {different}"
