"""Runs whose chains move between noise levels: the bits, the levels, and what is refused."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains_with_context import (
    QUIET,
    assert_same_chains,
    chains,
    changed,
    equal,
    resumed_on_ray,
)

import ebm_dist
from ebm_dist.core.errors import UserError

MALA = {"name": "mala", "step_size": 0.05, "temperature": 1.0}
CONFIG: dict[str, Any] = {
    **QUIET,
    "run": {"seed": 3, "steps": 4},
    "data": {"source": "toy:swiss_roll", "toy_samples": 256, "batch_size": 16},
    "energy": {"name": "mlp", "widths": [8], "num_levels": 3, "noise_stds": [0.1, 0.8]},
    "sampler": {"name": "simulated_tempering", "kernel": MALA, "data_std": 0.3, "num_steps": 4},
    "objective": {"name": "contrastive_levels"},
    "buffer": {
        "capacity": 32,
        "num_shards": 2,
        "reinit_prob": 0.1,
        "context": {"level": "stratified"},
    },
    "workers": {"num_workers": 2, "num_chains": 8, "num_threads": 1},
}


config = partial(changed, CONFIG)


def test_sync_is_bitwise_with_moving_levels_whoever_moves_the_chains_and_after_a_resume(
    tmp_path: Path,
) -> None:
    base = config(tmp_path)
    ebm_dist.train(base, run_dir=tmp_path / "a")
    four = {**base, "workers": {**base["workers"], "num_workers": 4}}
    ebm_dist.train({**four, "run": {**base["run"], "steps": 2}}, run_dir=tmp_path / "b")
    ebm_dist.train(four, run_dir=tmp_path / "b", resume="must")
    assert equal(tmp_path / "a", tmp_path / "b")
    before, after = chains(tmp_path / "a", 2), chains(tmp_path / "a", 4)
    resumed = chains(tmp_path / "b", 4)
    assert all(np.array_equal(after[key], resumed[key]) for key in ("position", "context/level"))
    kept = (after["age"] > before["age"]) & (before["age"] > 0)
    assert (before["context/level"] != after["context/level"])[kept].any()
    # A recorded energy is that of the position at the level committed with it.
    latest = after["version"] == after["version"].max()
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    (occupied,) = (r["chain/level_occupancy"] for r in rows if r.get("step") == 4)
    assert latest.any()
    assert 0 <= occupied <= 1
    assert 0 < rows[-1].get("sampler/level_acceptance", 0.5) <= 1


@pytest.mark.ray
def test_moving_levels_killed_and_resumed_on_ray_train_bit_for_bit_as_in_one_process(
    tmp_path: Path,
) -> None:
    """On one node positions move in rows of shared memory, and levels beside them."""
    base = config(tmp_path)
    four = {**base["workers"], "num_workers": 4}
    inline, resumed = resumed_on_ray({**base, "workers": four}, tmp_path, 2)
    assert equal(inline, resumed)
    assert_same_chains(inline, resumed, 4)


REFUSED: dict[str, dict[str, Any]] = {
    r"buffer\.context\.level: missing, but objective\.name contrastive_levels .* stratified$": {
        "buffer": {"context": {}},
    },
    r"sampler\.name: simulated_tempering moves .* set objective\.name: contrastive_levels, or": {
        "objective": {"name": "contrastive"},
    },
    r"energy\.num_levels: not set, but objective\.name contrastive_levels fits": {
        "energy": {"name": "mlp", "widths": [8]},
    },
    r"buffer\.storage: bfloat16 .* set it to float32$": {"buffer": {"storage": "bfloat16"}},
    r"sampler\.kernel\.clamp: set, but": {
        "sampler": {
            **CONFIG["sampler"],
            "kernel": {**MALA, "name": "langevin", "clamp": [-1.0, 1.0]},
        },
    },
    r"sampler.*: has a momentum, .* use mala, hmc or langevin": {
        "sampler": {
            **CONFIG["sampler"],
            "kernel": {"name": "sghmc", "step_size": 0.1, "friction": 1.0},
        },
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_moving_levels_lack_is_one_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ebm_dist.train(config(tmp_path, **REFUSED[line]), run_dir=tmp_path / "r")
    (found,) = [arg for arg in caught.value.args if re.search(line, arg)]
    assert "\n" not in found
    assert not (tmp_path / "r").exists()
