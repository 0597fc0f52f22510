"""The pictures that a run writes of its chains and samples."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from ebm_dist.core.types import ChainSample, EventSpec
from ebm_dist.evaluation.fidelity import PER_ROW
from ebm_dist.files.safe_open import make_directory
from ebm_dist.report.grid import save_grid

events = logging.getLogger("ebm_dist.run")


def write_grid(
    run_dir: Path, spec: EventSpec, chains: ChainSample, name: str, step: int
) -> Path | None:
    """Write the picture `name` of update `step` below `run_dir`/samples; None if that fails."""
    path = run_dir / "samples" / f"step_{step:08d}.png"
    if name != "samples/chains":  # in a folder, since the report shows those of `samples`
        path = path.parent / name.removeprefix("samples/") / path.name
    x, condition = torch.from_numpy(np.array(chains.x)), None
    if spec.condition_shape is not None and "condition" in chains.context:
        condition = torch.from_numpy(np.array(chains.context["condition"]))
    try:
        make_directory(path.parent)
        columns = PER_ROW if name == "samples/neighbours" else None
        return save_grid(x, path, spec, num_columns=columns, condition=condition)
    except OSError as error:
        events.info(f"{path.name} not written ({error.strerror or error})")
        return None
