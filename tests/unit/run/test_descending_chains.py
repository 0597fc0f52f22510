"""Chains that go down the noise levels of an energy: in a run, in `sample`, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ebm_dist
from ebm_dist.actors.worker import Worker
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.core.weights import FlatLayout
from ebm_dist.export.sample import draw, usual_steps

STDS = tuple(0.05 * 50 ** (k / 14) for k in range(15))
MEANS = [[-2.0, 0.0], [2.0, 0.0]]
SHARES = (0.8, 0.2)

CONFIG: dict[str, Any] = {
    "run": {"name": "descent", "seed": 0, "steps": 2},
    "runtime": {"backend": "inline"},
    "data": {"source": "toy:8gaussians", "toy_samples": 256, "batch_size": 32},
    # The exact law at each level, which a rate of 1e-12 leaves as it is.
    "energy": {
        "name": "gaussian_mixture",
        "means": MEANS,
        "stds": 0.2,
        "weights": list(SHARES),
        "learnable": True,
        "noise_stds": list(STDS),
    },
    "sampler": {"name": "predictor_corrector", "num_corrections": 4, "num_steps": 14},
    "objective": {"name": "denoising_score_matching", "conditioning": "level"},
    "learner": {"lr": 1e-12, "num_threads": 1},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ebm_dist.RunResult:
    return ebm_dist.train(CONFIG, run_dir=tmp_path_factory.mktemp("descent") / "r")


def test_samples_of_an_export_come_from_the_lowest_level_in_the_shares_of_its_modes(run):
    export = run.open_export()
    assert usual_steps(export) == len(STDS) - 1
    drawn = draw(export, 4000, usual_steps(export))
    assert (drawn.context["level"] == 0).all()
    left = (drawn.x[:, 0] < 0).float().mean().item()
    assert abs(left - SHARES[0]) < 4 * (SHARES[0] * SHARES[1] / 4000) ** 0.5
    away = drawn.x - torch.tensor(MEANS)[(drawn.x[:, 0] > 0).long()]
    assert away.abs().max() < 2  # noise at the start has 2.5
    assert 0.15 < away.std() < 0.3


def test_samples_of_a_level_have_its_noise(run):
    export = run.open_export()
    for level in (3, 8, 14):
        steps = usual_steps(export, level)
        drawn = draw(export, 2000, steps, level=level)
        assert (drawn.context["level"] == level).all()
        variance = 0.2**2 + STDS[level] ** 2  # of the second coordinate, in which modes agree
        assert drawn.x[:, 1].var().item() == pytest.approx(variance, rel=0.15)


def test_noise_at_the_highest_level_lies_about_the_mean_of_the_data(run):
    export = run.open_export()
    assert usual_steps(export, 14) == 0
    export.energy.data_mean = 3.0
    x = draw(export, 2000, 0, level=14).x
    error = STDS[14] / (2 * 2000) ** 0.5
    assert abs(x.mean().item() - 3.0) < 4 * error
    assert x.std().item() == pytest.approx(STDS[14], rel=0.05)


def test_a_run_without_chains_measures_samples_of_the_lowest_level(run):
    export = run.open_export()
    section = load(CONFIG).energy.bind(export.spec)
    worker = Worker(section, export.sampler, export.spec)
    weights = FlatLayout.of(worker._energy).pack(worker._energy)
    chains = worker.sample(500, 14, weights.numpy(), 3, start_std=1.0)
    assert (chains.context["level"] == 0).all()
    assert abs((chains.x[:, 0] < 0).mean() - SHARES[0]) < 0.1


REFUSED: dict[str, dict[str, Any]] = {
    r"energy\.num_levels: missing, but sampler\.name predictor_corrector .* or sampler\.name": {
        "energy": {"name": "mlp", "widths": [8]},
        "objective": {"name": "denoising_score_matching", "noise_std": 0.3},
    },
    r"sampler\.num_steps: 2, but a chain goes down one of the 4 levels .* to 3$": {
        "energy": {"name": "mlp", "widths": [8], "num_levels": 4, "noise_stds": [0.1, 2.0]},
        "sampler": {"name": "predictor_corrector", "num_steps": 2},
    },
    r"sampler\.name: predictor_corrector draws from an energy .* or sampler\.name: mala$": {
        "objective": {"name": "contrastive_levels"},
        "buffer": {"context": {"level": "stratified"}},
        "workers": {"num_chains": 32},
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_descending_chains_lack_is_one_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ebm_dist.train(CONFIG | REFUSED[line], run_dir=tmp_path / "r")
    (found,) = [arg for arg in caught.value.args if re.search(line, arg)]
    assert "\n" not in found
    assert not (tmp_path / "r").exists()
