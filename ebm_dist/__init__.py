"""Distributed training of energy-based models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ebm_dist.export import load_energy
    from ebm_dist.run import train

# Looked up on first use: loading an export must not need Ray, DeepSpeed or W&B.
_LAZY = {"load_energy": "ebm_dist.export", "train": "ebm_dist.run"}
_SUBMODULES = {"diagnostics", "energies", "evaluation", "objectives", "samplers"}

__all__ = ["__version__", "load_energy", "train"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"ebm_dist.{name}")
    raise AttributeError(f"module 'ebm_dist' has no attribute {name!r}")
