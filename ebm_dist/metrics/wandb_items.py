"""Turns an item of the spool into calls of a W&B run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALERT_PAUSE_S = 60.0
"""W&B itself drops further alerts of one title for this long. The driver, which decides what is an
alert, waits longer; this holds where two hubs send the same one."""

COLUMNS = ("metric", "value", "unit", "meaning")
"""Of a table of metrics."""


def send(run: Any, item: Mapping[str, Any]) -> dict[str, Any]:
    """Send what `item` has besides numbers and media; returns its values for the history.

    Raises:
        Exception: the item is invalid, or W&B refuses it.
    """
    import wandb

    kind = item["kind"]
    if kind == "row":
        return {
            name: float("nan") if value is None else value for name, value in item["values"].items()
        }
    if kind == "image":
        return {item["name"]: wandb.Image(item["path"])}
    if kind == "histogram":
        return {item["name"]: wandb.Histogram(np_histogram=(item["counts"], item["edges"]))}
    if kind == "table":
        return {item["name"]: wandb.Table(columns=list(COLUMNS), data=item["rows"])}
    if kind == "alert":
        run.alert(item["title"], item["text"], item["level"], wait_duration=ALERT_PAUSE_S)
        return {}
    if kind in ("dataset", "model", "checkpoint"):
        _send_artifact(run, item)
        return {}
    raise ValueError(f"unknown kind {kind!r}")


def _send_artifact(run: Any, item: Mapping[str, Any]) -> None:
    import wandb

    folder, is_input = Path(item["path"]), item["kind"] == "dataset"
    # Runs on the same data share its artifact, but `best` of a run must not replace another's.
    name = folder.name.rpartition("-")[0] if is_input else f"{item['kind']}-{run.id}"
    artifact = wandb.Artifact(name, type=item["kind"], metadata=dict(item["metadata"]))
    # Not copied: the folder never changes, and W&B's copies of an offline run would be outside the
    # run directory.
    artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
    # `run.use_artifact` makes the same call for a new artifact, but refuses offline runs, and waits
    # until the upload is complete.
    run._log_artifact(
        artifact, aliases=item["aliases"], is_user_created=is_input, use_after_commit=is_input
    )
