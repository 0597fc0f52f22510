"""The W&B workspace shows metrics that exist, and needs no W&B to be written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ebm_dist.core.errors import UserError
from ebm_dist.metrics.names import IMAGES, METRICS
from ebm_dist.report import dashboard


def test_every_panel_shows_metrics_that_exist() -> None:
    spec = dashboard.spec()
    shown: list[str] = []
    for section in spec["sections"]:
        for panel in section["panels"]:
            if panel["kind"] == "media":
                assert set(panel["keys"]) <= IMAGES.keys()
            else:
                assert panel["x"] == "step"
                shown += panel["y"]
    assert set(shown) <= METRICS.keys()
    assert len(shown) == len(set(shown))


def test_every_promised_metric_is_on_the_dashboard() -> None:
    shown = {
        name
        for section in dashboard.spec()["sections"]
        for panel in section["panels"]
        for name in panel.get("y", ())
    }
    assert {name for name, metric in METRICS.items() if metric.promised} <= shown


def test_panels_of_a_section_do_not_overlap() -> None:
    for section in dashboard.spec()["sections"]:
        cells = set()
        for panel in section["panels"]:
            at = panel["layout"]
            assert at["x"] + at["w"] <= 24
            area = {
                (x, y)
                for x in range(at["x"], at["x"] + at["w"])
                for y in range(at["y"], at["y"] + at["h"])
            }
            assert not cells & area
            cells |= area


def test_writing_needs_no_wandb(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from ebm_dist.report import dashboard\n"
        "dashboard.write(sys.argv[1])\n"
        "assert not {'wandb', 'wandb_workspaces'} & set(sys.modules)\n"
    )
    path = tmp_path / "a" / "dashboard.json"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert json.loads(path.read_text()) == dashboard.spec()
    with pytest.raises(UserError, match="--out: cannot write"):
        dashboard.write(path / "x.json")


def test_publishing_without_a_key_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UserError, match="needs a W&B key"):
        dashboard.publish()


def test_the_workspace_object_holds_the_same_panels() -> None:
    pytest.importorskip("wandb_workspaces")
    workspace = dashboard.build("ebm_dist", "tester")
    names = [section.name for section in workspace.sections]
    assert names == [section["name"] for section in dashboard.spec()["sections"]]
    sent = workspace._to_model().model_dump_json()
    assert all(f'"{name}"' in sent for name in ("energy/gap", "chain/rhat", "samples/chains"))
