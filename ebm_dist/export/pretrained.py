"""The models that come with the package, each an export with its card, by name."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pretrained"


def names() -> list[str]:
    """What every command and `load_energy` take in place of a path."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def named(path: str | Path) -> Path:
    """The pretrained model that `path` names; `path` itself if it exists or names none."""
    path = Path(path)
    if len(path.parts) == 1 and not path.exists() and path.name in names():
        return FOLDER / path.name
    return path
