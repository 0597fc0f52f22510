"""Runs whose chains are tied to noisy data: the bits, what is logged, and what is refused."""

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

CONFIG: dict[str, Any] = {
    **QUIET,
    "run": {"seed": 3, "steps": 4},
    "data": {"source": "toy:swiss_roll", "toy_samples": 256, "batch_size": 16},
    "energy": {"name": "mlp", "widths": [8], "num_levels": 3, "noise_stds": [0.3, 0.9]},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 3},
    "objective": {
        "name": "recovery_likelihood",
        "chains": "pool",
        "conditioning": "level",
        "noise_std": [0.3, 0.6, 0.9],
    },
    "buffer": {
        "capacity": 32,
        "num_shards": 2,
        "init": "condition",
        "reinit_prob": 1.0,
        "context": {"level": "stratified", "pair": "data", "condition": "noisy_pair"},
    },
    "workers": {"num_workers": 2, "num_chains": 8, "num_threads": 1},
}


config = partial(changed, CONFIG)


def test_sync_is_bitwise_with_noisy_pairs_whoever_moves_the_chains_and_after_a_resume(
    tmp_path: Path,
) -> None:
    """Some chains keep their pair for several rounds: it has to outlive the resume."""
    base = config(tmp_path, buffer={**CONFIG["buffer"], "reinit_prob": 0.5})
    ebm_dist.train(base, run_dir=tmp_path / "a")
    four = {**base, "workers": {**base["workers"], "num_workers": 4}}
    ebm_dist.train({**four, "run": {**base["run"], "steps": 2}}, run_dir=tmp_path / "b")
    ebm_dist.train(four, run_dir=tmp_path / "b", resume="must")
    assert equal(tmp_path / "a", tmp_path / "b")
    before, after = chains(tmp_path / "a", 2), chains(tmp_path / "a", 4)
    moves, aged = (after[key] - before[key] for key in ("generation", "age"))
    kept = (moves > 0) & (before["age"] > 0) & (aged == moves)
    assert kept.any()
    for name in ("level", "pair", "condition"):
        assert np.array_equal(before[f"context/{name}"][kept], after[f"context/{name}"][kept])


@pytest.mark.ray
def test_noisy_pairs_killed_and_resumed_on_ray_train_bit_for_bit_as_in_one_process(
    tmp_path: Path,
) -> None:
    """On one node the noisy pairs are read from rows of shared memory, and half outlive a round."""
    base = config(tmp_path, buffer={**CONFIG["buffer"], "reinit_prob": 0.5})
    inline, resumed = resumed_on_ray(base, tmp_path, 2)
    assert equal(inline, resumed)
    assert_same_chains(inline, resumed, 4)
    assert (chains(resumed, 4)["age"] > 1).any()


def test_a_run_says_how_hot_its_tied_chains_are(tmp_path: Path) -> None:
    """The tie adds 1/s^2 to the curvature, in units of its width at each level."""
    run = config(
        tmp_path,
        evaluation={"every": 4, "num_samples": 32},
        energy={"name": "quadratic", "precision": [1e-6, 1e-6], "learnable": True},
        objective={"name": "recovery_likelihood", "chains": "pool", "noise_std": [0.5, 1.0, 2.0]},
    )
    result = ebm_dist.train(run, run_dir=tmp_path / "r")
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").open()]
    (curvature,) = (row["sampler/curvature"] for row in rows if "sampler/curvature" in row)
    assert curvature == pytest.approx(1 / 0.5**2, abs=0.5)
    assert np.isfinite(result.metrics["energy/gap"])


REFUSED: dict[str, dict[str, Any]] = {
    r"buffer\.init: expected condition, .* got noise; set buffer\.init: condition and "
    r"buffer\.context\.level: stratified and buffer\.context\.pair: data and "
    r"buffer\.context\.condition: noisy_pair": {"buffer": {"init": "noise", "context": {}}},
    r"buffer\.context\.level: expected stratified, .* got nothing; set [^ ]+ stratified$": {
        "buffer": {"context": {"pair": "data", "condition": "noisy_pair"}},
    },
    r"buffer\.reinit_prob: 0, but .* new pairs": {"buffer": {"reinit_prob": 0.0}},
    r"sampler\.clamp: set, but": {
        "sampler": {**CONFIG["sampler"], "clamp": [-1.0, 1.0]},
    },
    r"flow\.stale: reweight, but": {"flow": {"mode": "async", "stale": "reweight"}},
    r"objective: num_steps: set, but with chains: pool the section sampler": {
        "objective": {**CONFIG["objective"], "num_steps": 5},
    },
    r"energy\.num_levels: 3, but objective\.noise_std has 2 levels": {
        "objective": {**CONFIG["objective"], "noise_std": [0.3, 0.6]},
    },
    r"energy\.num_levels.* the energy needs the level .* or set conditioning: level$": {
        "objective": {**CONFIG["objective"], "conditioning": "none"},
    },
    r"buffer\.init: condition, but objective\.name contrastive makes no noisy pairs": {
        "objective": {"name": "contrastive"},
    },
    r"buffer\.context\.level: set, but objective\.name recovery_likelihood trains without": {
        "objective": {**CONFIG["objective"], "chains": "loss"},
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_noisy_pairs_lack_is_one_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ebm_dist.train(config(tmp_path, **REFUSED[line]), run_dir=tmp_path / "r")
    (found,) = [arg for arg in caught.value.args if re.search(line, arg)]
    assert "\n" not in found
    assert not (tmp_path / "r").exists()
