"""The W&B workspace as code: the report's panels, as data first and as a W&B object last."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.core.installed import how_to_install
from ebm_dist.files.durable import write_output
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.credentials import find_key, first_fault, scrub, with_environment
from ebm_dist.metrics.names import IMAGES, METRICS
from ebm_dist.metrics.sink import default_entity
from ebm_dist.report.plots import PANELS

NAME = "EBM training"
COLUMNS = 3
PANEL_WIDTH, PANEL_HEIGHT = 8, 6
"""In the units of W&B's grid, which is 24 wide."""


def spec() -> dict[str, Any]:
    """The workspace as plain data: sections of panels, drawn against `step`.

    Every metric it names is in `metrics/names.py`; no W&B package is needed.
    """
    sections: list[dict[str, Any]] = []
    for title, panels in PANELS.items():
        entries = [
            {
                "kind": "line",
                "title": panel.title,
                "x": "step",
                "y": list(panel.names),
                "log_y": panel.log,
                "layout": _layout(index),
            }
            for index, panel in enumerate(panels)
        ]
        sections.append({"name": title, "panels": entries})
    media = {
        "kind": "media",
        "title": "Samples",
        "keys": sorted(IMAGES),
        "layout": {"x": 0, "y": 0, "w": 24, "h": 12},
    }
    # Pictures come first: they are what a person can judge at a glance.
    sections.insert(0, {"name": "Samples", "panels": [media]})
    return {
        "name": NAME,
        "sections": sections,
        "metrics": {
            name: {"meaning": metric.meaning, "unit": metric.unit}
            for name, metric in METRICS.items()
        },
    }


def _layout(index: int) -> dict[str, int]:
    return {
        "x": PANEL_WIDTH * (index % COLUMNS),
        "y": PANEL_HEIGHT * (index // COLUMNS),
        "w": PANEL_WIDTH,
        "h": PANEL_HEIGHT,
    }


def write(path: str | os.PathLike[str]) -> Path:
    """Write the workspace as JSON to `path` and return it.

    Raises:
        UserError: `path` cannot be written.
    """
    path = Path(path)
    write_output(path, json.dumps(spec(), indent=2, ensure_ascii=False) + "\n")
    return path


def build(project: str, entity: str) -> Any:
    """The workspace as a `wandb_workspaces` object, not yet saved anywhere.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        # By name, for it is an optional extra that type checkers need not find.
        wr = importlib.import_module("wandb_workspaces.reports.v2")
        ws = importlib.import_module("wandb_workspaces.workspaces")
    except ImportError:
        raise UserError(
            f"dashboard publish needs wandb-workspaces: {how_to_install('workspace')}"
        ) from None

    def panel(entry: dict[str, Any]) -> Any:
        layout = wr.Layout(**entry["layout"])
        if entry["kind"] == "media":
            return wr.MediaBrowser(title=entry["title"], media_keys=entry["keys"], layout=layout)
        return wr.LinePlot(
            title=entry["title"],
            x=entry["x"],
            y=entry["y"],
            log_y=entry["log_y"],
            layout=layout,
        )

    data = spec()
    return ws.Workspace(
        entity=entity,
        project=project,
        name=data["name"],
        sections=[
            ws.Section(
                name=section["name"],
                panels=[panel(entry) for entry in section["panels"]],
                is_open=index < 3,
            )
            for index, section in enumerate(data["sections"])
        ],
    )


def publish(project: str | None = None, entity: str | None = None) -> str:
    """Save the workspace in a W&B project and return its address.

    A name that is left out is the one that a run would use here.

    Raises:
        UserError: no key is configured, no entity can be found, or a package is missing.
        RunFailed: the server did not take it.
    """
    if find_key() is None:
        raise UserError("dashboard publish needs a W&B key: run `wandb login` or set WANDB_API_KEY")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        names = with_environment(TrackingConfig(project=project, entity=entity))
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise UserError(f"--{key}: {first_fault(error)}") from None
    assert names.project is not None
    workspace = build(names.project, names.entity or _default_entity())
    try:
        workspace.save()
    except Exception as error:
        lines = scrub(str(error)).strip().splitlines() or [type(error).__name__]
        raise RunFailed(f"dashboard publish: W&B did not take it ({lines[0][:200]})") from None
    return str(workspace.url)


def _default_entity() -> str:
    try:
        entity = default_entity()
    except ImportError:
        raise UserError(f"dashboard publish needs wandb: {how_to_install('train')}") from None
    except Exception as error:
        lines = scrub(str(error)).strip().splitlines() or [type(error).__name__]
        raise RunFailed(f"dashboard publish: W&B did not answer ({lines[0][:200]})") from None
    if not entity:
        raise UserError("dashboard publish: give --entity, the W&B team or user to save it for")
    return entity
