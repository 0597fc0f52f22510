"""The real `wandb agent` runs trials of `ebm-dist train`, as a stand-in for the server tells it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_server import KEY, WandbServer

from ebm_dist.metrics.jsonl import read_rows

sys.path.append(str(Path(__file__).parents[1] / "actors"))
from small_runs import SMALL

pytest.importorskip("wandb")

SWEEP = Path(__file__).parents[3] / "launch" / "sweep.yaml"


class SweepServer(WandbServer):
    """Hands the agent one trial after another, each when it has none that runs."""

    def __init__(self, sweep: dict[str, Any], trials: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.sweep = sweep
        self.left = list(trials.items())

    def _on_SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        sweep = {"id": "s", "name": variables["sweep"], "config": yaml.safe_dump(self.sweep)}
        empty = ("method", "state", "description", "createdAt", "heartbeatAt", "updatedAt")
        empty += ("earlyStopJobRunning", "bestLoss", "controller", "scheduler")
        return {"project": {"sweep": {**dict.fromkeys(empty), **sweep, "runs": {"edges": []}}}}

    def _on_CreateAgent(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _on_Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        commands = []
        if self.left and not json.loads(variables["runState"]):
            trial, values = self.left.pop(0)
            given = {key: {"value": value} for key, value in values.items()}
            program = self.sweep["program"]
            commands = [{"type": "run", "program": program, "run_id": trial, "args": given}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}


def test_trials_of_a_real_agent_take_its_values_and_directories_and_report_as_its_runs(
    no_account: None, tmp_path: Path
) -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    sweep["command"][2] = "small.yaml"  # a run of a second, in place of the digits
    tracking = {"log_every": 1, "wandb": "auto", "init_timeout": 60}
    config = {**SMALL, "tracking": tracking, "evaluation": {"every": 2}}
    (tmp_path / "small.yaml").write_text(json.dumps(config))
    trials = {
        "trial1": {"learner.lr": 0.001, "run.steps": 3},
        "trial2": {"learner.lr": 0.003, "run.steps": 4},
    }
    with SweepServer(sweep, trials) as server:
        place = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        agent = [sys.executable, "-m", "wandb", "agent", "--count", "2", "tester/ebm_dist/sweep1"]
        done = subprocess.run(
            agent,
            cwd=tmp_path,
            env={**os.environ, **place, "PATH": path},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        assert server.left == []
        for trial, values in trials.items():
            run = server.runs[trial]
            assert run.about["sweep"] == "sweep1"
            assert run.exit_code == 0
            assert run.config["learner"]["value"]["lr"] == values["learner.lr"]
            run_dir = tmp_path / "runs" / f"small-{trial}"
            rows = list(read_rows(run_dir / "metrics.jsonl"))
            assert run.rows() == rows
            updates = [row["step"] for row in rows if "energy/gap" in row]
            assert updates == list(range(1, values["run.steps"] + 1))
            assert any("likelihood/log_prob_test" in row for row in rows)
            assert (run_dir / "export" / "model.safetensors").is_file()
