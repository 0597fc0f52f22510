"""The W&B workspace shows metrics that exist, and is written as it is sent."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_wandb import until
from wandb_server import WandbServer

from ebm_dist.cli import main
from ebm_dist.core.errors import UserError
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.metrics.names import IMAGES, METRICS
from ebm_dist.report import dashboard
from ebm_dist.report.plots import FAULTS, PANELS


def shown() -> list[str]:
    return [name for panels in PANELS.values() for panel in panels for name in panel.names]


def test_every_panel_shows_metrics_that_exist_and_none_twice() -> None:
    assert set(shown()) <= METRICS.keys()
    assert len(shown()) == len(set(shown()))


def test_every_promised_metric_is_on_the_dashboard() -> None:
    assert {name for name, metric in METRICS.items() if metric.promised} <= set(shown())


def test_all_of_fidelity_but_its_references_is_shown_with_quality() -> None:
    of_fidelity = {name for name in METRICS if name.startswith("fidelity/")}
    assert of_fidelity <= {name for panel in PANELS["Quality"] for name in panel.names}


def test_every_count_of_faults_is_in_their_section() -> None:
    counts = {name for name in METRICS if name.startswith("fault/")}
    counts |= {"buffer/late_checkins", "buffer/expired_leases", "flow/lost", "hub/dropped"}
    assert {name for panel in PANELS[FAULTS] for name in panel.names} == counts


def test_publishing_without_a_key_is_the_users_error(no_account: None) -> None:
    with pytest.raises(UserError, match="needs a W&B key"):
        dashboard.publish()


def test_without_its_package_the_dashboard_is_the_users_error_in_one_line(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    says = r"^dashboard {} needs wandb-workspaces: pip install [^\n]+$"
    with pytest.raises(UserError, match=says.format("write")):
        dashboard.write(tmp_path / "dashboard.json")
    with pytest.raises(UserError, match=says.format("publish")):
        dashboard.publish(project="p", entity="team")


def test_wandb_is_sent_every_section_and_what_is_written_is_what_is_sent(
    server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = dashboard.publish(project="p")
    assert capfd.readouterr() == ("", "")
    (sent,) = server.views
    assert (sent["entityName"], sent["projectName"]) == ("tester", "p")
    assert (sent["type"], sent["displayName"]) == ("project-view", dashboard.NAME)
    assert url == f"{server.url}/tester/p?nw={sent['name'].removeprefix('nw-').removesuffix('-v')}"

    view = json.loads(sent["spec"])
    sections = {
        section["name"]: section for section in view["section"]["panelBankConfig"]["sections"]
    }
    assert list(sections) == ["Samples", *PANELS, "System"]
    (pictures,) = sections["Samples"]["panels"]
    assert pictures["viewType"] == "Media Browser"
    assert set(pictures["config"]["mediaKeys"]) == IMAGES.keys()
    for name, panels in PANELS.items():
        shown = [panel["config"] for panel in sections[name]["panels"]]
        assert [(each["chartTitle"], each["xAxis"]) for each in shown] == [
            (panel.title, "step") for panel in panels
        ]
        for each, panel in zip(shown, panels, strict=True):
            if pattern := each.get("metricRegex"):
                assert each["useMetricRegex"]
                assert re.fullmatch(pattern, panel.names[0].replace("_K", "_12"))
            else:
                assert each["metrics"] == list(panel.names)
    for panel in sections["System"]["panels"]:
        assert panel["config"]["xAxis"] == "_runtime"
        assert all(name.startswith("system/") for name in panel["config"]["metrics"])
    for section in sections.values():
        flow = section["flowConfig"]
        assert flow["columnsPerPage"] * flow["rowsPerPage"] >= len(section["panels"])

    file = dashboard.write(tmp_path / "a" / "dashboard.json")
    written = json.loads(file.read_text())
    assert without_ids(written) == without_ids(view)
    # The package reads the file, with all that it holds.
    workspace = dashboard.read(file, project="p", entity="team")
    assert (
        json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
        == written
    )
    assert [section.name for section in workspace.sections] == list(sections)
    assert [panel.title for panel in workspace.sections[1].panels] == [
        panel.title for panel in next(iter(PANELS.values()))
    ]
    with pytest.raises(UserError, match="--out: cannot write"):
        dashboard.write(tmp_path / "a" / "dashboard.json" / "x.json")


def test_a_file_that_was_edited_is_what_wandb_is_sent(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dashboard.write(tmp_path / "dashboard.json")
    edited = json.loads(file.read_text())
    sections = edited["section"]["panelBankConfig"]["sections"]
    del sections[2:]
    sections[1]["name"] = "Mine"
    file.write_text(json.dumps(edited))
    assert main(["dashboard", "publish", "--project", "p", "--file", str(file)]) == 0
    (sent,) = server.views
    assert json.loads(sent["spec"]) == edited
    assert (sent["entityName"], sent["projectName"]) == ("tester", "p")
    url = capsys.readouterr().out.strip()
    assert url == f"{server.url}/tester/p?nw={sent['name'].removeprefix('nw-').removesuffix('-v')}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "holds no workspace of W&B (Invalid JSON"),
        ("{}", "holds no workspace of W&B (Field required)"),
        (" " * (dashboard.MAX_BYTES + 1), "(more than 4 MiB); `ebm-dist dashboard write` makes"),
        (None, "cannot read"),
    ],
    ids=["cut", "other", "large", "absent"],
)
def test_a_file_without_a_workspace_is_one_line_and_nothing_is_sent(
    content: str | None,
    says: str,
    server: WandbServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "dashboard.json"
    if content is not None:
        file.write_text(content)
    assert main(["dashboard", "publish", "--file", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --file: ")
    assert says in line
    assert server.views == []


def test_the_client_measures_what_the_section_on_the_system_shows(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.1")
    # In place of Ray's process on a node, with two processes that it started.
    ray = subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600 & wait"], start_new_session=True)
    monkeypatch.setenv("RAY_RAYLET_PID", str(ray.pid))
    try:
        children = Path(f"/proc/{ray.pid}/task/{ray.pid}/children")
        until(lambda: len(children.read_text().split()) == 2)
        with MetricHub(TrackingConfig(init_timeout=60), tmp_path, {}, "t") as hub:
            hub.log(0, 0, {"energy/gap": 0.0})
            until(lambda: hub.info()["url"])
            # The share of the processors is known from the second time on.
            until(lambda: any("system.cpu" in row for row in server.run(hub.info()["id"]).events))
    finally:
        os.killpg(ray.pid, signal.SIGKILL)
        ray.wait()
    names = {name for panel in dashboard.SYSTEM.values() for name in panel}
    events = server.run(str(hub.info()["id"])).events
    assert {event["system.proc.cpu.threads"] for event in events} == {3}
    seen = {key.removeprefix("system.") for event in events for key in event}
    assert {name for name in names if not name.startswith("gpu.")} <= seen


def without_ids(value: Any) -> Any:
    """`value` without the ids of its panels, which the package draws at random."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key != "__id__"}
    return value
