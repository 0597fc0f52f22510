"""Every objective, trained by the real trainer from `configs/toy/`, ends at its known answer."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

import ebm_dist
from ebm_dist import objectives
from ebm_dist.config.run_config import load
from ebm_dist.data import describe
from ebm_dist.run.train import bind

FOLDER = Path(__file__).parents[2] / "configs" / "toy"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# Parameters of the trained energy, and how far off they may be. The variance of 32,768 data is
# known to .78%, so 4 standard errors are 3.1% of a precision that answers it directly.
EXPECTED: dict[str, dict[str, tuple[list[float], float]]] = {
    "contrastive": {"precision": ([1.0], 0.035)},
    # alpha (2 - .1 alpha) = 2 v / ... is nearly proportional to 1/v.
    "contrastive_cd": {"precision": ([1.05573], 0.04)},
    "contrastive_short_run": {"precision": ([1.73491], 0.06)},
    # The errors of a precision of 2.78 are 2.78 times larger; those of the line are .6 / sqrt(N).
    "contrastive_conditional": {
        "precision": ([1 / 0.36], 0.09),
        "slope": ([0.8], 0.0135),
        "mean": ([0.0], 0.0135),
    },
    "contrastive_gradient_penalty": {"precision": ([0.85410], 0.03)},
    "score_matching": {"precision": ([1.0], 0.035)},
    "sliced_score_matching": {"precision": ([1.0], 0.035)},
    "denoising_score_matching": {"precision": ([0.8], 0.03)},
    "denoising_multi_sigma": {"precision": ([0.23529], 0.01)},
    "recovery_likelihood": {"precision": ([1.0], 0.05)},
    "recovery_likelihood_pool": {"precision": ([1.0], 0.05)},
    "noise_contrastive": {"precision": ([1.0], 0.05)},
    "energy_discrepancy": {"precision": ([1.0], 0.05)},
    "energy_matching": {"precision": ([0.5, 0.75], 0.04), "mean": ([5.0, -1.8333], 0.3)},
    "energy_matching_contrastive": {"precision": ([0.45294], 0.02)},
    "energy_matching_pool": {"precision": ([0.45979], 0.02)},
    "reverse_kl": {"precision": ([1.02**-2], 0.1), "mean": ([2.98], 0.1)},
    "contrastive_covering": {"precision": ([0.1], 0.005), "mean": ([0.0], 0.2)},
    "pseudo_likelihood": {"coupling": ([0.4], 0.02), "field": ([0.0], 0.02)},
    "ratio_matching": {"coupling": ([0.4], 0.02), "field": ([0.0], 0.02)},
}


def test_every_objective_has_a_toy_config():
    trained = {load(FOLDER / f"{name}.yaml").objective.name for name in CONFIGS}
    assert trained == objectives.FAMILY.members.keys() - {"module"}, "a user brings that one"


@pytest.mark.parametrize("name", CONFIGS)
def test_toy_config_is_complete_and_fits_its_data(name, tmp_path):
    config = load(FOLDER / f"{name}.yaml", [f"data.cache_dir={tmp_path}", "data.toy_samples=64"])
    bind(config, describe(config.data))
    text = (FOLDER / f"{name}.yaml").read_text()
    assert "Known answer" in text
    assert name in EXPECTED or name in ("joint", "contrastive_levels")


def train(name: str, folder: Path):
    console = Console(file=io.StringIO())
    result = ebm_dist.train(FOLDER / f"{name}.yaml", run_dir=folder, console=console)
    assert result.finished
    return ebm_dist.load_energy(result.export_dir), result.metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_training_ends_at_the_known_answer(name, tmp_path):
    energy, metrics = train(name, tmp_path / name)
    weights = energy.state_dict()
    for key, (expected, tolerance) in EXPECTED[name].items():
        came = weights[key].reshape(-1).double()
        assert (came - torch.tensor(expected).double()).abs().max() < tolerance, (key, came)
    if name == "noise_contrastive":
        log_z = 0.5 * math.log(2 * math.pi)
        assert metrics["likelihood/log_z"] == pytest.approx(log_z, abs=0.03)
    if name == "reverse_kl":
        assert metrics["loss/critic"] == pytest.approx(0.68879, abs=0.06)


@pytest.mark.slow
def test_chains_of_all_levels_learn_the_masses_of_far_modes(tmp_path):
    energy, metrics = train("contrastive_levels", tmp_path / "levels")
    masses = energy.state_dict()["logits"].softmax(0)
    # 32,768 data: a share of 1/8 is known to .0018.
    assert (masses - 1 / 8).abs().max() < 0.02, masses
    assert metrics["chain/level_occupancy"] > 0.8


@pytest.mark.slow
def test_joint_training_learns_the_posterior_and_the_density(tmp_path):
    energy, _ = train("joint", tmp_path / "joint")
    x = torch.linspace(-1.0, 1.0, 21)[:, None]
    with torch.no_grad():
        logits = energy.logits(x)
        values = energy(torch.tensor([[-3.0], [0.0], [3.0]]))
    slope = torch.linalg.lstsq(x, (logits[:, 1] - logits[:, 0])[:, None]).solution.item()
    assert slope == pytest.approx(6.0, abs=2.0)
    assert ((logits[:, 1] > logits[:, 0]) == (x.flatten() > 0))[x.flatten().abs() > 0.15].all()
    barrier = (values[1] - 0.5 * (values[0] + values[2])).item()
    assert barrier == pytest.approx(4.5 - math.log(2), abs=0.8)
    assert abs((values[0] - values[2]).item()) < 0.5
