"""An RBM trained by weighted persistent chains, against one trained by the exact gradient."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ebm_dist.config.run_config import load
from ebm_dist.data import load_split
from ebm_dist.energies.closed_form.boltzmann import Rbm
from ebm_dist.export.reader import load_energy
from ebm_dist.run.train import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from rbm_likelihood import METHODS, config, exact_gradient, log_likelihood

pytestmark = pytest.mark.slow
NUM_UPDATES = 1000


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("rbm") / "run"
    base = load(config(NUM_UPDATES), METHODS["PCD + Jarzynski"])
    train(base, run_dir=run_dir, console=Console(quiet=True))
    return run_dir


@pytest.mark.timeout(1800)
def test_weighted_pcd_reaches_the_likelihood_of_the_exact_gradient(run_dir: Path) -> None:
    base = config(NUM_UPDATES)
    x = load_split(load(base).data, "train").x
    learnt = load_energy(run_dir / "export")
    assert isinstance(learnt, Rbm)
    exact = log_likelihood(exact_gradient(base, x), x)
    # Independent pixels, each at its own mean, are far below: there was something to learn.
    mean = x.double().flatten(1).mean(0).clamp(1e-6, 1 - 1e-6)
    independent = float((mean * mean.log() + (1 - mean) * (1 - mean).log()).sum())
    assert exact > independent + 5
    assert abs(log_likelihood(learnt, x) - exact) < 0.05


@pytest.mark.timeout(1800)
def test_logged_log_z_stays_within_a_twentieth_of_a_nat_over_the_whole_run(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = [row for row in rows if "likelihood/log_z_exact" in row]
    assert len(rows) == NUM_UPDATES // 25
    exact = [row["likelihood/log_z_exact"] for row in rows]
    assert abs(exact[-1] - exact[0]) > 5
    assert max(abs(row["likelihood/log_z"] - row["likelihood/log_z_exact"]) for row in rows) < 0.05
