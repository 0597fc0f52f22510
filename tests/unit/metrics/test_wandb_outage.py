"""What the real client delivers across an outage of W&B in the middle of a run."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from test_wandb import until
from wandb_server import WandbServer

from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.metrics.jsonl import read_rows
from ebm_dist.metrics.names import HISTOGRAMS, IMAGES

pytest.importorskip("wandb")


def log_all(hub: MetricHub, step: int, picture: str, model: Path, epoch: int = 0) -> None:
    """Log one of everything that a run logs."""
    hub.log(step, epoch, {"energy/gap": step / 8})
    for name in IMAGES:
        hub.images(name, step, picture)
    for name in HISTOGRAMS:
        hub.histogram(name, step, np.arange(step, step + 8))
    hub.table("evaluation", step, {"fidelity/distance": 1.5})
    hub.alert(step, f"Alert of update {step}", "Do something.", "WARN")
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").write_bytes(model.name.encode())
    hub.artifact(step, "model", str(model), ["latest", "best"], {"update": step})


def log_rows(hub: MetricHub, steps: range, seconds: float) -> None:
    """Log a row of each update, over `seconds` in all."""
    for step in steps:
        time.sleep(seconds / len(steps))
        hub.log(step, 0, {"energy/gap": step / 8})


@pytest.mark.parametrize(
    "seconds", [0, pytest.param(30, marks=pytest.mark.slow)], ids=["short", "30 s"]
)
@pytest.mark.parametrize("kind", ["answers 503", "refuses connections"])
def test_across_an_outage_in_mid_run_everything_arrives_once(
    kind: Literal["answers 503", "refuses connections"],
    seconds: int,
    server: WandbServer,
    tmp_path: Path,
    picture: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = TrackingConfig(init_timeout=60, finish_timeout=240)
    with MetricHub(config, tmp_path / "run", {}, "t") as hub:
        log_all(hub, 0, picture, tmp_path / "step_0-aa")
        until(lambda: server.alerts and server.versions(f"model-{hub.info()['id']}"))
        if kind == "answers 503":
            # Rows are sent now and then, so they meet it later than the rest.
            server.fail, server.stall = 10**6, 2
            log_all(hub, 10, picture, tmp_path / "step_10-bb")
            until(lambda: server.fail < 10**6 - 3)
            log_rows(hub, range(11, 20), seconds)
            server.fail = 0
        else:
            server.stop()
            log_all(hub, 10, picture, tmp_path / "step_10-bb")
            until(lambda: hub.flush() and hub._wandb and hub._wandb._spool.empty())
            log_rows(hub, range(11, 20), seconds)
            server.start()
        log_all(hub, 20, picture, tmp_path / "step_20-cc")
    assert (hub.notices(), server.stall) == ([], 0)
    assert capfd.readouterr() == ("", "")

    ((run_id, run),) = server.runs.items()
    assert run.rows() == list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in run.rows()] == [0, *range(10, 21)]
    steps = [0, 10, 20]
    for name in (*IMAGES, *HISTOGRAMS, "evaluation"):
        assert [row["step"] for row in run.history if name in row] == steps, name
    files = Counter(name.rpartition("_")[0].rpartition("_")[0] for name in run.files)
    assert {f"media/images/{name}": 3 for name in IMAGES}.items() <= files.items()
    tables = [name for name in run.files if name.startswith("media/table/evaluation_")]
    assert len(tables) == 3
    titles = [alert["title"] for alert in server.alerts]
    assert sorted(titles) == [f"Alert of update {step}" for step in steps]
    versions = server.versions(f"model-{run_id}")
    assert [version.metadata for version in versions] == [{"update": step} for step in steps]
    assert [set(version.aliases) for version in versions] == [set(), set(), {"latest", "best"}]
    contents = [version.files["model.safetensors"] for version in versions]
    assert contents == [b"step_0-aa", b"step_10-bb", b"step_20-cc"]
