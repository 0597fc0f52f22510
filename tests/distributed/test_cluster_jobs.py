"""Runs that launch/submit.sh hands to a Ray with dashboard and token, on two machines of the bed.

Needs ray[default] in the environment: `make test-jobs` makes one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_bed import Bed, bed, not_permitted
from graph_runs import TINY, newest_step, rows, wait_for

from ebm_dist.config.run_config import dump, load

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(not_permitted()), reason=str(not_permitted())),
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp") is None,
        reason="needs ray[default], for its dashboard: make test-jobs",
    ),
]

OVERRIDES = ("runtime.backend=ray", "flow.mode=async", "learner.num_ranks=2", "checkpoint.every=5")
DASHBOARD = "http://127.0.0.1:8265"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Two nodes whose Ray takes jobs."""
    with bed(tmp_path_factory.mktemp("jobs") / "bed", num_nodes=2) as made:
        (made.directory / "tiny.yaml").write_text(dump(load(TINY)))
        for node in made.nodes:
            options = ["--include-dashboard=true"] if node is made.nodes[0] else []
            made.start_ray(node, 2, *options)
        yield made


def submit(
    cluster: Bed, run_dir: Path, *overrides: str, options: Sequence[str] = (), **extra: str
) -> subprocess.CompletedProcess[str]:
    """What launch/submit.sh answers; it never shows the token."""
    command = ["launch/submit.sh", "--run-dir", str(run_dir), *options]
    command += [str(cluster.directory / "tiny.yaml"), *OVERRIDES, *overrides]
    done = cluster.run(cluster.nodes[0], command, timeout=300, HOME=os.environ["HOME"], **extra)
    assert cluster.token not in done.stdout + done.stderr
    return done


def job(cluster: Bed, verb: str, name: str) -> subprocess.CompletedProcess[str]:
    command = ["ray", "job", verb, name, "--address", DASHBOARD]
    return cluster.run(cluster.nodes[0], command, timeout=200)


def test_a_submitted_job_trains_on_two_nodes(cluster: Bed, tmp_path: Path) -> None:
    done = submit(cluster, tmp_path / "run", "run.steps=20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_a_job_that_is_stopped_writes_its_checkpoint_and_the_same_command_goes_on(
    cluster: Bed, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # No checkpoint is due but the first one and the one of the end.
    rare = ("checkpoint.every=100000", "run.steps=100000")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(submit, cluster, run_dir, *rare, options=("--submission-id", "first"))
        wait_for(lambda: len(rows(run_dir)) >= 20 or waiting.done(), 240, "updates")
        stopped = job(cluster, "stop", "first")
        begun = waiting.result(60)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert begun.returncode == 75, begun.stdout + begun.stderr
    assert "was stopped" in job(cluster, "status", "first").stdout
    at = newest_step(run_dir)
    assert at >= 10
    assert f"stopped at update {at}" in (run_dir / "run.log").read_text()
    assert not any("ebm-dist" in line for line in cluster.processes(cluster.nodes[0]).values())
    again = submit(cluster, run_dir, f"run.steps={at + 10}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (run_dir / "export" / "model.safetensors").exists()
    steps = [row["step"] for row in rows(run_dir) if "flow/lag_max" in row]
    assert steps == list(range(1, at + 11))


def test_what_the_user_can_mend_is_exit_code_2_and_one_line_at_the_terminal(
    cluster: Bed, tmp_path: Path
) -> None:
    mistaken = submit(cluster, tmp_path / "mistaken", "learner.lrr=1")
    assert mistaken.returncode == 2
    assert "learner.lrr" in mistaken.stdout + mistaken.stderr
    assert "Traceback" not in mistaken.stdout + mistaken.stderr
    taken = submit(cluster, tmp_path / "taken", options=("--submission-id", "first"))
    assert taken.returncode == 2
    assert taken.stderr.startswith("error: --submission-id: ")
    wrong = tmp_path / "wrong"
    wrong.touch(0o600)
    wrong.write_text(64 * "b")
    refused = submit(cluster, tmp_path / "refused", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --address: ")
    assert f"another token than this one ({wrong})" in refused.stderr
    nobody = ("--address", "http://127.0.0.1:9")
    absent = submit(cluster, tmp_path / "refused", options=nobody)
    assert absent.returncode == 2
    assert "no dashboard answers" in absent.stderr
    for done in (taken, refused, absent):
        assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "refused").exists()
