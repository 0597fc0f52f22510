"""What the real client delivers of a run that SIGKILL ends and that is resumed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from test_wandb import until
from test_wandb_outage import log_all
from wandb_server import ServedRun, WandbServer

from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.metrics.names import HISTOGRAMS, IMAGES

pytest.importorskip("wandb")

CHECKPOINT = 100
"""The resumed run repeats the updates after this one."""

KILLED_AT, END = 130, 150
ALL_AT = (0, 50, 100, 120, 140)
"""Updates that log one of everything: 120 is repeated, 140 belongs to the second attempt alone."""

KILLED = """
import sys, time
from pathlib import Path
sys.path.append(sys.argv[1])
import test_wandb_kill
hub = test_wandb_kill.open_hub(Path(sys.argv[2]), None)
test_wandb_kill.log(hub, Path(sys.argv[2]), range(test_wandb_kill.KILLED_AT), 0)
while not (hub.info()["url"] and hub.flush() and hub._wandb._spool.empty()):
    time.sleep(0.05)
print("told", flush=True)
time.sleep(600)
"""


def open_hub(folder: Path, resume_step: int | None) -> MetricHub:
    config = TrackingConfig(init_timeout=60, finish_timeout=60)
    return MetricHub(config, folder / "run", {}, "digits", "killed", resume_step=resume_step)


def log(hub: MetricHub, folder: Path, steps: range, epoch: int) -> None:
    for step in steps:
        if step in ALL_AT:
            log_all(hub, step, str(folder / "picture.png"), folder / f"step_{step}-aa", epoch)
        else:
            hub.log(step, epoch, {"energy/gap": step / 8})


@pytest.mark.parametrize("arrived", ["nothing", "everything"])
def test_after_a_kill_and_a_resume_the_server_has_everything_once(
    arrived: Literal["nothing", "everything"], server: WandbServer, tmp_path: Path, picture: str
) -> None:
    if arrived == "nothing":
        # The client sends lines every quarter of a minute, alerts and files at once. So an alert is
        # sent again, and the service drops it: the second attempt is there within its pause.
        server.stall, server.now = 10**6, lambda: 0.0
    else:
        server.now = itertools.count(step=3600.0).__next__  # each alert is new to the service
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"told\n"
        if arrived == "everything":
            until(lambda: has_everything(server, tmp_path / "run" / "wandb" / "spool.jsonl"))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert bool(server.run("killed").history) == (arrived == "everything")
    server.stall = 0
    with open_hub(tmp_path, CHECKPOINT) as hub:
        log(hub, tmp_path, range(CHECKPOINT + 1, END), 1)
    assert hub.notices() == []

    run = server.run("killed")
    rows = [(row["step"], row["epoch"], row["energy/gap"]) for row in run.rows()]
    # Of the updates that are repeated the server keeps the first rows.
    assert rows == [(step, int(step >= KILLED_AT), step / 8) for step in range(END)]
    for name in (*IMAGES, *HISTOGRAMS, "evaluation"):
        assert [line["step"] for line in run.history if name in line] == list(ALL_AT), name
    for name in IMAGES:
        digest = hashlib.sha256(Path(picture).read_bytes()).hexdigest()
        assert {hashlib.sha256(content).hexdigest() for content in media(run, name)} == {digest}
    for table in media(run, "evaluation"):
        assert [line[:2] for line in json.loads(table)["data"]] == [["fidelity/distance", 1.5]]
    titles = [alert["title"] for alert in server.alerts]
    assert sorted(titles) == sorted(f"Alert of update {step}" for step in ALL_AT)
    versions = server.versions("model-killed")
    assert [version.metadata["update"] for version in versions] == list(ALL_AT)


def has_everything(server: WandbServer, spool: Path) -> bool:
    """Whether the server has all of the first attempt."""
    run, num = server.run("killed"), sum(step < KILLED_AT for step in ALL_AT)
    return (
        len(run.history) == len(spool.read_text().splitlines())
        and sum(name.startswith("media/") for name in run.files) == num * (len(IMAGES) + 1)
        and len(server.alerts) == len(server.versions("model-killed")) == num
    )


def media(run: ServedRun, name: str) -> list[bytes]:
    """The file of each line that has the picture or table `name`."""
    lines: list[dict[str, Any]] = [line[name] for line in run.history if name in line]
    assert len({line["path"] for line in lines}) == len(ALL_AT)
    return [run.files[line["path"]] for line in lines]
