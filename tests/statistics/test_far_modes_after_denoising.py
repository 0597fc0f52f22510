"""A network learns far modes by denoising, and then their weights by chains of all noise levels.

The data are .8 N(-3, .25) + .2 N(3, .25), 12 standard deviations apart. Both runs are those of a
user, the second with `run.init_from` of the first.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import ebm_dist

NOISES = (0.1, 1.0, 3.0)  # under the last one the modes are one, under the first they are apart
BASE: dict[str, Any] = {
    "runtime": {"backend": "inline", "device": "cpu"},
    "data": {"batch_size": 512, "prefetch": 0},
    "energy": {
        "name": "mlp",
        "widths": [64, 64],
        "embedding_width": 16,
        "num_levels": len(NOISES),
        "noise_stds": NOISES,
        "data_std": 2.5,
        "confinement": 0.05,
    },
    "sampler": {
        "name": "simulated_tempering",
        "kernel": {"name": "mala", "step_size": 0.2, "temperature": 1.0},
        "data_std": 0.5,
        "num_steps": 2,
    },
    "workers": {"num_chains": 512, "num_threads": 1},
    "flow": {"mode": "sync"},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": None},
}
DENOISING: dict[str, Any] = {
    "objective": {"name": "denoising_score_matching", "conditioning": "level"},
    "learner": {"lr": 0.005, "schedule": "cosine", "ema_decay": 0.98, "num_threads": 1},
    "checkpoint": {"every": 800},
}
CHAINS: dict[str, Any] = {
    "objective": {"name": "contrastive_levels"},
    "buffer": {
        "capacity": 512,
        "num_shards": 1,
        "init_std": 3.0,
        "reinit_prob": 0.0,
        "context": {"level": "stratified"},
    },
    "learner": {
        "lr": 0.004,
        "schedule": "cosine",
        "final_lr_fraction": 0.02,
        "ema_decay": 0.98,
        "num_threads": 1,
    },
    "checkpoint": {"every": 500},
}


def data() -> Tensor:
    """5,000 events (N, 1), of which exactly 80% are on the left: the right answer has no error."""
    side = torch.where(torch.arange(5000) < 4000, -3.0, 3.0)
    return (side + 0.5 * torch.randn(5000, generator=torch.Generator().manual_seed(0)))[:, None]


def share(energy: nn.Module, level: int = 0) -> float:
    """Mass of the left half line under exp(-E(x, level))/Z, by the trapezoidal rule."""
    x = torch.linspace(-20, 20, 8001)[:, None]
    with torch.no_grad():
        density = (-energy(x, level=torch.full((len(x),), level)).double()).softmax(0)
    return density[x[:, 0] < 0].sum().item()


def train(folder: Path, run: dict[str, Any], phase: dict[str, Any]) -> nn.Module:
    """The exported energy, whose weights are averages over updates."""
    config = {**BASE, **phase, "run": run}
    console = Console(file=io.StringIO())
    result = ebm_dist.train(config, data=data(), run_dir=folder, console=console)
    assert result.export_dir is not None
    return ebm_dist.load_energy(result.export_dir)


@pytest.mark.parametrize("seed", [0, 1])
def test_chains_of_all_levels_find_the_weights_that_denoising_left_wrong(
    seed: int, tmp_path: Path
) -> None:
    denoised = train(tmp_path / "denoised", {"seed": seed, "steps": 800}, DENOISING)
    begin = {"seed": seed, "steps": 500, "init_from": str(tmp_path / "denoised" / "export")}
    found = share(train(tmp_path / "sharpened", begin, CHAINS))
    # The data's share is exact, so the error is that of the chains that the averaged weights have
    # seen. An average with decay d has the variance of a mean of (1 + d)/(1 - d) updates: 99, of
    # two steps each, of the third of 512 chains that is at level 0. Of a chain's side the
    # correlation time is 12 steps (measured on such an export).
    num_draws = 512 / 3 * 2 * (1 + 0.98) / (1 - 0.98) / 12
    error = (0.8 * 0.2 / num_draws) ** 0.5  # .0075
    assert abs(share(denoised) - 0.8) > 4 * error
    assert abs(found - 0.8) < 4 * error
