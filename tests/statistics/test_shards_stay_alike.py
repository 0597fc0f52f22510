"""Chains of different shards are one population, however few of the shards an update draws on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ebm_dist.checkpoint.files import open_checkpoint
from ebm_dist.config.run_config import load
from ebm_dist.run.train import train

DIGITS: dict[str, Any] = {
    "runtime": {"backend": "inline"},
    "data": {"source": "digits", "batch_size": 32, "noise_std": 0.03, "prefetch": 0},
    "energy": {"name": "resnet", "width": 8, "multipliers": [1, 2]},
    "sampler": {
        "name": "langevin",
        "step_size": 10.0,
        "noise_std": 0.01,
        "grad_clip": 0.03,
        "num_steps": 10,
        "clamp": [-1.0, 1.0],
        "engine": "eager",
    },
    "objective": {"name": "contrastive", "energy_l2": 0.1},
    "buffer": {"capacity": 256, "num_shards": 2, "init": "noise", "reinit_prob": 0.0},
    "workers": {"num_workers": 1, "num_chains": 32, "num_threads": 1},
    "learner": {"lr": 1.0e-3, "betas": [0.0, 0.999], "num_threads": 1},
    "flow": {"mode": "sync"},
    "checkpoint": {"every": 1000, "keep": 1},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": None},
}


def distance_of_shards(run_dir: Path, seed: int) -> float:
    """Squared distance of the two shards' means, over what two draws of one population give."""
    config = {**DIGITS, "run": {"name": "alike", "seed": seed, "steps": 100}}
    train(load(config, []), run_dir=run_dir, console=Console(file=io.StringIO()))
    cut = open_checkpoint(max((run_dir / "checkpoints").glob("step_*")))
    shards = [cut.arrays(name)["position"] for name in cut.names if name.startswith("shard")]
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in shards)
    expected = (a.var(0, ddof=1) + b.var(0, ddof=1)).sum() / len(a)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() / expected)


def test_two_shards_that_serve_whole_updates_hold_the_same_population(tmp_path: Path) -> None:
    found = [distance_of_shards(tmp_path / str(seed), seed) for seed in range(3)]
    # Taking turns gave 46 to 85, draws at random 3 to 13: chains of one update move together.
    assert np.mean(found) < 25, found
