"""Runs that audit themselves: a planted spurious minimum is found, and fed back it goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.export.reader import load_energy

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "actors"))
from small_runs import SMALL, curve, run

# Data are N(0, 1). The energy starts with a second, deeper well at 6, which chains of a quarter
# of a unit of time from N(0, 1) never see.
PLANTED: dict[str, Any] = {
    **SMALL,
    "run": {"name": "planted", "seed": 0, "steps": 160},
    "energy": {
        "name": "gaussian_mixture",
        "means": [[0.0], [6.0]],
        "stds": 1.0,
        "weights": [1.0, 5.0],
        "learnable": True,
    },
    "sampler": {"name": "langevin", "step_size": 0.05, "temperature": 1.0, "num_steps": 5},
    "buffer": {"capacity": 128, "num_shards": 1, "reinit_prob": 1.0},
    # Plain descent: Adam makes a full step of the few chains that drift over.
    "learner": {"lr": 0.1, "optimizer": "sgd", "num_threads": 1, "ema_decay": 0.0},
    "evaluation": {
        "every": None,
        "audit_every": 40,
        "audit_steps": 4000,
        "audit_chains": 64,
        "audit_feedback_weight": 0.5,
        "audit_feedback_updates": 40,
    },
}


def weight_of_the_planted_well(run_dir: Path) -> float:
    energy = load_energy(run_dir / "export")
    return float(energy.logits.softmax(0)[1])  # type: ignore[union-attr, operator]


def test_a_planted_minimum_is_found_and_feeding_it_back_removes_it(tmp_path: Path) -> None:
    _, screen = run(tmp_path / "without", base=PLANTED)
    spurious = curve(tmp_path / "without", "audit/spurious")
    assert set(spurious) == {40, 80, 120, 160}
    assert min(spurious.values()) > 0.3
    assert "fell into spurious minima" in screen
    assert "evaluation.audit_feedback" in screen
    assert weight_of_the_planted_well(tmp_path / "without") > 0.7
    assert curve(tmp_path / "without", "audit/fed_back")[160] == 0

    run(tmp_path / "with", "evaluation.audit_feedback=true", base=PLANTED)
    spurious = curve(tmp_path / "with", "audit/spurious")
    assert spurious[40] > 0.3
    assert spurious[160] < 0.05
    assert curve(tmp_path / "with", "audit/fed_back")[160] >= 20
    assert weight_of_the_planted_well(tmp_path / "with") < 0.2


SHORT_RUN = Path(__file__).parents[2] / "configs" / "toy" / "contrastive_short_run.yaml"


@pytest.mark.slow
def test_the_audit_of_the_short_run_generator_sees_its_long_run_variance(tmp_path: Path) -> None:
    from rich.console import Console

    from ebm_dist.run.train import train

    overrides = [
        "evaluation.audit_every=800",
        "evaluation.audit_steps=1500",
        "evaluation.audit_chains=20000",
    ]
    train(load(SHORT_RUN, overrides), run_dir=tmp_path / "r", console=Console(quiet=True))
    # The precision is known to 3.1% (32768 data), the variance of 20000 chains to 4 * 1%.
    assert curve(tmp_path / "r", "audit/variance")[800] == pytest.approx(0.58144, rel=0.05)
    assert curve(tmp_path / "r", "audit/variance_short")[800] == pytest.approx(1.0, rel=0.05)
    assert curve(tmp_path / "r", "audit/law_distance")[800] > 0.05

    # The long chains themselves as nearly all of the negatives: likelihood training.
    overrides = [
        "run.steps=800",
        "evaluation.audit_every=50",
        "evaluation.audit_steps=1000",
        "evaluation.audit_chains=512",
        "evaluation.audit_feedback=true",
        "evaluation.audit_feedback_weight=0.9",
    ]
    train(load(SHORT_RUN, overrides), run_dir=tmp_path / "fed", console=Console(quiet=True))
    # .1 V_short + .9 V_long = 1 at precision 1.10: the long run's variance is .91, not .58.
    assert curve(tmp_path / "fed", "audit/variance")[800] > 0.8


def test_an_audit_of_persistent_chains_goes_on_from_them(tmp_path: Path) -> None:
    overrides = [
        "buffer.reinit_prob=0.0",
        "sampler={name: mala, step_size: 0.5, temperature: 1.0, num_steps: 5}",
        "energy={name: quadratic, precision: [1.0], learnable: true}",
        "learner.lr=0.0001",
        "run.steps=40",
        "evaluation.audit_steps=200",
    ]
    _, screen = run(tmp_path / "r", *overrides, base=PLANTED)
    # Chains that represent the model: a long run tells nothing new, and no alarm sounds.
    assert curve(tmp_path / "r", "audit/spurious")[40] == 0
    assert "audit:" not in screen


def test_a_run_with_feedback_is_the_same_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(
            tmp_path / name,
            "evaluation.audit_feedback=true",
            "evaluation.audit_steps=1000",
            "run.steps=60",
            base=PLANTED,
        )
    left, right = (load_energy(tmp_path / name / "export").state_dict() for name in ("a", "b"))
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["evaluation.audit_steps=5"], "evaluation.audit_steps"),
        (["evaluation.audit_chains=1"], "evaluation.audit_chains"),
        (["evaluation.audit_every=null", "evaluation.audit_feedback=true"], "audit_feedback"),
        (["objective={name: score_matching}", "evaluation.audit_feedback=true"], "audit_feedback"),
    ],
)
def test_an_audit_that_cannot_work_is_refused_by_its_key(overrides: list[str], key: str) -> None:
    with pytest.raises(UserError, match=key) as caught:
        load(PLANTED, overrides)
    assert len(str(caught.value).splitlines()) == 1
