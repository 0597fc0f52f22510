"""Runs that are resumed at other numbers of shards, with every kind of context on their chains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains_with_context import QUIET, chains, changed

import ebm_dist

LANGEVIN = {"name": "langevin", "step_size": 0.05, "temperature": 1.0, "num_steps": 3}
LEVELS = {"name": "mlp", "widths": [8], "num_levels": 3, "noise_stds": [0.3, 0.9]}
BASE: dict[str, Any] = {
    **QUIET,
    "run": {"seed": 3, "steps": 6},
    "data": {"source": "digits", "batch_size": 16},
    "energy": {"name": "mlp", "widths": [8]},
    "sampler": LANGEVIN,
    "buffer": {"capacity": 48, "num_shards": 2, "reinit_prob": 0.1},
    "workers": {"num_workers": 1, "num_chains": 8, "num_threads": 1},
}
CASES: dict[str, dict[str, Any]] = {
    "label, clock": {
        "energy": {"num_classes": "data"},
        "buffer": {"context": {"label": "uniform", "clock": True}},
    },
    "label, condition": {
        "data": {"condition_size": 3},
        "energy": {"num_classes": "data", "classes": "embedding", "condition_shape": "data"},
        "buffer": {"context": {"label": "data", "condition": "data"}},
    },
    "moving level": {
        "energy": LEVELS,
        "sampler": {"name": "simulated_tempering", "kernel": LANGEVIN, "num_steps": 3},
        "objective": {"name": "contrastive_levels"},
        "buffer": {"context": {"level": "stratified"}},
    },
    "level, noisy condition, pair": {
        "energy": LEVELS,
        "objective": {
            "name": "recovery_likelihood",
            "chains": "pool",
            "conditioning": "level",
            "noise_std": [0.3, 0.6, 0.9],
        },
        "buffer": {
            "init": "condition",
            "context": {"level": "stratified", "pair": "data", "condition": "noisy_pair"},
        },
    },
}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The config of a case, and a run of it on two shards."""
    run_dir = tmp_path_factory.mktemp("shards") / "two"
    base = changed(BASE, run_dir, **CASES[request.param])
    ebm_dist.train(base, run_dir=run_dir)
    return base, run_dir


def by_identity(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    found = chains(run_dir, step)
    order = np.argsort(found["chain_id"])
    assert np.array_equal(found["chain_id"][order], np.arange(BASE["buffer"]["capacity"]))
    return {name: values[order] for name, values in found.items()}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_resume_at_other_numbers_of_shards_keeps_the_context_of_every_chain(
    num_shards: int, case: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    base, run_dir = case
    # One update more moves a third of the chains; the others lie as they were restored.
    more = {
        **base,
        "run": {**base["run"], "dir": str(tmp_path), "steps": base["run"]["steps"] + 1},
        "buffer": {**base["buffer"], "num_shards": num_shards},
    }
    resumed = tmp_path / "other"
    shutil.copytree(run_dir, resumed)
    ebm_dist.train(more, run_dir=resumed, resume="must")
    assert len(list(resumed.glob("checkpoints/step_00000007/shard_*"))) == num_shards
    before, after = by_identity(run_dir, 6), by_identity(resumed, 7)
    names = sorted(name for name in before if name.startswith("context/"))
    assert {name.removeprefix("context/") for name in names} == {
        name for name, value in base["buffer"]["context"].items() if value
    }
    for name in names:
        assert len(np.unique(before[name], axis=0)) > 2, f"{name} tells no chain from another"

    moves, aged = (after[key] - before[key] for key in ("generation", "age"))
    lain, kept = moves == 0, (moves > 0) & (aged == moves) & (before["age"] > 0)
    assert lain.sum() == 32
    assert kept.any()
    for name in ("position", "energy", "version", "age", *names):
        assert np.array_equal(before[name][lain], after[name][lain]), name
    for name in names:
        passed = after[name][kept] - before[name][kept]
        if name == "context/clock":
            assert np.array_equal(passed, LANGEVIN["num_steps"] * moves[kept])
        elif name == "context/level" and base["sampler"]["name"] == "simulated_tempering":
            assert passed.any()
            assert np.isin(after[name], range(3)).all()
        else:
            assert not passed.any(), name
