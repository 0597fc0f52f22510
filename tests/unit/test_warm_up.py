"""The step size of a run, chosen before its first round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.run.train import RunResult, train

BASE: dict[str, Any] = {
    "run": {"name": "warm", "seed": 1, "steps": 8},
    "runtime": {"backend": "inline"},
    "data": {"source": "toy:gaussian_mixture", "batch_size": 64, "prefetch": 0},
    # At this learning rate its law hardly moves in 8 updates.
    "energy": {"name": "quadratic", "precision": 4.0, "learnable": True},
    "sampler": {"name": "mala", "step_size": 1e-4, "num_steps": 5, "adapt_steps": 300},
    "buffer": {"capacity": 64, "reinit_prob": 0.0},
    "workers": {"num_chains": 64, "num_threads": 1},
    "learner": {"lr": 1e-5, "num_threads": 1},
    "flow": {"mode": "sync"},
    "checkpoint": {"every": 4},
    "tracking": {"wandb": "off", "log_every": 1},
    "evaluation": {"every": None},
}


def run(run_dir: Path, *overrides: str) -> RunResult:
    return train(load(BASE, overrides), run_dir=run_dir, console=Console(quiet=True))


def exported_step_size(run_dir: Path) -> float:
    return json.loads((run_dir / "export" / "config.json").read_text())["sampler"]["step_size"]


def test_a_run_moves_by_the_step_size_that_is_accepted_at_the_samplers_rate(tmp_path: Path):
    result = run(tmp_path / "run")
    # A given step of 1e-4 would be accepted always.
    assert abs(result.metrics["sampler/acceptance"] - 0.574) < 0.1
    assert exported_step_size(tmp_path / "run") > 0.05
    assert "became" in (tmp_path / "run" / "run.log").read_text()


def test_a_run_that_goes_on_keeps_its_step_size_bit_for_bit(tmp_path: Path):
    run(tmp_path / "whole")
    run(tmp_path / "parts", "run.steps=4")
    run(tmp_path / "parts")
    assert exported_step_size(tmp_path / "parts") == exported_step_size(tmp_path / "whole")
    whole, parts = (
        load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_sampler_without_an_accept_step_is_refused():
    with pytest.raises(UserError, match=r"sampler\.adapt_steps: 10, but langevin has no accept"):
        load(
            {
                **BASE,
                "sampler": {
                    "name": "langevin",
                    "step_size": 0.1,
                    "temperature": 1.0,
                    "adapt_steps": 10,
                },
            }
        )
