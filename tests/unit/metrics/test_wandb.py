"""What the real W&B client writes and sends: offline read back, online to a stand-in server."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wandb_server import KEY, WandbServer

from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.metrics import sink as sink_module
from ebm_dist.metrics.credentials import (
    find_key,
    resolve_mode,
    scrub,
    scrub_config,
    with_environment,
)
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.metrics.jsonl import read_rows
from ebm_dist.metrics.sink import TrackingConfig

pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("no_account")

QUICK = {"init_timeout": 10.0, "finish_timeout": 10.0}


def until(condition: Callable[[], Any], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def inspect(run_dir: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags]
    (run,) = (run_dir / "wandb").glob("*run-*")
    return subprocess.run(
        [*command, str(run)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_an_offline_run_holds_rows_config_histograms_and_pictures(
    tmp_path: Path,
    picture: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The run's directory holds all of it, wherever W&B's other runs go.
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    run_dir = tmp_path / "run"
    config = {"run": {"name": "digits"}, "data": {"token": "hush", "commit": "a" * 40}}
    hub = MetricHub(TrackingConfig(), run_dir, config, "digits")
    for step in (0, 10, 20):
        hub.log(step, 0, {"energy/gap": step / 8})
    hub.images("samples", 20, picture)
    hub.histogram("histogram/age", 20, np.arange(64))
    hub.close()

    info = hub.info()
    assert info["mode"] == "offline"
    assert info["notice"] == f"W&B: offline (no API key); sync later with `{info['sync']}`"
    wandb, pattern = info["sync"].split(" sync ")
    assert wandb.endswith("wandb")
    assert list(Path("/").glob(pattern[1:])), "the command names a directory that is there"
    assert pattern.startswith(f"{run_dir}/wandb/")
    assert not (tmp_path / "elsewhere").exists()
    assert capfd.readouterr() == ("", "")

    records = [json.loads(line) for line in inspect(run_dir).splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(row["step"], row["epoch"], row["energy/gap"]) for row in rows[:3]] == [
        (0, 0, 0),
        (10, 0, 1.25),
        (20, 0, 2.5),
    ]
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m.get("step_metric") == "step" for m in metrics)

    summary = json.loads(inspect(run_dir, "--summary"))
    assert summary["run_id"] == info["id"]
    assert summary["config"]["run"] == {"name": "digits"}
    assert summary["config"]["data"] == {"token": "***", "commit": "a" * 40}
    assert summary["summary"]["histogram/age"]["values"] == [1] * 64
    assert summary["summary"]["samples"]["_type"] == "image-file"


def test_an_online_run_arrives_whole_and_no_output_holds_the_key(
    server: WandbServer, tmp_path: Path, picture: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {"objective": {"name": "contrastive"}, "api_key": KEY, "note": f"key {KEY}"}
    with MetricHub(TrackingConfig(**QUICK), tmp_path / "run", config, "digits") as hub:
        for step in range(20):
            hub.log(step, 0, {"energy/gap": step / 8})
        hub.images("samples", 19, picture)
        hub.log(20, 0, {"loss/total": float("nan")})
        until(lambda: hub.info()["url"])
    info = hub.info()
    assert (info["mode"], info["notices"]) == ("online", [])
    assert info["url"] == f"{server.url}/tester/ebm_dist/runs/{info['id']}"

    run = server.runs[info["id"]]
    gaps = [(row["step"], row["energy/gap"]) for row in run.history if "energy/gap" in row]
    assert gaps == [(step, step / 8) for step in range(20)]
    assert math.isnan(run.history[-1]["loss/total"])
    assert run.rows() == list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert run.config["objective"]["value"] == {"name": "contrastive"}
    assert any(name.startswith("media/images/samples") for name in run.files)
    assert (run.display_name, run.exit_code, run.output) == ("digits", 0, [])

    assert capfd.readouterr() == ("", "")
    assert KEY not in json.dumps([run.config, run.history, info])
    for path in [*(tmp_path / "run").rglob("*.jsonl"), *(tmp_path / "run").rglob("*.log")]:
        assert KEY not in path.read_text(errors="replace"), path


def test_a_resumed_run_goes_on_under_its_id(server: WandbServer, tmp_path: Path) -> None:
    with MetricHub(TrackingConfig(**QUICK), tmp_path, {}, "digits") as hub:
        for step in range(5):
            hub.log(step, 0, {"energy/gap": 0.0})
    first = hub.info()["id"]
    with MetricHub(TrackingConfig(**QUICK), tmp_path, {}, "digits", first, resume_step=2) as hub:
        for step in range(3, 8):
            hub.log(step, 1, {"energy/gap": 1.0})
    assert hub.info()["id"] == first
    assert list(server.runs) == [first]
    steps = [(row["epoch"], row["step"]) for row in server.runs[first].history]
    # What the server has it keeps, so the updates that are made again keep their first row there.
    assert steps == [(0, step) for step in range(5)] + [(1, step) for step in range(5, 8)]
    assert [row["epoch"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0] * 3 + [1] * 5


def test_a_run_that_was_deleted_on_the_server_is_replaced_once_and_sent_whole(
    server: WandbServer, tmp_path: Path
) -> None:
    config = TrackingConfig(init_timeout=3.0, finish_timeout=30.0)
    with MetricHub(config, tmp_path, {}, "digits") as hub:
        _log(hub, range(5))
        until(lambda: hub.info()["url"])
    first = hub.info()["id"]
    del server.runs[first]
    server.deleted = {first}
    with MetricHub(config, tmp_path, {}, "digits", first, resume_step=4) as hub:
        _log(hub, range(5, 9))
        until(lambda: hub.info()["url"])
    second = hub.info()["id"]
    assert second != first
    (said,) = hub.notices()
    assert f"run {first} was deleted on the server" in said
    assert f"run {second} takes its place" in said
    # The checkpoint may still name the deleted one.
    with MetricHub(config, tmp_path, {}, "digits", first, resume_step=8) as hub:
        _log(hub, [9])
    assert hub.info()["id"] == second
    assert list(server.runs) == [second]
    assert [row["step"] for row in server.runs[second].history] == list(range(10))


def test_under_an_agent_the_hub_names_the_run_that_the_agent_made(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "agents-own")
    hub = MetricHub(TrackingConfig(**QUICK), tmp_path, {}, "digits", "of-the-checkpoint")
    before = hub.info()["id"]  # a checkpoint may be written before W&B answers
    hub.log(1, 0, {"energy/gap": 0.0})
    hub.close()
    assert [before, hub.info()["id"], *server.runs] == ["agents-own"] * 3


def test_without_an_agent_wandb_run_id_names_a_new_run_and_a_resumed_one_keeps_its_own(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    for name, resume_id in (("new", None), ("resumed", "of-the-checkpoint")):
        with MetricHub(TrackingConfig(**QUICK), tmp_path / name, {}, "digits", resume_id) as hub:
            hub.log(1, 0, {"energy/gap": 0.0})
        assert hub.info()["id"] == (resume_id or "mine")
    assert list(server.runs) == ["mine", "of-the-checkpoint"]


def test_offline_attempts_make_one_history_when_they_are_synced(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricHub(TrackingConfig(wandb="offline"), tmp_path, {}, "digits") as hub:
        _log(hub, range(10))
    time.sleep(1.0)  # W&B names a directory by the second; attempts are further apart than that
    with MetricHub(
        TrackingConfig(wandb="offline"), tmp_path, {}, "digits", hub.info()["id"], resume_step=6
    ) as hub:
        _log(hub, range(7, 15))
    # A shell, for the command's pattern.
    subprocess.run(hub.info()["sync"], shell=True, check=True, timeout=120)
    assert [row["step"] for row in server.runs[hub.info()["id"]].history] == list(range(15))


def test_a_server_that_is_down_blocks_nothing_and_is_sent_the_spool_later(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop()
    start = time.monotonic()
    hub = MetricHub(TrackingConfig(init_timeout=1.0, finish_timeout=10.0), tmp_path, {}, "digits")
    for step in range(100):
        hub.log(step, 0, {"energy/gap": step / 8})
    took = time.monotonic() - start
    assert hub.flush()
    assert took < 1.0
    assert len(list(read_rows(tmp_path / "metrics.jsonl"))) == 100
    until(hub.notices)
    assert hub.info()["mode"] == "online"
    assert len(list(read_rows(tmp_path / "wandb" / "spool.jsonl"))) == 100

    server.start()
    until(lambda: hub.info()["url"])
    hub.log(100, 0, {"energy/gap": 12.5})
    hub.close()
    rows = server.runs[hub.info()["id"]].history
    assert [(row["step"], row["energy/gap"]) for row in rows] == [(s, s / 8) for s in range(101)]
    # Each trouble is said once, however often it was tried.
    assert [line.split(":")[1].split("(")[0].strip() for line in hub.notices()] == [
        "cannot start a run yet",
        "connected; what was kept is being sent",
    ]
    assert len(list((tmp_path / "wandb").glob("run-*"))) == 1, "failed attempts leave nothing"


def test_a_server_that_stays_away_leaves_an_offline_run(
    server: WandbServer, tmp_path: Path
) -> None:
    server.stop()
    hub = MetricHub(TrackingConfig(init_timeout=1.0, finish_timeout=5.0), tmp_path, {}, "digits")
    for step in range(10):
        hub.log(step, 0, {"energy/gap": 0.5})
    until(hub.notices)
    hub.close()
    info = hub.info()
    assert info["mode"] == "offline"
    assert "wandb sync" in info["notices"][-1]
    summary = json.loads(inspect(tmp_path, "--summary"))
    assert (summary["run_id"], summary["summary"]["step"]) == (info["id"], 9)


def test_a_key_that_is_refused_ends_offline_without_asking_again(
    server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.reject_key = True
    with MetricHub(TrackingConfig(**QUICK), tmp_path, {}, "digits") as hub:
        hub.log(1, 0, {"energy/gap": 0.5})
        until(hub.notices)
    assert hub.info()["mode"] == "offline"
    assert len(hub.notices()) == 1
    assert KEY not in hub.notices()[0]
    assert KEY not in "".join(capfd.readouterr())
    assert json.loads(inspect(tmp_path, "--summary"))["summary"]["energy/gap"] == 0.5


def test_errors_of_the_server_are_outlasted(server: WandbServer, tmp_path: Path) -> None:
    with MetricHub(
        TrackingConfig(init_timeout=20.0, finish_timeout=30.0), tmp_path, {}, "digits"
    ) as hub:
        until(lambda: hub.info()["url"])
        server.fail = 2
        for step in range(20):
            hub.log(step, 0, {"energy/gap": 0.0})
    assert [row["step"] for row in server.runs[hub.info()["id"]].history] == list(range(20))


def test_a_killed_wandb_service_is_replaced_and_told_again(
    server: WandbServer, tmp_path: Path
) -> None:
    with MetricHub(TrackingConfig(**QUICK), tmp_path, {}, "digits") as hub:
        _log(hub, range(5))
        until(
            lambda: hub.info()["url"] and hub.flush() and hub._wandb and hub._wandb._spool.empty()
        )
        _kill_service()
        _log(hub, range(5, 8))
        until(lambda: "connected; what was kept is being sent" in " ".join(hub.notices()))
    steps = [row["step"] for row in server.runs[hub.info()["id"]].history]
    assert steps == list(range(8))


def test_rows_that_only_the_summary_has_seen_are_told_again(
    server: WandbServer, tmp_path: Path
) -> None:
    with MetricHub(TrackingConfig(**QUICK), tmp_path, {}, "digits") as hub:
        _log(hub, range(5))
        until(lambda: hub.info()["url"])
        run = server.runs[hub.info()["id"]]
        until(lambda: len(run.history) == 5 and run.summary.get("step") == 4)
        del run.history[2:]  # it died between the two
        _kill_service()
        _log(hub, [5])
        until(lambda: "connected; what was kept is being sent" in " ".join(hub.notices()))
    assert [row["step"] for row in run.history] == list(range(6))


def _log(hub: MetricHub, steps: Iterable[int]) -> None:
    for step in steps:
        hub.log(step, 0, {"energy/gap": 0.0})


def _kill_service() -> None:
    for pid in _service_pids():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)


def _service_pids() -> list[int]:
    """Processes of W&B's service that are children of this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :]
        if name.startswith("wandb-core") and int(rest.split()[1]) == os.getpid():
            found.append(int(path.parent.name))
    assert found
    return found


@pytest.mark.parametrize(
    ("asked", "environment", "mode", "line"),
    [
        ("auto", {}, "offline", "W&B: offline (no API key)"),
        ("auto", {"WANDB_API_KEY": KEY}, "online", "W&B: online (key from WANDB_API_KEY)"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "off", "WANDB_MODE=disabled"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "offline", "WANDB_MODE=offline"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline", "W&B: offline (tracking.wandb)"),
        ("off", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "off", "W&B: off"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online", "online"),
    ],
)
def test_the_mode_follows_config_then_environment_then_key(
    asked: Any, environment: dict, mode: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found, said = resolve_mode(TrackingConfig(wandb=asked))
    assert found == mode
    assert line in said
    assert KEY not in said


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("project", "team/project", r"tracking.entity"),
        ("project", "p" * 129, r"expected 1 to 128 characters, got 129"),
        ("entity", "a:b", r"without / \\ # \? % : in it, got 'a:b'"),
        ("group", "", r"expected 1 to 128 characters, got 0"),
        ("tags", ["t", "t" * 80], r"expected 1 to 64 characters, got 80"),
    ],
)
def test_names_that_wandb_refuses_are_refused_at_load_and_in_the_environment(
    key: str, value: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=says):
        TrackingConfig(**{key: value})
    if value:
        variable = {"group": "WANDB_RUN_GROUP"}.get(key, f"WANDB_{key.upper()}")
        monkeypatch.setenv(variable, ",".join(value) if key == "tags" else value)
        with pytest.raises(UserError, match=rf"{variable}: .*{says}"):
            with_environment(TrackingConfig())
        assert getattr(
            with_environment(TrackingConfig(**{key: ["ok"] if key == "tags" else "ok"})), key
        )


def test_wandbs_own_variables_name_the_run_where_the_config_does_not(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert with_environment(TrackingConfig()).project == "ebm_dist"
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "shown")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    monkeypatch.setenv("WANDB_JOB_TYPE", "train")
    monkeypatch.setenv("WANDB_NOTES", "first try")
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    config = with_environment(TrackingConfig(group="mine", **QUICK))
    assert (config.project, config.group, config.tags) == ("theirs", "mine", ("a", "b"))
    assert (config.name, config.job_type, config.notes) == ("shown", "train", "first try")
    mine = with_environment(TrackingConfig(project="mine", name="called", tags=("c",)))
    assert (mine.project, mine.name, mine.tags) == ("mine", "called", ("c",))
    with MetricHub(TrackingConfig(**QUICK), tmp_path, {}, "digits") as hub:
        hub.log(1, 0, {"energy/gap": 0.0})
    info = hub.info()
    assert info["url"] == f"{server.url}/tester/theirs/runs/{info['id']}"
    run = server.runs[info["id"]]
    assert (run.display_name, run.about["groupName"], run.about["jobType"]) == (
        "shown",
        "theirs",
        "train",
    )
    assert (run.about["tags"], run.about["notes"]) == (["a", "b"], "first try")


def test_the_shipped_configs_leave_the_names_to_the_environment() -> None:
    configs = [*(Path(__file__).parents[3] / "configs").rglob("*.yaml")]
    assert configs
    assert all(load(path).tracking.project is None for path in configs)


def test_online_without_a_key_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"tracking\.wandb: online needs an API key .*wandb login"):
        resolve_mode(TrackingConfig(wandb="online"))


def test_a_netrc_entry_counts_for_its_own_server_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(f"machine wandb.example.org login user password {KEY}\n")
    assert find_key() is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert find_key() == str(tmp_path / "netrc")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    monkeypatch.delenv("WANDB_BASE_URL")
    assert find_key() == str(tmp_path / "netrc")


def test_without_wandb_installed_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a)
    )
    with MetricHub(TrackingConfig(wandb="online"), tmp_path, {}, "digits") as hub:
        hub.log(1, 0, {"energy/gap": 0.5})
    assert "not installed" in hub.info()["notice"]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_secrets_are_hidden_from_config_and_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "my-own-secret-key")
    assert scrub(f"bad key {KEY} for https://me:pw@host/x") == "bad key *** for https://***@host/x"
    config = {"a": [{"password": "x", "num_tokens": 5}], "say": "my-own-secret-key", "author": "me"}
    assert scrub_config(config) == {
        "a": [{"password": "***", "num_tokens": 5}],
        "say": "***",
        "author": "me",
    }


def test_the_pause_between_attempts_doubles_up_to_a_limit(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []

    def refuse(self: object, mode: str) -> None:
        times.append(time.monotonic())
        raise ConnectionError("away")

    monkeypatch.setattr(sink_module.WandbSink, "_init", refuse)
    monkeypatch.setattr(sink_module, "FIRST_RETRY", 0.1)
    monkeypatch.setattr(sink_module, "LAST_RETRY", 0.4)
    hub = MetricHub(TrackingConfig(finish_timeout=1.0), tmp_path, {}, "digits")
    until(lambda: len(times) >= 6)
    gaps = np.diff(times[:6])
    hub.close()
    # The attempt itself takes a little, more so on a busy machine: hence from below only.
    assert (gaps >= np.array([0.1, 0.2, 0.4, 0.4, 0.4])).all(), gaps
    assert len(hub.notices()) == 1
