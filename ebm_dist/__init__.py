"""Distributed training of energy-based models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ebm_dist._version import __version__

if TYPE_CHECKING:
    from ebm_dist.data.split import load_data
    from ebm_dist.export.pretrained import list_pretrained
    from ebm_dist.export.push import push_to_hub
    from ebm_dist.export.reader import load_energy, open_export
    from ebm_dist.export.sample import sample
    from ebm_dist.report.grid import picture
    from ebm_dist.run.train import train
_LAZY = {
    "list_pretrained": "ebm_dist.export.pretrained",
    "load_data": "ebm_dist.data.split",
    "load_energy": "ebm_dist.export.reader",
    "open_export": "ebm_dist.export.reader",
    "picture": "ebm_dist.report.grid",
    "push_to_hub": "ebm_dist.export.push",
    "sample": "ebm_dist.export.sample",
    "train": "ebm_dist.run.train",
}
_SUBMODULES = {"diagnostics", "energies", "evaluation", "objectives", "samplers"}

__all__ = [
    "__version__",
    "list_pretrained",
    "load_data",
    "load_energy",
    "open_export",
    "picture",
    "push_to_hub",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"ebm_dist.{name}")
    raise AttributeError(f"module 'ebm_dist' has no attribute {name!r}")
