"""Alerts of a run: which events are worth one, how rarely, and that they say what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ebm_dist.cluster.backend import Node
from ebm_dist.controller.observers import alerts as module
from ebm_dist.controller.observers.alerts import NUM_LAGGING, Alerts, Level


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


Sent = list[tuple[int, str, str, Level]]


def made(*, max_lag: int | None = 8, nodes: Callable[[], list[Node]] = list) -> tuple[Alerts, Sent]:
    sent: Sent = []
    return Alerts(lambda *alert: sent.append(alert), max_lag=max_lag, nodes=nodes), sent


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
