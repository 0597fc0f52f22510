"""Chains that stand still are found over rounds, named by their shard, and started anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import SMALL, curve, run

from ebm_dist.buffer.trace import ChainTrace, TracePlan
from ebm_dist.cluster.backend import PartDied
from ebm_dist.controller.observers.chain_health import ChainMonitor
from ebm_dist.metrics.hub import MetricHub

# A barrier of a = 60 at T = 1 between wells of width 1/20: nobody crosses. The chains start on
# both sides, and data on one pulls no chain over.
TWO_WELLS: dict[str, Any] = {
    **SMALL,
    "run": {"name": "wells", "seed": 0, "steps": 60},
    "data": {**SMALL["data"], "source": "toy:two_gaussians_1d"},
    "energy": {
        "name": "gaussian_mixture",
        "means": [[-3.0], [3.0]],
        "stds": 0.2,
        "learnable": True,
    },
    "sampler": {"name": "mala", "step_size": 0.04, "temperature": 1.0, "num_steps": 10},
    "buffer": {"capacity": 128, "num_shards": 2, "reinit_prob": 0.0, "init_std": 3.0},
    "learner": {"lr": 1e-5, "num_threads": 1},
    "tracking": {"wandb": "off", "log_every": 10},
}


def test_chains_confined_to_a_well_raise_an_alarm_that_names_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alerts: list[tuple[int, str, str, str]] = []
    monkeypatch.setattr(MetricHub, "alert", lambda self, *alert: alerts.append(alert))
    _, screen = run(tmp_path / "r", base=TWO_WELLS)
    assert curve(tmp_path / "r", "chain/stagnant")[60] > 0.9
    assert curve(tmp_path / "r", "chain/trace_rhat")[60] > 2
    assert curve(tmp_path / "r", "chain/alarms")[60] >= 2
    for shard in ("shard 0", "shard 1"):
        assert screen.count(f"{shard}: ") == 1  # told once, not at every log line
    assert "sampler.num_steps" in screen
    assert curve(tmp_path / "r", "chain/reseeded")[60] == 0
    ((_, title, text, _),) = alerts
    assert title == "Chains are stuck"
    assert text.startswith("shard ")
    run(tmp_path / "r", "run.steps=120", base=TWO_WELLS)
    assert curve(tmp_path / "r", "chain/alarms")[120] >= 2
    assert len(alerts) == 1  # the resumed run finds them stuck too, and tells it an hour later


def test_a_short_run_generators_chains_keep_their_mode_and_that_is_said_once(
    tmp_path: Path,
) -> None:
    cold = {"name": "langevin", "step_size": 0.01, "temperature": 5e-6, "num_steps": 10}
    restarted = {**TWO_WELLS["buffer"], "reinit_prob": 0.01}
    _, screen = run(tmp_path / "r", base={**TWO_WELLS, "sampler": cold, "buffer": restarted})
    assert curve(tmp_path / "r", "chain/stagnant")[60] > 0.2
    assert curve(tmp_path / "r", "chain/alarms")[60] == 0
    assert screen.count("chains keep their mode, as usual at this temperature") == 1
    assert "parallel_tempering" not in screen


def test_healthy_chains_raise_none(tmp_path: Path) -> None:
    _, screen = run(tmp_path / "r", "run.steps=60", "tracking.log_every=10")
    assert curve(tmp_path / "r", "chain/stagnant")[60] < 0.1
    assert curve(tmp_path / "r", "chain/alarms")[60] == 0
    assert curve(tmp_path / "r", "chain/trace_rhat")[60] < 1.2
    assert "stuck" not in screen
    assert "confined" not in screen


def test_stuck_chains_are_started_anew_where_that_is_asked_for(tmp_path: Path) -> None:
    run(tmp_path / "r", "evaluation.reseed_stuck=true", base=TWO_WELLS)
    run(tmp_path / "without", base=TWO_WELLS)
    assert curve(tmp_path / "r", "chain/reseeded")[60] > 20
    ages = [curve(tmp_path / name, "chain/age_mean")[60] for name in ("r", "without")]
    assert ages[1] == pytest.approx(60, abs=2)
    assert ages[0] < ages[1] - 5


def test_a_shard_that_dies_while_it_is_asked_takes_no_row_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def check(self: ChainMonitor) -> dict[str, float]:
        looks.append(len(looks))
        if len(looks) == 3:
            raise PartDied("it was killed")
        return {"chain/alarms": 0.0}

    monkeypatch.setattr(ChainMonitor, "check", check)
    result, _ = run(tmp_path / "r", "run.steps=8", "tracking.log_every=1")
    assert result.finished
    assert list(curve(tmp_path / "r", "weights/version")) == list(range(1, 9))
    assert sorted(curve(tmp_path / "r", "chain/alarms")) == [1, 2, 4, 5, 6, 7, 8]


def test_following_none_costs_and_logs_nothing(tmp_path: Path) -> None:
    run(tmp_path / "r", "run.steps=30", "evaluation.trace_chains=0")
    assert not curve(tmp_path / "r", "chain/stagnant")


def test_a_trace_holds_each_chains_own_rounds_in_order() -> None:
    plan = TracePlan(num_chains=4, num_records=8, max_stuck=0.25)
    trace = ChainTrace(plan, capacity=10, event_shape=(1,))
    rng = np.random.default_rng(0)
    moves = rng.normal(size=(40, 10, 1)).astype(np.float32)
    for k in range(40):
        slots = rng.permutation(10)[:7]  # some chains are elsewhere in each round
        slots = slots[trace.follows(slots)]
        trace.record(slots, moves[k][slots], np.zeros(len(slots)), np.zeros(len(slots), bool))
    report = trace.report("shard 0")
    assert report is not None
    # White noise: no memory, every chain explores all.
    assert report.values["chain/stagnant"] == 0
    assert report.values["chain/trace_autocorrelation"] < 2.5
    # The window was full, so the next slots are followed, from nothing.
    assert list(trace.slots) == [4, 5, 6, 7]
    assert trace.report("shard 0") is None


def test_a_fresh_start_is_no_move_between_modes() -> None:
    plan = TracePlan(num_chains=8, num_records=8, max_stuck=0.25)
    trace = ChainTrace(plan, capacity=8, event_shape=(1,))
    slots = np.arange(8)
    side = np.where(slots % 2 == 0, -1.0, 1.0)[:, None].astype(np.float32)
    rng = np.random.default_rng(0)
    for k in range(20):
        fresh = np.full(8, k == 10)  # every chain starts anew on the other side
        where = side if k < 10 else -side
        noise = 0.01 * rng.normal(size=(8, 1)).astype(np.float32)
        trace.record(slots, where + noise, np.zeros(8), fresh)
    report = trace.report("shard 3")
    assert report is not None
    assert report.values["chain/stagnant"] == 1.0
    assert report.alarm.startswith("shard 3: 8 of 8 chains are confined")


def test_a_coordinate_that_no_chain_leaves_raises_the_alarm_of_its_shard() -> None:
    plan = TracePlan(num_chains=16, num_records=32, max_stuck=0.25)
    trace = ChainTrace(plan, capacity=16, event_shape=(10,))
    slots, rng = np.arange(16), np.random.default_rng(0)
    for _ in range(32):
        x = rng.normal(size=(16, 10)).astype(np.float32)
        x[:, 7] = np.where(slots % 2 == 0, -3.0, 3.0)
        trace.record(slots, x, np.zeros(16), np.zeros(16, bool))
    report = trace.report("shard 1")
    assert report is not None
    assert report.values["chain/stagnant"] == 0
    assert report.alarm.startswith("shard 1: the chains move, but disagree about coordinate 7")


@pytest.mark.parametrize("apart", [0.0, 3.0])
def test_energies_are_judged_less_what_moving_weights_do_to_all(apart: float) -> None:
    plan = TracePlan(num_chains=16, num_records=32, max_stuck=0.25)
    trace = ChainTrace(plan, capacity=16, event_shape=(1,))
    slots, rng = np.arange(16), np.random.default_rng(0)
    for k in range(32):
        x = rng.normal(size=(16, 1)).astype(np.float32)
        energy = 10.0 * k + apart * (slots % 2) + rng.normal(size=16)
        trace.record(slots, x, energy, np.zeros(16, bool))
    report = trace.report("shard 0")
    assert report is not None
    assert (report.values["chain/trace_energy_rhat"] > 1.2) == (apart > 0)
    assert (report.alarm is not None) == (apart > 0)
    if apart:
        assert "disagree about the energy" in report.alarm


@pytest.mark.parametrize("one_law", [False, True])
def test_chains_of_other_contexts_are_not_asked_to_agree(one_law: bool) -> None:
    plan = TracePlan(num_chains=16, num_records=32, max_stuck=0.25, one_law=one_law)
    slots, rng = np.arange(16), np.random.default_rng(0)
    trace, drifting = (ChainTrace(plan, capacity=16, event_shape=(2,)) for _ in range(2))
    for k in range(32):
        x = rng.normal(size=(16, 2)).astype(np.float32) + 5 * slots[:, None]
        energy = slots + rng.normal(size=16)
        trace.record(slots, x, energy, np.zeros(16, bool))
        drifting.record(slots, x + 0.2 * k, energy, np.zeros(16, bool))
    report, other = trace.report("shard 0"), drifting.report("shard 0")
    assert report is not None
    assert other is not None
    assert (report.alarm is not None) == one_law
    assert other.alarm is not None
