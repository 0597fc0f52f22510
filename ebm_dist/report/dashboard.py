"""The W&B workspace as code: the report's panels, and W&B's own of the machine."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebm_dist.core.errors import RunFailed, UserError
from ebm_dist.core.installed import how_to_install
from ebm_dist.files.durable import write_output
from ebm_dist.files.safe_open import open_to_read
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.credentials import find_key, first_fault, scrub, with_environment
from ebm_dist.metrics.names import IMAGES, OF_EACH_CLASS
from ebm_dist.metrics.sink import default_entity
from ebm_dist.report.plots import PANELS, Panel

NAME = "EBM training"
COLUMNS = 3
MAX_GPUS = 8
MAX_BYTES = 4 << 20
"""Of a file with a workspace; ours has 40 kB."""

SYSTEM = {
    "CPU, %": ("cpu",),
    "Memory, %": ("memory_percent",),
    "GPU utilisation, %": tuple(f"gpu.{index}.gpu" for index in range(MAX_GPUS)),
    "GPU memory, %": tuple(f"gpu.{index}.memoryAllocated" for index in range(MAX_GPUS)),
    "Disk in use, %": ("disk./.usagePercent",),
    "Network, bytes so far": ("network.recv", "network.sent"),
}
"""What the W&B client itself measures where the metric hub runs, by title."""


def write(path: str | os.PathLike[str]) -> Path:
    """Write to `path` the JSON that W&B holds of the workspace, which is also what `publish`
    sends, and return it.

    Raises:
        UserError: `path` cannot be written, or wandb-workspaces is not installed.
    """
    path = Path(path)
    # Of a view, only the address depends on project and entity.
    view = _build("write", project="", entity="")._to_model().spec
    write_output(path, view.model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n")
    return path


def _package(name: str, command: str) -> Any:
    """A module of wandb-workspaces."""
    try:
        # By name, for it is an optional extra that type checkers need not find.
        return importlib.import_module(f"wandb_workspaces.{name}")
    except ImportError:
        raise UserError(
            f"dashboard {command} needs wandb-workspaces: {how_to_install('workspace')}"
        ) from None


def _build(command: str, *, project: str, entity: str) -> Any:
    """The workspace as a `wandb_workspaces` object, not yet saved anywhere."""
    wr, ws = _package("reports.v2", command), _package("workspaces", command)

    def section(name: str, panels: list[Any], *, is_open: bool) -> Any:
        # W&B puts the panels of a section into this many columns, and pages beyond the rows.
        columns = min(COLUMNS, len(panels))
        layout = ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns))
        return ws.Section(name=name, panels=panels, is_open=is_open, layout_settings=layout)

    # Pictures come first: they are what a person can judge at a glance.
    pictures = wr.MediaBrowser(title="Samples", media_keys=sorted(IMAGES))
    sections = [section("Samples", [pictures], is_open=True)]
    for name, panels in PANELS.items():
        drawn = [
            wr.LinePlot(title=panel.title, x="step", log_y=panel.log, **_lines(panel))
            for panel in panels
        ]
        sections.append(section(name, drawn, is_open=len(sections) < 3))
    drawn = [
        # The client measures by time and knows no step.
        wr.LinePlot(title=title, x="RelativeTime(Process)", y=[f"system/{name}" for name in names])
        for title, names in SYSTEM.items()
    ]
    sections.append(section("System", drawn, is_open=False))
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def _lines(panel: Panel) -> dict[str, Any]:
    """Which metrics `panel` draws. W&B takes names or one pattern."""
    (first, *_) = panel.names
    if first.endswith(OF_EACH_CLASS):
        return {"metric_regex": first.removesuffix(OF_EACH_CLASS) + "_[0-9]+"}
    return {"y": list(panel.names)}


def read(path: str | os.PathLike[str], *, project: str, entity: str) -> Any:
    """The workspace in the file at `path`, as a `wandb_workspaces` object for that project.

    Raises:
        UserError: the file cannot be read or holds no workspace, or wandb-workspaces is not
            installed.
    """
    ws, internal = (_package(name, "publish") for name in ("workspaces", "workspaces.internal"))
    try:
        with open_to_read(path, follow=True) as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"--file: cannot read {path} ({error.strerror or error})") from None
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        view = internal.View(
            entity=entity,
            project=project,
            display_name=NAME,
            name="",
            id="",
            spec=internal.WorkspaceViewspec.model_validate_json(text),
        )
        return ws.Workspace._from_model(view)
    except Exception as error:  # it converts a spec without checking all that it reads
        fault = first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"--file: {path} holds no workspace of W&B ({' '.join(fault.split())[:200]}); "
            "`ebm-dist dashboard write` makes such a file"
        ) from None


def publish(
    project: str | None = None,
    entity: str | None = None,
    file: str | os.PathLike[str] | None = None,
) -> str:
    """Save the workspace in a W&B project and return its address.

    Args:
        project, entity: by default those that a run would use here.
        file: a workspace as `write` writes it; by default the one that `write` would write now.

    Raises:
        UserError: no key is configured, no entity can be found, a package is missing, or `file`
            holds no workspace.
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
    where = {"project": names.project, "entity": names.entity or _default_entity()}
    workspace = _build("publish", **where) if file is None else read(file, **where)
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
