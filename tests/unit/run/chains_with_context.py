"""Small runs whose chains carry a context: what the tests of each context share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import ebm_dist
from ebm_dist.checkpoint.files import name_of, open_checkpoint

QUIET: dict[str, Any] = {
    "runtime": {"backend": "inline"},
    "learner": {"num_threads": 1},
    "flow": {"mode": "sync"},
    "tracking": {"wandb": "off", "log_every": 1},
    "evaluation": {"every": None},
    "checkpoint": {"every": 2, "keep": 5},
}
"""Sections of a run in one process that logs every update, and is the same at every attempt."""


def changed(config: dict[str, Any], run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """`config` with other keys; a section with a name is another one altogether."""
    merged = dict(config)
    for key, value in sections.items():
        merged[key] = value if "name" in value else {**config.get(key, {}), **value}
    merged["run"] = {**merged["run"], "dir": str(run_dir)}
    return merged


def equal(a: Path, b: Path) -> bool:
    """Whether the exports of two runs have the same weights, bit for bit."""
    one, other = (load_file(run / "export" / "model.safetensors") for run in (a, b))
    return all(torch.equal(one[k], other[k]) for k in one)


def killed(run_dir: Path, step: int) -> Path:
    """A copy of a finished run as a kill after the checkpoint of `step` would have left it."""
    copy = run_dir.with_name(f"{run_dir.name}-killed")
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("export"))
    for checkpoint in copy.glob("checkpoints/step_*"):
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    return copy


def chains(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """The chains of a checkpoint, over all shards."""
    opened = open_checkpoint(run_dir / "checkpoints" / name_of(step))
    parts = [opened.arrays(name) for name in sorted(opened.names) if name.startswith("shard_")]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_same_chains(a: Path, b: Path, step: int) -> None:
    """Two runs have the same chains in their checkpoints of `step`, with what they carry.

    A resume gives no version twice, so the number of the weights that moved a chain may differ.
    """
    left, right = chains(a, step), chains(b, step)
    assert left.keys() == right.keys()
    names = sorted(left.keys() - {"version"})
    different = [name for name in names if not np.array_equal(left[name], right[name])]
    assert not different, f"chains of {a.name} and {b.name} differ in {different}"


def resumed_on_ray(base: dict[str, Any], folder: Path, step: int) -> tuple[Path, Path]:
    """A run in one process; and on Ray what a kill of it after the checkpoint of `step` left."""
    ebm_dist.train(base, run_dir=folder / "inline")
    resumed = killed(folder / "inline", step)
    ray = {**base, "runtime": {"backend": "ray", "address": "local"}}
    ebm_dist.train(ray, run_dir=resumed, resume="must")
    return folder / "inline", resumed
