"""Runs whose chains carry Jarzynski weights: log Z all along, and what the weights repair."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError
from ebm_dist.export.reader import load_energy

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "actors"))
from small_runs import SMALL, curve, run

RBM: dict[str, Any] = {
    **SMALL,
    "run": {"name": "rbm", "seed": 3, "steps": 200},
    "data": {"source": "digits", "binarize": "threshold", "batch_size": 1408, "prefetch": 0},
    "energy": {"name": "rbm", "num_hidden": 10},
    "sampler": {"name": "gibbs", "num_steps": 16},
    # Four times as many chains as data: the estimate's error falls with their number, and
    # should be within the test's bound whatever the seed.
    "buffer": {
        "capacity": 5632,
        "num_shards": 1,
        "reinit_prob": 0.0,
        "jarzynski": True,
        "num_negatives": 5632,
    },
    "workers": {"num_workers": 1, "num_chains": 5632, "num_threads": 1},
    "learner": {"lr": 0.01, "warmup_steps": 50, "num_threads": 1},
    "tracking": {"wandb": "off", "log_every": 10},
    "evaluation": {"every": 10, "fidelity": False},
}


def test_logged_log_z_of_an_rbm_stays_at_the_exact_one_all_along(tmp_path: Path) -> None:
    run(tmp_path / "r", base=RBM)
    estimate = curve(tmp_path / "r", "likelihood/log_z")
    exact = curve(tmp_path / "r", "likelihood/log_z_exact")
    assert set(estimate) == set(exact) == set(range(10, 201, 10))
    # It moved far, so that an estimate which stood still would be seen; and the weights did not
    # get it for nothing: chains were copied over others.
    assert curve(tmp_path / "r", "likelihood/resampled")[200] > 0
    assert abs(exact[200] - exact[10]) > 5
    assert max(abs(estimate[step] - exact[step]) for step in exact) < 0.05
    log_prob = curve(tmp_path / "r", "likelihood/log_prob")
    assert log_prob[200] > log_prob[10] + 5
    assert abs(log_prob[200] - curve(tmp_path / "r", "likelihood/log_prob_exact")[200]) < 0.05


LINE: dict[str, Any] = {
    **SMALL,
    "run": {"name": "line", "seed": 5, "steps": 150},
    "data": {
        "source": "toy:unit_gaussian_1d",
        "toy_samples": 32768,
        "batch_size": 4096,
        "prefetch": 0,
    },
    "sampler": {"name": "langevin", "step_size": 0.4, "temperature": 1.0, "num_steps": 3},
    "buffer": {"capacity": 4096, "num_shards": 1, "reinit_prob": 0.0, "jarzynski": True},
    "workers": {"num_workers": 1, "num_chains": 4096, "num_threads": 1},
    "learner": {"lr": 0.05, "schedule": "cosine", "final_lr_fraction": 0.01, "num_threads": 1},
    "evaluation": {"every": 15},
}


def precision(run_dir: Path) -> float:
    return float(next(load_energy(run_dir / "export").parameters()))


def test_weights_take_the_discretisation_out_of_what_is_learnt(tmp_path: Path) -> None:
    # At h = 0.4 the chains of precision a have variance 2 / (a (2 - 0.4 a)), so unweighted ones
    # fit unit data with a (2 - 0.4 a) = 2: there is no such a below 1/h, the pull has no zero
    # until a = 1.38. Weighted, the answer is that of the data, 1 / var(data).
    run(tmp_path / "r", base=LINE)
    exact = curve(tmp_path / "r", "likelihood/log_z_exact")
    estimate = curve(tmp_path / "r", "likelihood/log_z")
    assert max(abs(estimate[step] - exact[step]) for step in exact) < 0.03
    # 1/var of 32768 data: 4 standard errors; of the chains' side the same again for 4096.
    assert abs(precision(tmp_path / "r") - 1) < 4 * math.sqrt(2 / 32768 + 2 / 4096)
    run(tmp_path / "plain", "buffer.jarzynski=false", base=LINE)
    assert precision(tmp_path / "plain") > 1.3


def test_chains_that_skipped_versions_get_the_weight_that_their_lag_implies(tmp_path: Path) -> None:
    # Each update moves a quarter of the chains: the others stand for several versions.
    base = {**LINE, "buffer": {**LINE["buffer"], "capacity": 16384, "num_shards": 2}}
    run(
        tmp_path / "r",
        "sampler={name: mala, step_size: 0.5, temperature: 1.0, num_steps: 3}",
        base=base,
    )
    exact = curve(tmp_path / "r", "likelihood/log_z_exact")
    estimate = curve(tmp_path / "r", "likelihood/log_z")
    assert abs(exact[150] - exact[15]) > 0.1
    assert max(abs(estimate[step] - exact[step]) for step in exact) < 0.03


TWO_SHARDS = ["buffer.num_shards=2", "workers.num_chains=2048"]
ASYNC = ["flow={mode: async, max_lag: 4}"]


@pytest.mark.parametrize("overrides", [TWO_SHARDS, ASYNC, TWO_SHARDS + ASYNC])
def test_neither_shards_nor_lag_bias_log_z_or_what_is_learnt(
    overrides: list[str], tmp_path: Path
) -> None:
    run(tmp_path / "r", *overrides, base=LINE)
    lag = curve(tmp_path / "r", "flow/lag_max")
    assert (max(lag.values()) > 0) == ("flow={mode: async, max_lag: 4}" in overrides)
    exact = curve(tmp_path / "r", "likelihood/log_z_exact")
    estimate = curve(tmp_path / "r", "likelihood/log_z")
    assert len(exact) == 10
    assert max(abs(estimate[step] - exact[step]) for step in exact) < 0.03
    assert abs(precision(tmp_path / "r") - 1) < 4 * math.sqrt(2 / 32768 + 2 / 4096)


@pytest.mark.slow
@pytest.mark.ray
def test_two_ranks_two_shards_and_two_workers_that_run_ahead_agree_on_log_z(
    tmp_path: Path,
) -> None:
    # Chains of several versions in one batch, cut in two by the ranks: what each normalises
    # must be the weights of all.
    run(
        tmp_path / "r",
        "runtime={backend: ray, address: local, start_timeout_s: 400}",
        "learner.num_ranks=2",
        "workers={num_workers: 2, num_chains: 2048, num_threads: 1}",
        "buffer.num_shards=2",
        "buffer.capacity=8192",
        *ASYNC,
        base=LINE,
    )
    exact = curve(tmp_path / "r", "likelihood/log_z_exact")
    estimate = curve(tmp_path / "r", "likelihood/log_z")
    assert max(curve(tmp_path / "r", "flow/lag_max").values()) > 0
    assert max(abs(estimate[step] - exact[step]) for step in exact) < 0.03
    assert abs(precision(tmp_path / "r") - 1) < 4 * math.sqrt(2 / 32768 + 2 / 4096)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("buffer.reinit_prob=0.05", "buffer.reinit_prob"),
        ("buffer.init=data", "buffer.init"),
        ("sampler.clamp=[-3, 3]", "sampler.clamp"),
        ("sampler.grad_clip=0.1", "sampler.grad_clip"),
        ("sampler={name: sghmc, step_size: 0.1, friction: 1.0, temperature: 1.0}", "sampler.name"),
        ("objective={name: score_matching}", "buffer.jarzynski"),
        ("sampler.precision=bf16", "sampler.precision"),
        ("learner.accumulation=2", "learner.accumulation"),
    ],
)
def test_what_has_no_weights_is_refused_by_its_key(override: str, key: str) -> None:
    with pytest.raises(UserError, match=key) as caught:
        load(LINE, [override])
    assert len(str(caught.value).splitlines()) == 1
