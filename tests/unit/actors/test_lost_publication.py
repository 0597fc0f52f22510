"""Weights that never come because rank 0 died before it had sent them: the run goes back for them,
and nobody who was to have them is blamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from simulation import SimRef
from small_runs import curve, run
from worlds import World

from ebm_dist.cluster.backend import PartDied
from ebm_dist.cluster.inline import InlineBackend, InlineHandle, InlineResult
from ebm_dist.controller.learners import LearnerGroup

STEPS = 8
OPTIONS = (f"run.steps={STEPS}", "checkpoint.every=3", "tracking.log_every=1")


class Killed:
    """Rank 0 dies between the metrics of an update and its weights; its successor does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, update: int) -> None:
        self.asked = 0
        self.gone: InlineHandle | None = None
        real, alive, kill = InlineHandle.aside, InlineBackend.alive, InlineBackend.kill

        def aside(handle: InlineHandle, method: str, *args: Any, num_returns: int = 1) -> Any:
            self.asked += 1
            if self.asked != update:
                return real(handle, method, *args, num_returns=num_returns)
            self.gone = handle
            error = PartDied("killed by the test")
            return [InlineResult(error=error) for _ in range(num_returns)]

        def is_alive(backend: InlineBackend, handle: Any, timeout: float = 0.5) -> bool:
            return handle is not self.gone and alive(backend, handle, timeout)

        def end(backend: InlineBackend, handle: InlineHandle) -> None:
            kill(backend, handle)
            if hasattr(handle.part, "close"):
                handle.part.close()  # as its process would: one engine a process

        monkeypatch.setattr(InlineHandle, "aside", aside)
        monkeypatch.setattr(InlineBackend, "alive", is_alive)
        monkeypatch.setattr(InlineBackend, "kill", end)


def weights(run_dir: Path) -> dict[str, Any]:
    return load_file(run_dir / "export" / "model.safetensors")


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("update", [1, 3, 5, STEPS])
def test_the_run_goes_back_for_weights_that_never_came_the_last_ones_too(
    update: int, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*OPTIONS, f"flow.mode={mode}", "evaluation.every=5", "evaluation.fidelity=false")
    options = (*options, "evaluation.audit_every=5", "evaluation.audit_steps=8")
    run(tmp_path / "whole", *options)
    killed = Killed(monkeypatch, update)
    result, screen = run(tmp_path / "hit", *options)
    assert result.finished
    assert screen.count("going back") == 1
    assert screen.count("died") == 1, "it alone"
    assert list(curve(tmp_path / "hit", "fault/restarts").values())[-1] == 1
    assert f"going back {update % 3} updates" in screen
    assert killed.asked == STEPS + update % 3, "no update was published on top of lost weights"
    assert {5, STEPS} <= curve(tmp_path / "hit", "energy/test").keys()
    whole, hit = weights(tmp_path / "whole"), weights(tmp_path / "hit")
    assert whole.keys() == hit.keys()
    if mode == "sync":
        assert all((whole[name] == hit[name]).all() for name in whole)


def test_rounds_and_newcomers_outlast_weights_whose_sender_died() -> None:
    world = World(mode="async", max_lag=4, max_delay=2)
    ticks = iter(range(10**9))
    world.scheduler._clock = lambda: 0.1 * next(ticks)
    world.update()
    lost = SimRef(None, 0, set(), error=PartDied("learner-0 was killed"))
    world.progress.version += 1
    world.scheduler.set_weights(lost, world.progress.version)
    world.flow.top_up()
    newcomer = world.scheduler.workers.next_index
    world.scheduler.workers.join(world.spawn_worker(newcomer))
    for _ in range(500):
        world.scheduler.poll(0.0)
        world.flow.top_up()
    assert world.scheduler.outstanding > 0
    for _ in range(20):
        assert max(world.update(busy_ticks=5)[0]) <= 4
    assert world.scheduler.restarts == 0, "no worker was at fault"
    assert world.scheduler.workers.members.num_serving == 4, "the newcomer got the next weights"
    assert not world.said


def test_weights_that_do_not_come_have_the_rank_replaced_after_the_time_of_a_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never: list[InlineResult] = []
    publish, wait = LearnerGroup.publish, InlineBackend.wait

    def late(self: LearnerGroup, *, average: bool) -> Any:
        flat = publish(self, average=average)
        if not never:
            never.append(InlineResult())
            self.publishing = never[:]
        return flat

    def done(self: InlineBackend, refs: Any, timeout: float) -> list[Any]:
        return [ref for ref in wait(self, refs, timeout) if not any(ref is one for one in never)]

    monkeypatch.setattr(LearnerGroup, "publish", late)
    monkeypatch.setattr(InlineBackend, "wait", done)
    monkeypatch.setattr(InlineBackend, "kill", lambda self, handle: handle.part.close())
    result, screen = run(tmp_path / "r", *OPTIONS, "flow.stall_timeout_s=0.3")
    assert result.finished
    assert "the learner ranks gave no answer" in screen
    assert "going back" in screen


@pytest.mark.parametrize("update", [4, STEPS])
def test_an_error_of_the_publication_ends_the_run_as_one_of_the_update_does(
    update: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = InlineHandle.aside, []

    def aside(self: InlineHandle, method: str, *args: Any, num_returns: int = 1) -> Any:
        asked.append(method)
        if len(asked) != update:
            return real(self, method, *args, num_returns=num_returns)
        return [InlineResult(error=MemoryError("the store is full")) for _ in range(num_returns)]

    monkeypatch.setattr(InlineHandle, "aside", aside)
    with pytest.raises(MemoryError, match="the store is full"):
        run(tmp_path / "r", *OPTIONS, "flow.mode=async")
    assert not (tmp_path / "r" / "export").exists()
