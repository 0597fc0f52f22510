"""Alerts as the real client sends them, online and into an offline run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_server import WandbServer

from ebm_dist.core.errors import NonFinite
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub

sys.path.append(str(Path(__file__).parents[1] / "actors"))
from small_runs import run

pytest.importorskip("wandb")


def test_a_run_that_diverges_sends_an_alert_and_ends_as_failed(
    server: WandbServer, tmp_path: Path
) -> None:
    tracking = ("tracking.wandb=online", "tracking.init_timeout=60")
    with pytest.raises(NonFinite):
        run(tmp_path / "run", *tracking, "learner.gap_limit=1.0e-9")
    (served,) = server.runs.values()
    (alert,) = server.alerts
    assert (alert["runName"], alert["severity"]) == (served.name, "ERROR")
    assert alert["title"] == "Training diverged and ended"
    assert "learner.gap_limit" in alert["text"]
    assert served.exit_code == 1


def test_an_offline_run_holds_the_alerts(no_account: None, tmp_path: Path) -> None:
    with MetricHub(TrackingConfig(wandb="offline"), tmp_path, {}, "t") as hub:
        hub.log(1, 0, {"energy/gap": 0.0})
        hub.alert(1, "Chains are stuck", "12 of 32 chains stand still", "WARN")
    assert hub.notices() == []
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    (alert,) = [record["alert"] for record in records if record["type"] == "alert"]
    assert (alert["title"], alert["text"], alert["level"]) == (
        "Chains are stuck",
        "12 of 32 chains stand still",
        "WARN",
    )
