"""Exports that have a name in place of a path: those of the package, and those of the hub."""

from __future__ import annotations

from pathlib import Path

from ebm_dist.export.hub import download, is_address

FOLDER = Path(__file__).parents[1] / "pretrained"


def list_pretrained() -> list[str]:
    """Names of the models that come with the package; each stands for the path of an export."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def named(path: str | Path) -> Path:
    """The pretrained model that `path` names, or the downloaded one of an `hf://` address; `path`
    itself if it is neither, or exists."""
    if is_address(path):
        return download(path)
    path = Path(path)
    if len(path.parts) == 1 and not path.exists() and path.name in list_pretrained():
        return FOLDER / path.name
    return path
