"""Runs whose chains flow by their own clock: the bits, what is logged, and what is refused."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains_with_context import QUIET, chains, changed, equal, resumed_on_ray

import ebm_dist
from ebm_dist.core.errors import UserError

CONFIG: dict[str, Any] = {
    **QUIET,
    "run": {"seed": 3, "steps": 6},
    "data": {"source": "toy:swiss_roll", "toy_samples": 256, "batch_size": 16},
    "energy": {"name": "mlp", "widths": [8]},
    "sampler": {"name": "flow_langevin", "step_size": 0.2, "temperature": 0.1, "num_steps": 3},
    "objective": {"name": "energy_matching", "contrastive_weight": 0.1, "min_clock": 5},
    "buffer": {
        "capacity": 32,
        "num_shards": 2,
        "reinit_prob": 0.2,
        "context": {"clock": True},
    },
    "workers": {"num_workers": 2, "num_chains": 8, "num_threads": 1},
    "checkpoint": {"every": 3, "keep": 5},
}


config = partial(changed, CONFIG)


def test_sync_is_bitwise_with_clocks_whoever_moves_the_chains_and_after_a_resume(
    tmp_path: Path,
) -> None:
    base = config(tmp_path)
    ebm_dist.train(base, run_dir=tmp_path / "a")
    four = {**base, "workers": {**base["workers"], "num_workers": 4}}
    ebm_dist.train({**four, "run": {**base["run"], "steps": 3}}, run_dir=tmp_path / "b")
    ebm_dist.train(four, run_dir=tmp_path / "b", resume="must")
    assert equal(tmp_path / "a", tmp_path / "b")
    for step in (3, 6):
        found = chains(tmp_path / "a", step)
        assert np.array_equal(found["context/clock"], 3 * found["age"])
        assert len(set(found["age"])) > 2
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    arrived = [row["chain/arrived"] for row in rows if "chain/arrived" in row]
    assert arrived[0] == 0, "in the first round of three steps nobody is five steps old"
    assert 0 < arrived[-1] < 1
    # The schedule reads the clock: without it every round flows anew.
    anew = {**base["objective"], "min_clock": 0}
    annealed = {**base["sampler"], "name": "annealed_langevin", "num_annealing_steps": 5}
    with_clock = {**base, "sampler": annealed, "objective": anew}
    ebm_dist.train(with_clock, run_dir=tmp_path / "c")
    without = {**with_clock, "buffer": {**base["buffer"], "context": {}}}
    ebm_dist.train(without, run_dir=tmp_path / "d")
    assert not equal(tmp_path / "c", tmp_path / "d")


@pytest.mark.ray
def test_clocks_killed_and_resumed_on_ray_train_bit_for_bit_as_in_one_process(
    tmp_path: Path,
) -> None:
    base = config(tmp_path)
    assert equal(*resumed_on_ray(base, tmp_path, 3))


REFUSED: dict[str, dict[str, Any]] = {
    r"objective\.min_clock: 5, but chains carry no clock; set buffer\.context\.clock: true": {
        "buffer": {"context": {}},
    },
    r"buffer\.context\.clock: false, but sampler\.name: flow_langevin takes 5 steps": {
        "buffer": {"context": {}},
        "objective": {"name": "energy_matching"},
    },
    r"buffer\.init: data, but sampler\.name: flow_langevin flows from noise": {
        "buffer": {"init": "data"},
    },
    r"no samples of the model before step 5, .* set objective\.min_clock: 5$": {
        "objective": {"name": "energy_matching", "min_clock": 4},
    },
    r"no samples .* set objective\.name: energy_matching and objective\.min_clock: 5$": {
        "objective": {"name": "contrastive"},
    },
    r"buffer\.reinit_prob: 1, but hardly a chain lives for the 2 rounds .* lower it to 0\.292$": {
        "buffer": {"reinit_prob": 1.0},
    },
    r"evaluation\.audit_every: 2, but an audit does not know the clock": {
        "evaluation": {"audit_every": 2},
    },
    r"buffer\.init_std: expected objective\.noise_std = 0\.5, .* got 1; set it to 0\.5$": {
        "objective": {**CONFIG["objective"], "noise_std": 0.5},
    },
    r"buffer\.init: noise starts images uniformly .* set buffer\.init: gaussian$": {
        "data": {"source": "digits", "batch_size": 16},
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_flow_of_chains_lacks_is_one_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ebm_dist.train(config(tmp_path, **REFUSED[line]), run_dir=tmp_path / "r")
    (found,) = [arg for arg in caught.value.args if re.search(line, arg)]
    assert "\n" not in found
    assert not (tmp_path / "r").exists()


def test_images_flow_from_gaussian_noise(tmp_path: Path) -> None:
    run = config(tmp_path, data={"source": "digits", "batch_size": 16}, buffer={"init": "gaussian"})
    ebm_dist.train({**run, "run": {**run["run"], "steps": 1}}, run_dir=tmp_path / "r")
    found = chains(tmp_path / "r", 1)
    new = found["position"][found["age"] == 0]
    assert len(new) >= 8
    assert abs(new.std() - 1) < 4 / (2 * new.size) ** 0.5
