"""A run that is told to end does so while it waits as well, with what can be kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import run
from worlds import World

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.cluster.halt import GRACE_S, Halt, Halted
from ebm_dist.cluster.inline import InlineBackend
from ebm_dist.cluster.own_ray import OwnRay, RayDied
from ebm_dist.cluster.stall import answer
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.core.errors import RunFailed

DIED = "Ray on this machine died: its control store was ended by SIGKILL"


def test_a_wait_has_its_time_from_when_the_run_was_told_or_the_wait_began() -> None:
    now, told = [0.0], [False]
    halt = Halt(lambda: told[0], clock=lambda: now[0])
    now[0] = 1000.0
    halt.check()
    told[0] = True
    halt.check()
    now[0] += GRACE_S - 1.0
    halt.check()
    began = now[0]
    now[0] += 1.0
    halt.check(began)
    with pytest.raises(Halted):
        halt.check()
    with pytest.raises(Halted):
        halt.check(began, grace_s=1.0)


def test_who_waits_for_negatives_or_for_an_answer_sees_that_the_run_is_to_end() -> None:
    world = World(mode="async", max_delay=10**9)
    world.backend.halt = Halt(lambda: True)
    world.flow._on_wait = lambda: world.backend.halt.check(grace_s=0.0)
    with pytest.raises(Halted):
        world.update()
    world.backend.hung.add("shard-0")
    world.backend.halt._since = -GRACE_S
    world.backend.halt.check = lambda began: Halt.check(  # type: ignore[method-assign]
        world.backend.halt, began, grace_s=0.0
    )
    ref = world.shards[0].status()
    with pytest.raises(Halted):
        answer(world.backend, world.shards[0].handle, ref, 60.0, "a test")  # type: ignore[arg-type]


def stops_within(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, step: int) -> None:
    """The run is told to stop in the wait for update `step`, which does not end."""
    real, calls = getattr(owner, name), []

    def call(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) > step:
            raise Halted(None)
        return real(self, *args, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("mode", "owner", "name", "kept"),
    [
        pytest.param("async", RoundScheduler, "poll", None, id="negatives"),
        pytest.param("sync", LearnerGroup, "update", 2, id="update"),
    ],
)
def test_a_run_that_is_stopped_within_a_wait_goes_on_to_the_same_weights(
    mode: str,
    owner: type,
    name: str,
    kept: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = (f"flow.mode={mode}", "run.steps=6", "checkpoint.every=2")
    with monkeypatch.context() as patch:
        stops_within(patch, owner, name, 3)
        result, screen = run(tmp_path / "parts", *options)
    assert not result.finished
    assert "stopped" in screen
    found = checkpoint.latest(tmp_path / "parts")
    assert found is not None
    assert found.step == (result.step if kept is None else kept)
    assert run(tmp_path / "parts", *options, resume="must")[0].finished
    if mode == "sync":
        run(tmp_path / "whole", *options)
        whole, parts = (
            load_file(tmp_path / r / "export" / "model.safetensors") for r in ("whole", "parts")
        )
        assert all((whole[key] == parts[key]).all() for key in whole)


def test_a_run_whose_ray_is_dying_ends_as_failed_with_a_checkpoint_of_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = LearnerGroup.update, []

    def counted(self: LearnerGroup, *args: Any, **options: Any) -> Any:
        calls.append("update")
        return update(self, *args, **options)

    def create(self: InlineBackend, told: Any) -> None:
        self._parts = []
        self.halt = Halt(told, lambda: DIED if len(calls) == 3 else None)

    monkeypatch.setattr(LearnerGroup, "update", counted)
    monkeypatch.setattr(InlineBackend, "__init__", create)
    with pytest.raises(RunFailed, match=DIED):
        run(tmp_path / "r", "run.steps=8", "checkpoint.every=100")
    found = checkpoint.latest(tmp_path / "r")
    assert found is not None
    assert found.step == 3


def test_a_run_that_is_stopped_while_it_starts_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "r", "run.steps=2")
    stops_within(monkeypatch, LearnerGroup, "meet", 0)
    result, screen = run(tmp_path / "r", "run.steps=4")
    assert not result.finished
    assert result.step == 2
    assert "the same command goes on from step_00000002" in screen


def test_the_processes_of_a_ray_of_our_own_are_looked_at_without_asking_it() -> None:
    code = "import time; time.sleep(600)"
    processes = {
        name: subprocess.Popen([sys.executable, "-c", code]) for name in ("raylet", "gcs_server")
    }
    try:
        infos = {name: [SimpleNamespace(process=process)] for name, process in processes.items()}
        node = SimpleNamespace(all_processes={**infos, "log_monitor": []})
        worker = SimpleNamespace(global_worker=SimpleNamespace(node=node))
        own = OwnRay(SimpleNamespace(_private=SimpleNamespace(worker=worker)))
        own.check()
        assert own.well
        assert own.ailing() is None
        processes["gcs_server"].kill()
        processes["gcs_server"].wait()
        own.check()
        assert own.ailing() == DIED
        assert not own.well
        processes["raylet"].kill()
        processes["raylet"].wait()
        with pytest.raises(RayDied, match=r"Ray on this machine died: its raylet .*SIGKILL"):
            own.check()
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
