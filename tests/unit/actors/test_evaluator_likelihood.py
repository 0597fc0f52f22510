"""The likelihood that a run logs of its own model, against the exact one of the export."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import SMALL, curve, run

from ebm_dist.config.run_config import load
from ebm_dist.data import load_split
from ebm_dist.export.reader import load_energy


def test_auto_logs_the_exact_likelihood_at_the_runs_temperature(tmp_path: Path) -> None:
    run(
        tmp_path / "r",
        "evaluation.every=10",
        "evaluation.fidelity=false",
        "sampler.temperature=0.5",
    )
    energy = load_energy(tmp_path / "r" / "export")
    data = load(SMALL).data
    log_z = energy.log_z(0.5)  # type: ignore[operator]
    assert curve(tmp_path / "r", "likelihood/log_z")[20] == pytest.approx(log_z, abs=1e-5)
    assert set(curve(tmp_path / "r", "likelihood/log_z")) == {10, 20}
    for split, name in (("train", "log_prob"), ("test", "log_prob_test")):
        x = load_split(data, split, 1000).x  # type: ignore[arg-type]
        expected = float((-energy(x) / 0.5).mean()) - log_z
        logged = curve(tmp_path / "r", f"likelihood/{name}")[20]
        assert logged == pytest.approx(expected, abs=1e-5)


def test_auto_sums_the_smaller_side_of_an_rbm(tmp_path: Path) -> None:
    base = {
        **SMALL,
        "data": {"source": "digits", "binarize": "threshold", "batch_size": 128, "prefetch": 0},
        "energy": {"name": "rbm", "num_hidden": 6, "weight_std": 0.1},
        "sampler": {"name": "gibbs", "num_steps": 1},
    }
    run(tmp_path / "r", "evaluation.every=20", "evaluation.fidelity=false", base=base)
    energy = load_energy(tmp_path / "r" / "export")
    log_z = energy.log_z()  # type: ignore[operator]
    assert curve(tmp_path / "r", "likelihood/log_z")[20] == pytest.approx(log_z, abs=1e-4)


IMAGES = {
    **SMALL,
    "data": {"source": "digits", "batch_size": 128, "prefetch": 0},
    "energy": {"name": "quadratic", "precision": [2.0] * 64, "learnable": True},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
}


def test_true_anneals_where_nothing_is_exact(tmp_path: Path) -> None:
    run(
        tmp_path / "r",
        "evaluation.every=20",
        "evaluation.fidelity=false",
        "evaluation.likelihood=true",
        "evaluation.num_ais_chains=96",
        "evaluation.num_ais_temperatures=300",
        base=IMAGES,
    )
    log_z = load_energy(tmp_path / "r" / "export").log_z()  # type: ignore[operator]
    error = curve(tmp_path / "r", "likelihood/log_z_std_error")[20]
    logged = curve(tmp_path / "r", "likelihood/log_z")[20]
    assert 0 < error < 0.5
    assert abs(logged - log_z) < 4 * error
    lower = curve(tmp_path / "r", "likelihood/log_z_lower")[20]
    upper = curve(tmp_path / "r", "likelihood/log_z_upper")[20]
    assert lower < logged < upper


@pytest.mark.parametrize("wanted", ["auto", "false"])
def test_nothing_is_logged_where_it_is_not_exact_or_not_wanted(tmp_path: Path, wanted: str) -> None:
    base = IMAGES if wanted == "auto" else SMALL
    run(
        tmp_path / "r",
        "run.steps=5",
        "evaluation.every=5",
        "evaluation.fidelity=false",
        f"evaluation.likelihood={wanted}",
        base=base,
    )
    assert curve(tmp_path / "r", "energy/test")
    assert not curve(tmp_path / "r", "likelihood/log_z")


def test_an_energy_without_a_finite_z_costs_no_other_measurement(tmp_path: Path) -> None:
    base = {**SMALL, "energy": {"name": "mlp", "widths": [8]}}
    _, screen = run(
        tmp_path / "r",
        "run.steps=2",
        "evaluation.every=2",
        "sampler.step_size=0.01",
        base=base,
    )
    assert curve(tmp_path / "r", "energy/test")
    assert "failed" not in screen
