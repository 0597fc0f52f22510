"""An evaluation that a part's death cuts short is made up for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_runs import curve, run

from ebm_dist.actors.evaluator import Evaluation
from ebm_dist.cluster.backend import PartDied
from ebm_dist.controller.observers.measurements import AuditLink, EvaluatorLink
from ebm_dist.controller.observers.monitor import Monitor
from ebm_dist.controller.retry import GoBack, RollBack


@pytest.mark.parametrize(
    ("fatal", "evaluated"),
    [
        pytest.param(0, [5, 8], id="at the next update"),
        pytest.param(1, [4, 8], id="at the end of the run, where there is no next update"),
    ],
)
def test_an_evaluation_that_a_shard_died_under_is_made(
    fatal: int, evaluated: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains, calls = Monitor.chains, []

    def dying(self: Monitor, *args):
        calls.append(args)
        if len(calls) == fatal + 1:
            raise PartDied("a shard was killed")
        return chains(self, *args)

    monkeypatch.setattr(Monitor, "chains", dying)
    result, _ = run(tmp_path / "r", "run.steps=8", "evaluation.every=4")
    assert result.finished
    assert len(calls) == 3
    pictures = sorted((tmp_path / "r" / "samples").glob("*.png"))
    assert [int(path.stem.removeprefix("step_")) for path in pictures] == evaluated


def test_a_run_that_goes_back_evaluates_at_its_usual_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains, calls = Monitor.chains, []

    def dying(self: Monitor, *args):
        calls.append(args)
        if len(calls) == 1:
            raise RollBack(GoBack("a shard was killed"))
        return chains(self, *args)

    monkeypatch.setattr(Monitor, "chains", dying)
    options = ["run.steps=8", "evaluation.every=4", "checkpoint.every=2"]
    result, screen = run(tmp_path / "r", *options)
    assert result.finished
    assert "going back" in screen
    pictures = sorted((tmp_path / "r" / "samples").glob("*.png"))
    assert [int(path.stem.removeprefix("step_")) for path in pictures] == [4, 8]


def test_an_evaluation_that_outlasts_the_next_ones_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, asked = EvaluatorLink.collect, []

    def slow(self: EvaluatorLink, timeout: float) -> tuple[int, Evaluation] | None:
        if self.busy:
            asked.append(timeout)
        return None if len(asked) < 8 else collect(self, timeout)

    monkeypatch.setattr(EvaluatorLink, "collect", slow)
    result, screen = run(tmp_path / "r", "run.steps=20", "evaluation.every=2")
    assert result.finished
    assert asked[:8] == [0.0] * 8, "no update waited for it"
    times = re.search(
        r"\d+ s: \d+ s to start, \d+ s updates, \d+ s evaluations, \d+ s export", screen
    )
    assert times is not None
    assert times.group() in (tmp_path / "r" / "run.log").read_text()
    assert screen.count("is still under way") == 1
    measured = curve(tmp_path / "r", "energy/test")
    assert next(iter(measured)) == 2
    assert list(measured)[-1] == 20
    assert 3 < len(measured) < 10


def test_measurements_that_do_not_end_are_given_up_at_the_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluatorLink, "collect", lambda self, timeout: None)
    options = ("run.steps=4", "evaluation.every=2", "flow.stall_timeout_s=2")
    result, screen = run(tmp_path / "r", *options)
    assert result.finished
    assert "update 2 goes unmeasured" in screen
    assert "update 4 goes unmeasured" in screen
    assert "flow.stall_timeout_s" in screen


def test_an_audit_longer_than_the_stall_timeout_is_given_up_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AuditLink, "collect", lambda self, timeout, version: None)
    audits = "evaluation={audit_every: 2, audit_steps: 40, audit_chains: 4, audit_feedback: true}"
    options = ("run.steps=4", audits, "evaluation.every=null", "flow.stall_timeout_s=1")
    result, screen = run(tmp_path / "r", *options)
    assert result.finished
    assert "update 2 goes without an audit" in screen
    assert "update 4 goes without an audit" in screen
    assert "flow.stall_timeout_s" in screen
