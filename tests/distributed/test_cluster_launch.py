"""What launch/ starts on real machines of the bed: a Ray by hand, a SLURM job over two nodes.

SLURM itself is a stand-in: `srun` hands its command to every node, `scontrol` notes the requeue.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_bed import ROOT, Bed, Node, bed, not_permitted
from graph_runs import TINY, newest_step, rows, wait_for

from ebm_dist.config.run_config import dump, load

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(not_permitted()), reason=str(not_permitted())),
]

OVERRIDES = ("runtime.backend=ray", "flow.mode=async", "learner.num_ranks=2", "checkpoint.every=5")

# Options go; the command is kept for the other node, with its environment, and run here.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
env -0 >"$HOME/job.env.part"
printf '%s\\0' "$@" >"$HOME/job.command.part"
mv "$HOME/job.env.part" "$HOME/job.env" && mv "$HOME/job.command.part" "$HOME/job.command"
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$HOME/scontrol.calls"
"""


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Bed]:
    with bed(tmp_path / "bed", num_nodes=2) as made:
        (made.directory / "tiny.yaml").write_text(dump(load(TINY)))
        yield made


def slurm_job(machines: Bed, job: int, *overrides: str, stop_at: int | None = None) -> int:
    """Run train.sbatch as SLURM would, on both nodes; returns its exit code.

    Args:
        stop_at: send SIGUSR1, as before the time limit, once this update is checkpointed.
    """
    home = machines.directory / f"home-{job}"
    (home / "bin").mkdir(parents=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)
    run_dir, log = machines.directory / "run", machines.directory / f"slurm-{job}.out"
    slurm = {
        "HOME": str(home),
        "PATH": f"{home / 'bin'}:{machines.environment['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "head,node-1",
        # The bed's own token is not the job's.
        "EBM_DIST_INTERFACE": "eth0",
        "RAY_AUTH_TOKEN_PATH": "",
    }
    command = ["bash", "launch/slurm/train.sbatch", str(machines.directory / "tiny.yaml")]
    arguments = [*OVERRIDES, *overrides, "--run-dir", str(run_dir)]
    head, other = machines.nodes
    batch = machines.start(head, [*command, *arguments], log, **slurm)
    wait_for(lambda: (home / "job.command").exists() or batch.poll() is not None, 30, "srun")
    assert batch.poll() is None, log.read_text()
    handed = (home / "job.command").read_text().split("\0")[:-1]
    variables = (home / "job.env").read_text().split("\0")[:-1]
    step = machines.start(other, handed, log, **dict(item.split("=", 1) for item in variables))
    if stop_at is not None:
        wait_for(
            lambda: newest_step(run_dir) >= stop_at or batch.poll() is not None,
            240,
            f"update {stop_at}",
        )
        assert batch.poll() is None, log.read_text()
        machines.signal(batch, signal.SIGUSR1)
    code = batch.wait(240)
    # As with `srun --wait=60`, a step ends on all its nodes before another job gets them. Ray on a
    # node whose head is gone may take longer, and the next job's needs the same ports.
    with contextlib.suppress(subprocess.TimeoutExpired):
        step.wait(60)
    machines.end_all(other)
    print(log.read_text()[-3000:])
    assert not (home / ".ray" / f"ebm_dist-{job}").exists(), "the job's token goes with the job"
    return code


def test_a_slurm_job_trains_on_two_nodes_stops_in_time_and_goes_on(machines: Bed) -> None:
    assert slurm_job(machines, 1, "run.steps=100000", stop_at=10) == 75
    assert "requeue 1" in (machines.directory / "home-1" / "scontrol.calls").read_text()
    run_dir = machines.directory / "run"
    log = (run_dir / "run.log").read_text()
    assert "on 10.77.0.1" in log
    assert "on 10.77.0.2" in log
    stopped = newest_step(run_dir)
    assert slurm_job(machines, 2, f"run.steps={stopped + 10}") == 0
    assert (run_dir / "export" / "model.safetensors").exists()
    steps = [row["step"] for row in rows(run_dir) if "flow/lag_max" in row]
    assert steps == list(range(1, stopped + 11))


def test_local_joins_another_machine_and_stops_there_though_the_head_lost_its_power(
    machines: Bed,
) -> None:
    def local(node: Node, *arguments: str) -> str:
        home = str(machines.directory / node.name)
        done = machines.run(node, ["launch/local.sh", *arguments], HOME=home)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    head, other = machines.nodes
    local(head, "start", "--host", head.address, "--num-cpus=1")
    local(other, "join", head.address, "--host", other.address, "--num-cpus=1")
    wait_for(lambda: "/2.0 CPU" in local(other, "status"), 60, "both nodes in the status")
    machines.power_loss(head)
    began = time.monotonic()
    local(other, "stop")
    print(f"stopped after {time.monotonic() - began:.1f} s")
    # Left alone, its Ray would look for the head for minutes.
    assert not machines.processes(other)
