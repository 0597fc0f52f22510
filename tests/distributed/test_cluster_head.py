"""A head that is lost with its driver: what it leaves behind ends, and another head goes on."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_bed import PORT, Bed, Node, bed, not_permitted
from graph_runs import TINY, assert_bitwise_equal, newest_step, run, wait_for

from ebm_dist.config.run_config import dump, load

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(not_permitted()), reason=str(not_permitted())),
]

# A shard and a worker on each node; Ray puts the ranks where it likes.
OVERRIDES = ("runtime.backend=ray", "buffer.num_shards=3", "learner.num_ranks=2")
MAIN = "import sys; from ebm_dist.cli import main; sys.exit(main())"


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Bed]:
    with bed(tmp_path / "bed") as made:
        (made.directory / "tiny.yaml").write_text(dump(load(TINY)))
        yield made


def train(machines: Bed, head: Node, *overrides: str) -> tuple[subprocess.Popen[bytes], Path]:
    """The driver, on `head`, and its output."""
    config, run_dir = machines.directory / "tiny.yaml", machines.directory / "run"
    command = ["python", "-c", MAIN, "train", str(config), *OVERRIDES, *overrides]
    command += [f"runtime.address={head.address}:{PORT}", "--run-dir", str(run_dir)]
    out = machines.directory / f"driver-on-{head.name}.out"
    return machines.start(head, [*command, "--resume", "auto"], out), out


def train_until_checkpoint(machines: Bed, step: int) -> None:
    """A run on all nodes that is under way."""
    for node in machines.nodes:
        machines.start_ray(node, num_cpus=1)
    driver, out = train(machines, machines.nodes[0], "workers.num_workers=3", "run.steps=100000")
    run_dir = machines.directory / "run"
    wait_for(
        lambda: newest_step(run_dir) >= step or driver.poll() is not None, 300, f"update {step}"
    )
    assert driver.poll() is None, out.read_text()
    log = (run_dir / "run.log").read_text()
    for role in ("worker", "shard"):
        at = set(re.findall(rf"{role}-\d runs as process \d+ on (\S+)", log))
        assert at == {node.address for node in machines.nodes}, role


def left(machines: Bed, nodes: Sequence[Node]) -> dict[str, set[str]]:
    """What runs on `nodes`: parts of a run, raylets, and anything at all, as Ray's agents."""
    lines = {line for node in nodes for line in machines.processes(node).values()}
    return {
        "parts": {line for line in lines if line.startswith("ray::") and "Agent" not in line},
        "raylets": {line for line in lines if "/raylet/raylet " in line},
        "anything": lines,
    }


def watch_them_end(
    machines: Bed, nodes: Sequence[Node], since: float, timeout: float = 480.0
) -> dict[str, float]:
    """Seconds from `since` until the last of each kind of process had ended on `nodes`."""
    ended: dict[str, float] = {}
    while len(ended) < 3:
        for kind, lines in left(machines, nodes).items():
            if lines:
                ended.pop(kind, None)
            else:
                ended.setdefault(kind, time.monotonic() - since)
        assert time.monotonic() < since + timeout, left(machines, nodes)
        time.sleep(0.2)
    return ended


def assert_goes_on_to_the_same_bits(
    machines: Bed, tmp_path: Path, head: Node, *overrides: str
) -> float:
    """Resume on `head`, and compare with a run that nothing happened to; seconds it took."""
    run_dir = machines.directory / "run"
    steps = f"run.steps={newest_step(run_dir) + 20}"
    began = time.monotonic()
    driver, out = train(machines, head, *overrides, steps)
    code = driver.wait(400)
    took = time.monotonic() - began
    assert code == 0, out.read_text()
    assert "resumed from step_" in out.read_text()
    assert run(tmp_path / "whole", *OVERRIDES, "workers.num_workers=2", steps).finished
    assert_bitwise_equal(tmp_path / "whole", run_dir)
    return took


# Nobody tells a node that its head is without power: it asks for minutes.
@pytest.mark.timeout(1200)
def test_power_lost_on_the_head_leaves_nothing_elsewhere_and_another_node_goes_on(
    machines: Bed, tmp_path: Path
) -> None:
    train_until_checkpoint(machines, 8)
    head, *others = machines.nodes
    machines.power_loss(head)
    ended = watch_them_end(machines, others, time.monotonic())
    print(f"power of the head lost: ended on the other nodes after {ended} s")
    machines.start_ray(others[0], num_cpus=1, head=others[0])
    machines.start_ray(others[1], num_cpus=1, head=others[0])
    took = assert_goes_on_to_the_same_bits(machines, tmp_path, others[0], "workers.num_workers=2")
    print(f"20 updates on another head took {took:.1f} s, start included")


def test_a_killed_head_that_is_started_again_goes_on_beside_what_is_left_of_the_old_run(
    machines: Bed, tmp_path: Path
) -> None:
    train_until_checkpoint(machines, 8)
    head, *others = machines.nodes
    machines.end_all(head)
    killed = time.monotonic()
    assert left(machines, others)["parts"]
    with ThreadPoolExecutor() as pool:
        watching = pool.submit(watch_them_end, machines, others, killed)
        machines.start_ray(head, num_cpus=1)
        up = time.monotonic() - killed
        took = assert_goes_on_to_the_same_bits(machines, tmp_path, head, "workers.num_workers=1")
        print(
            f"head killed, and up after {up:.1f} s; 20 updates on it alone took {took:.1f} s more"
        )
        print(f"ended on the other nodes after {watching.result()} s")
    # Had the nodes of the old cluster joined this one, they would have got their share.
    resumed = (machines.directory / "run" / "run.log").read_text().split("Ray's logs")[-1]
    assert set(re.findall(r"runs as process \d+ on (\S+)", resumed)) == {head.address}
