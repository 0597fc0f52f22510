"""Updates that fail and starts that fail are counted apart, each with an end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import run

from ebm_dist.cluster.backend import UNREACHABLE_S, PartDied, Unreachable
from ebm_dist.cluster.inline import InlineHandle, InlineResult
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.retry import MAX_ATTEMPTS, MAX_STARTS, Attempts, GoBack, RollBack
from ebm_dist.core.errors import RunFailed

DIED = PartDied("killed by the test")


def test_starts_that_are_hit_do_not_count_against_an_update_that_was_not_tried() -> None:
    attempts = Attempts()
    for _ in range(MAX_ATTEMPTS):  # each update fails, and each way back to it takes many starts
        attempts.failed(DIED)
        attempts.begin_start()
        for _ in range(MAX_STARTS - 1):
            attempts.failed(DIED)
        attempts.started()
    with pytest.raises(RunFailed, match=r"update 0 was not reached in 5 .*checkpoint\.every"):
        attempts.failed(DIED)


def test_a_new_update_is_progress_and_one_that_is_made_again_is_not() -> None:
    attempts = Attempts()
    for step in range(1, 20):
        attempts.reached(step)
        for _ in range(MAX_ATTEMPTS):
            attempts.failed(DIED)
        attempts.reached(step - 1)
        attempts.reached(step)
    with pytest.raises(RunFailed, match="update 19 was not reached"):
        attempts.failed(DIED)


def test_starts_in_vain_end_the_run_with_what_to_change() -> None:
    attempts = Attempts()
    attempts.begin_start()
    for _ in range(MAX_STARTS - 1):
        attempts.failed(DIED)
    with pytest.raises(RunFailed) as caught:
        attempts.failed(DIED)
    line = str(caught.value)
    assert f"started {MAX_STARTS} times in a row" in line
    assert "learner.num_ranks" in line
    assert "killed by the test" in line


def test_what_cannot_be_reached_counts_once_ray_must_know_whether_it_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ebm_dist.controller.retry.RETRY_S", 0.0)
    now = [0.0]
    attempts = Attempts(clock=lambda: now[0])
    away = Unreachable("the actor is temporarily unavailable")
    for step in range(1, 4):
        attempts.reached(step)
        for second in range(round(UNREACHABLE_S) + 1):
            now[0] = 1000.0 * step + second
            attempts.failed(away)
    now[0] += 1.0
    for _ in range(MAX_ATTEMPTS):
        attempts.failed(away)
    with pytest.raises(RunFailed, match=r"update 3 was not reached in 5 attempts; .*unavailable"):
        attempts.failed(away)


def test_of_rays_errors_unreachable_is_the_one_that_says_nothing_of_a_death() -> None:
    from ray import exceptions

    from ebm_dist.cluster.ray_backend import RayBackend

    backend: Any = SimpleNamespace(_errors=exceptions)
    away = exceptions.ActorUnavailableError("connection refused", b"\x01" * 16)
    assert type(RayBackend._gone(backend, away)) is Unreachable
    assert type(RayBackend._gone(backend, exceptions.ActorDiedError())) is PartDied


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_cut_that_is_due_while_a_shard_cannot_be_reached_is_taken_once_it_can(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node's Ray was killed: a run at 9 updates/s comes to a cut before Ray gives it up."""
    call, away = InlineHandle.call, iter(range(4 * MAX_ATTEMPTS))

    def unavailable(self: InlineHandle, method: str, *args: Any, num_returns: int = 1) -> Any:
        if (
            (method, self.name) == ("cut", "shard-1")
            and args[0] > 1
            and next(away, None) is not None
        ):
            return [InlineResult(error=Unreachable("unavailable")) for _ in range(num_returns)]
        return call(self, method, *args, num_returns=num_returns)

    monkeypatch.setattr("ebm_dist.controller.retry.RETRY_S", 0.0)
    monkeypatch.setattr(InlineHandle, "call", unavailable)
    options = (f"flow.mode={mode}", "run.steps=6", "checkpoint.every=2")
    result, screen = run(tmp_path / "run", *options, "buffer.num_shards=2")
    assert result.finished
    assert next(away, None) is None
    assert "going back" not in screen
    assert "checkpoint step_00000002" in screen


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_whose_starts_are_hit_more_often_than_an_update_may_fail_goes_on(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank dies at update 3, and then in each of ten starts that follow."""
    hits: list[str] = []
    update, load = LearnerGroup.update, LearnerGroup.load

    def dies(self: LearnerGroup, step: int, *args: Any, **options: Any) -> Any:
        if step == 3 and not hits:
            hits.append("update")
            raise RollBack(GoBack("killed by the test"))
        return update(self, step, *args, **options)

    def dies_too(self: LearnerGroup, *args: Any, **options: Any) -> None:
        if len(hits) <= 2 * MAX_ATTEMPTS:
            hits.append("start")
            raise DIED
        load(self, *args, **options)

    monkeypatch.setattr("ebm_dist.controller.recovery.RETRY_S", 0.0)
    monkeypatch.setattr(LearnerGroup, "update", dies)
    monkeypatch.setattr(LearnerGroup, "load", dies_too)
    options = (f"flow.mode={mode}", "run.steps=6", "checkpoint.every=2")
    result, screen = run(tmp_path / "run", *options)
    assert result.finished
    assert hits.count("start") == 2 * MAX_ATTEMPTS
    assert "the learners go on after" in screen
