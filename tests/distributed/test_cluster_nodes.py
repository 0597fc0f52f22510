"""A training run on three machines outlives a slow cable, a cut one, and a machine without power.

The machines are namespaces of this one (`cluster_bed`); Ray, its settings and the run are the real
ones. The tests share a run and follow each other.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_bed import HEAD, PORT, Bed, Node, bed, not_permitted
from graph_runs import TINY, rows, wait_for

from ebm_dist.config.run_config import dump, load

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(not_permitted()), reason=str(not_permitted())),
]

CAPACITY = 6144
MAX_LAG = 4
# Leases and weights are over 100 KiB each, so that they travel as objects between the nodes'
# stores; smaller ones would ride along with Ray's messages.
OVERRIDES = (
    *("runtime.backend=ray", f"runtime.address={HEAD}:{PORT}", "run.steps=1000000"),
    *("flow.mode=async", f"flow.max_lag={MAX_LAG}", "checkpoint.every=50", "learner.num_ranks=2"),
    *("workers.num_workers=3", "workers.num_chains=512", "data.batch_size=1024"),
    *(f"buffer.capacity={CAPACITY}", "buffer.num_shards=3", "learner.port=6384"),
)
MAIN = "import sys; from ebm_dist.cli import main; sys.exit(main())"


def crowd() -> float:
    """How much longer processes take to start because of other work: 1 up to 5 to a core.

    The successors of a lost node's parts are nothing else for most of their time.
    """
    return max(1.0, os.getloadavg()[0] / (5.0 * (os.cpu_count() or 1)))


class Running:
    """A run whose driver is on the head."""

    def __init__(self, machines: Bed, name: str, *overrides: str) -> None:
        self.machines = machines
        self.dir = machines.directory / name
        config = machines.directory / "tiny.yaml"
        config.write_text(dump(load(TINY)))
        command = ["python", "-c", MAIN, "train", str(config), *OVERRIDES, *overrides]
        self.out = machines.directory / f"{name}.out"
        head = machines.nodes[0]
        self.process = machines.start(head, [*command, "--run-dir", str(self.dir)], self.out)

    @property
    def log(self) -> str:
        path = self.dir / "run.log"
        return path.read_text() if path.exists() else ""

    @property
    def step(self) -> int:
        return max((row["step"] for row in rows(self.dir)), default=0)

    @property
    def last(self) -> dict[str, Any]:
        return [row for row in rows(self.dir) if "buffer/capacity" in row][-1]

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = 240.0) -> float:
        """Seconds until it holds."""
        began = time.monotonic()

        def check() -> bool:
            if self.process.poll() is not None and not condition():
                raise AssertionError(f"ended while waiting for {what}")
            return bool(condition())

        try:
            wait_for(check, timeout, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.out.read_text()}\n{self.log}") from None
        return time.monotonic() - began

    def goes_on(self, num: int = 20, timeout: float = 240.0) -> float:
        goal = self.step + num
        return self.wait(lambda: self.step >= goal, f"update {goal}", timeout)

    def places(self) -> dict[str, tuple[int, str]]:
        """Process and node address of each part, the latest where it was replaced."""
        found = re.findall(r"(\S+) runs as process (\d+) on (\S+)", self.log)
        return {name: (int(pid), address) for name, pid, address in found}

    def addresses(self, role: str) -> set[str]:
        return {at for name, (_, at) in self.places().items() if name.startswith(role)}

    def said(self, pattern: str, since: datetime.datetime) -> float | None:
        """Seconds from `since` to the first line that has `pattern`."""
        for line in self.log.splitlines():
            found = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ", line)
            if found and re.search(pattern, line):
                at = datetime.datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f")
                if at >= since:
                    return (at - since).total_seconds()
        return None


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with bed(tmp_path_factory.mktemp("bed") / "bed") as made:
        for node in made.nodes:
            made.start_ray(node, num_cpus=1)
        yield made


@pytest.fixture(scope="module")
def running(machines: Bed) -> Running:
    # Offline, a run's alerts are in its spool for W&B.
    run = Running(machines, "run", "tracking.wandb=offline")
    run.wait(lambda: run.step >= 30, "the first updates", 400)
    return run


def report(what: str, **seconds: float) -> None:
    print(f"{what}: " + ", ".join(f"{k} after {v:.1f} s" for k, v in seconds.items()))


def test_the_parts_are_on_all_nodes_and_the_ranks_on_two(machines: Bed, running: Running) -> None:
    # Ray puts ranks that ask for no GPU anywhere. Killed, the group starts anew, elsewhere.
    for _ in range(12):
        at = running.addresses("learner")
        if len(at) == 2:
            break
        pid, address = running.places()["learner-1"]
        node = next(node for node in machines.nodes if node.address == address)
        machines.run(node, ["kill", "-KILL", str(pid)])
        running.wait(lambda pid=pid: running.places()["learner-1"][0] != pid, "another group")
        running.goes_on()
    assert len(running.addresses("learner")) == 2
    assert len(running.addresses("worker")) == 3
    assert len(running.addresses("shard")) >= 2


def test_a_killed_shards_chains_stay_in_the_memory_of_its_node(
    machines: Bed, running: Running
) -> None:
    shard, (pid, address) = next(
        (name, at)
        for name, at in running.places().items()
        if name.startswith("shard") and at[1] != HEAD
    )
    node = next(node for node in machines.nodes if node.address == address)
    machines.run(node, ["kill", "-KILL", str(pid)])
    back = f"{shard} is back with all {CAPACITY // 3} chains"
    running.wait(lambda: back in running.log, "the shard with its chains")
    running.goes_on()
    assert running.places()[shard][0] != pid
    assert running.places()[shard][1] == address
    # Each machine has a shared memory of its own: nothing else goes by rows.
    assert 0 < running.last["flow/rounds_by_rows"] <= running.last["flow/local_rounds"]
    assert running.last["buffer/late_checkins"] == 0


def test_a_slow_cable_slows_the_run_and_breaks_nothing(machines: Bed, running: Running) -> None:
    before = running.last
    took = running.goes_on(10)
    machines.slow_down(node_of_a_rank(machines, running), rate="20mbit")
    slow = running.goes_on(10)
    machines.full_speed(node_of_a_rank(machines, running))
    report("slow cable (20 Mbit/s), ten updates", before=took, during=slow)
    assert running.last["fault/restarts"] == before["fault/restarts"]
    assert running.last["epoch"] == before["epoch"]


def test_a_cable_cut_for_20_s_costs_no_chain_and_no_update(machines: Bed, running: Running) -> None:
    running.goes_on()
    before = running.last
    for node in machines.nodes[1:]:
        machines.cut(node)
        time.sleep(20.0)
        machines.mend(node)
        report(f"cable of {node.name} cut for 20 s, mended: updates", again=running.goes_on())
    for key in ("fault/restarts", "buffer/late_checkins", "buffer/expired_leases", "epoch"):
        assert running.last[key] == before[key], key
    assert "rolled back" not in running.log
    steps = [row["step"] for row in rows(running.dir) if "buffer/capacity" in row]
    assert sorted(set(steps)) == list(range(1, max(steps) + 1))


def test_after_a_power_loss_training_goes_on_within_30_s_of_its_detection(
    machines: Bed, running: Running
) -> None:
    running.goes_on(60)
    node = node_of_a_rank(machines, running)
    lost = {name for name, (_, at) in running.places().items() if at == node.address}
    at, before = datetime.datetime.now(), running.step
    machines.power_loss(node)
    running.wait(lambda: running.said(" died ", at) is not None, "the loss of the node", 120)
    running.goes_on(5)
    noticed = ray_noticed(machines, at)
    again = (datetime.datetime.now() - at).total_seconds()
    report(f"power of {node.name} with {sorted(lost)}", noticed=noticed, updates_again=again)
    # 18 checks of two seconds each.
    assert noticed < 45
    assert again - noticed < 30 * crowd(), running.log
    for shard in (name for name in lost if name.startswith("shard")):
        found = re.search(
            rf"{shard} is back with (\d+) chains rolled back to update (\d+)", running.log
        )
        assert found, shard
        assert int(found[1]) == CAPACITY // 3
        assert before - 55 <= int(found[2]) <= before + 5
    running.goes_on(40)
    survivors = {other.address for other in machines.nodes} - {node.address}
    parts = {n: at for n, (_, at) in running.places().items() if n.startswith(("learner", "shard"))}
    assert set(parts.values()) <= survivors
    running.wait(lambda: alerts_of_lost_nodes(running), "the alert of the lost node")
    (alert,) = alerts_of_lost_nodes(running)
    assert f"; {len(survivors)} nodes are left." in alert["text"]


def test_a_node_whose_ray_is_killed_is_waited_for_and_then_replaced(
    machines: Bed, running: Running
) -> None:
    running.goes_on(60)
    node = node_of_a_rank(machines, running)
    lost = {name for name, (_, at) in running.places().items() if at == node.address}
    found = machines.run(node, ["pgrep", "-x", "raylet"]).stdout.split()
    assert len(found) == 1
    at = datetime.datetime.now()
    machines.run(node, ["kill", "-KILL", *found])
    node.alive = False
    running.wait(lambda: running.said(" died ", at) is not None, "the loss of the node", 120)
    running.goes_on(5)
    noticed = ray_noticed(machines, at)
    again = (datetime.datetime.now() - at).total_seconds()
    report(f"Ray of {node.name} with {sorted(lost)}", noticed=noticed, updates_again=again)
    # A refused connection ends a check at once, so they are one second apart.
    assert noticed < 30
    assert again - noticed < 30 * crowd(), running.log
    parts = {n: at for n, (_, at) in running.places().items() if n.startswith(("learner", "shard"))}
    assert node.address not in set(parts.values())


def test_afterwards_the_run_stops_on_request_with_its_invariants_kept(
    machines: Bed, running: Running
) -> None:
    machines.signal(running.process, signal.SIGTERM)
    assert running.process.wait(120) == 75
    assert "stopped at update" in running.log
    left = machines.run(machines.nodes[0], ["ls", "/dev/shm"]).stdout.split()
    assert not [name for name in left if name.startswith("ebm_dist-")]
    seen = [row for row in rows(running.dir) if "buffer/capacity" in row]
    superseded = running.dir / "metrics.superseded.jsonl"
    if superseded.exists():
        lines = [json.loads(line) for line in superseded.read_text().splitlines()]
        seen += [row for row in lines if "buffer/capacity" in row]
    for row in seen:
        # In the first rows a shard that has not answered yet is not counted at all.
        capacity = row["buffer/capacity"] if row["step"] <= 10 else CAPACITY
        assert row["buffer/free"] + row["buffer/leased"] + row["buffer/ready"] == capacity
        assert 0 <= row["flow/lag_mean"] <= row["flow/lag_max"] <= MAX_LAG
    order = sorted(seen, key=lambda row: (row["epoch"], row["step"]))
    versions = [row["weights/version"] for row in order]
    assert versions == sorted(versions), "versions went back"


def test_wandb_holds_cpus_and_memory_of_all_three_nodes(running: Running) -> None:
    assert running.process.poll() is not None
    # One directory for each hub: a hub that its node took along has a successor.
    attempts = sorted((running.dir / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary"]
    done = subprocess.run(
        [*command, str(attempts[-1])], check=True, capture_output=True, text=True, timeout=60
    )
    nodes = json.loads(done.stdout)["config"]["nodes"]
    assert [node["CPU"] for node in nodes] == [1, 1, 1]
    assert all(node["memory"] > 0 for node in nodes)
    assert len({node["id"] for node in nodes}) == 3
    assert HEAD.rpartition(".")[0] not in json.dumps(nodes), "an address is on W&B"


def node_of_a_rank(machines: Bed, running: Running) -> Node:
    """A node that is not the head, one with a learner rank if there is one."""
    at = running.addresses("learner")
    others = [node for node in machines.nodes[1:] if node.alive]
    return max(others, key=lambda node: node.address in at)


def alerts_of_lost_nodes(running: Running) -> list[dict[str, Any]]:
    items = rows(running.dir, "wandb/spool.jsonl")
    return [item for item in items if item.get("title") == "A node of the cluster is lost"]


def ray_noticed(machines: Bed, since: datetime.datetime) -> float:
    """Seconds from `since` to when Ray's control store gave a node up."""
    times = []
    logs = Path(machines.directory / "head" / "ray").glob("session_2*/logs/gcs_server.out")
    for line in "\n".join(log.read_text() for log in logs).splitlines():
        found = re.match(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ", line)
        if found and re.search(r"Node is dead because", line):
            at = datetime.datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f")
            times.append((at - since).total_seconds())
    return min(t for t in times if t > 0)
