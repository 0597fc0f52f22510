"""Alerts of a run: which events are worth one, how rarely, and that they say what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import Node
from ebm_dist.controller.observers import alerts as module
from ebm_dist.controller.observers.alerts import NUM_LAGGING, Alerts, Level


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    for of_the_time in ("monotonic", "time"):
        monkeypatch.setattr(module.time, of_the_time, lambda: now[0])
    return now


Sent = list[tuple[int, str, str, Level]]


def made(
    *,
    max_lag: int | None = 8,
    nodes: Callable[[], list[Node]] = list,
    sent_at: dict[str, float] | None = None,
) -> tuple[Alerts, Sent]:
    sent: Sent = []
    sent_at = {} if sent_at is None else sent_at
    alerts = Alerts(
        lambda *alert: sent.append(alert), max_lag=max_lag, nodes=nodes, sent_at=sent_at
    )
    return alerts, sent


def test_a_rollback_is_told_once_and_those_before_a_resume_are_not(clock: list[float]) -> None:
    alerts, sent = made()
    alerts.rollbacks = 1
    for step, rollbacks in ((10, 1), (20, 2), (30, 2), (40, 3)):
        alerts.look(step, {"fault/rollbacks": float(rollbacks)}, None)
    ((step, title, text, level),) = sent
    assert (step, title, level) == (20, "Training diverged and went back", "ERROR")
    assert "learner.lr" in text
    clock[0] += module.PAUSE_S
    alerts.look(50, {"fault/rollbacks": 4.0}, None)
    assert [step for step, *_ in sent] == [20, 50]


def test_chains_that_stay_stuck_are_told_once_an_hour(clock: list[float]) -> None:
    alerts, sent = made()
    for step in range(100):
        alerts.look(step, {}, "shard 0: 12 of 32 chains stand still; raise sampler.step_size")
        clock[0] += 60.0
    assert [step for step, *_ in sent] == [0, 60]
    assert {(title, text) for _, title, text, _ in sent} == {
        ("Chains are stuck", "shard 0: 12 of 32 chains stand still; raise sampler.step_size.")
    }


@pytest.mark.parametrize("newer", ["checkpoint", "manifest"])
def test_a_resumed_run_tells_nothing_again_within_the_hour(newer: str, clock: list[float]) -> None:
    first, resumed = Progress(), Progress()
    meta = {**first.remembered(), "wall_s": 0.0, "next_lease": 0}
    alerts, sent = made(sent_at=first.alerts)
    alerts.look(10, {}, "12 of 32 chains stand still")
    remembered = first.remembered()
    resumed.resume(
        0,
        {**meta, **remembered} if newer == "checkpoint" else meta,
        remembered if newer == "manifest" else {},
    )
    alerts, after = made(sent_at=resumed.alerts)
    clock[0] += module.PAUSE_S - 1
    alerts.look(20, {}, "12 of 32 chains stand still")
    assert (len(sent), after) == (1, [])
    clock[0] += 1
    alerts.look(30, {}, "12 of 32 chains stand still")
    assert [step for step, *_ in after] == [30]


def test_a_clock_that_was_set_back_silences_no_alert(clock: list[float]) -> None:
    alerts, sent = made(sent_at={"Chains are stuck": clock[0] + 1})
    alerts.look(10, {}, "12 of 32 chains stand still")
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("max_lag", "row", "told"),
    [
        (8, {"flow/lag_mean": 7.6}, True),
        (8, {"flow/lag_mean": 6.0}, False),
        (1, {"flow/lag_mean": 1.0}, False),  # every healthy run of this bound
        (1, {"flow/lag_mean": 1.0, "flow/dropped": 32.0}, True),
        (None, {"flow/lag_mean": 7.6}, False),
    ],
)
def test_a_lag_at_its_bound_is_told_after_a_while(
    max_lag: int | None, row: dict[str, float], told: bool, clock: list[float]
) -> None:
    alerts, sent = made(max_lag=max_lag)
    for step in range(NUM_LAGGING - 1):
        alerts.look(step, row, None)
    alerts.look(NUM_LAGGING, {"flow/lag_mean": 0.0}, None)  # it recovers: counted anew
    for step in range(NUM_LAGGING):
        assert sent == []
        alerts.look(100 + step, row, None)
    assert [step for step, *_ in sent] == ([99 + NUM_LAGGING] if told else [])
    assert all("workers.num_workers" in text for _, _, text, _ in sent)


def test_a_lost_node_is_told_but_not_one_that_was_drained(clock: list[float]) -> None:
    there = [Node("a" * 40, False, {}), Node("b" * 40, False, {}), Node("c" * 40, True, {})]
    answers = [there, there[:2], [], there[1:2]]
    alerts, sent = made(nodes=lambda: answers[0])
    for step, expected in enumerate((0, 0, 0, 1)):
        alerts.look(step, {}, None)
        alerts.look(step, {}, None)
        assert len(sent) == expected
        clock[0] += module.NODES_EVERY_S
        answers.pop(0) if len(answers) > 1 else None
    ((_, title, text, level),) = sent
    assert (title, level) == ("A node of the cluster is lost", "WARN")
    assert "Lost: aaaaaaaa; 1 nodes are left" in text
