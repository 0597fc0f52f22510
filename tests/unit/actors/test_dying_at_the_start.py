"""Parts that die before the first update: while the ranks meet, or a checkpoint is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import run
from torch import Tensor

from ebm_dist.actors.learner_rank import LearnerRank
from ebm_dist.cluster.backend import PartDied
from ebm_dist.cluster.inline import InlineBackend, InlineHandle, InlineResult
from ebm_dist.controller.controller import Controller
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.recovery import Recovery
from ebm_dist.core.errors import RunFailed


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


def fails_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[str]:
    """The first call of `owner.name` finds a part dead; returns what was called."""
    calls: list[str] = []
    real = getattr(owner, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise PartDied("killed by the test")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("step", ["_load_shards", "_load_learners", "_publish_current"])
def test_a_part_that_dies_while_a_run_is_restored_leaves_the_result_as_it_is(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", "run.steps=6", "checkpoint.every=3")
    run(tmp_path / "parts", "run.steps=3", "checkpoint.every=3")
    owner = Controller if step == "_publish_current" else Recovery
    calls = fails_once(monkeypatch, owner, step)
    assert run(tmp_path / "parts", "run.steps=6", "checkpoint.every=3")[0].finished
    assert len(calls) > 1
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all((whole[name] == parts[name]).all() for name in whole)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("owner", "name"), [(LearnerGroup, "meet"), (Controller, "_publish_current")]
)
def test_a_part_that_dies_before_the_first_checkpoint_costs_nothing_but_its_start(
    owner: type, name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", "run.steps=3", f"flow.mode={mode}")
    calls = fails_once(monkeypatch, owner, name)
    assert run(tmp_path / "hit", "run.steps=3", f"flow.mode={mode}")[0].finished
    assert len(calls) > 1
    whole, hit = weights(tmp_path / "whole"), weights(tmp_path / "hit")
    assert all((whole[key] == hit[key]).all() for key in whole)


def test_a_first_group_that_waits_in_vain_for_a_dead_rank_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", "run.steps=3")
    real, calls = LearnerRank.start, []

    def start(self: LearnerRank, rendezvous: tuple[str, int]) -> None:
        calls.append(rendezvous)
        if len(calls) == 1:
            raise RunFailed("learner rank 1 of 2 could not join: it timed out")
        real(self, rendezvous)

    monkeypatch.setattr(LearnerRank, "start", start)
    monkeypatch.setattr(InlineBackend, "alive", lambda self, handle, timeout=0.5: len(calls) != 1)
    assert run(tmp_path / "hit", "run.steps=3")[0].finished
    assert len(calls) == 2
    whole, hit = weights(tmp_path / "whole"), weights(tmp_path / "hit")
    assert all((whole[key] == hit[key]).all() for key in whole)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_rank_that_dies_before_its_state_is_in_the_first_checkpoint_is_replaced(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", "run.steps=3", f"flow.mode={mode}")
    real, kill, asked = LearnerGroup.state, InlineBackend.kill, []

    def state(self: LearnerGroup) -> list[Any]:
        asked.append(len(asked))
        refs = real(self)
        return [InlineResult(error=PartDied("killed by the test"))] if len(asked) == 1 else refs

    def end(self: InlineBackend, handle: InlineHandle) -> None:
        kill(self, handle)
        if hasattr(handle.part, "close"):
            handle.part.close()  # as its process would: one engine a process

    monkeypatch.setattr(LearnerGroup, "state", state)
    monkeypatch.setattr(InlineBackend, "kill", end)
    result, _ = run(tmp_path / "hit", "run.steps=3", f"flow.mode={mode}")
    assert result.finished
    assert len(asked) > 1
    whole, hit = weights(tmp_path / "whole"), weights(tmp_path / "hit")
    if mode == "sync":
        assert all((whole[key] == hit[key]).all() for key in whole)


@pytest.mark.parametrize("part", ["hub", "shard-1", "worker-0", "learner-0", "evaluator"])
def test_a_part_that_dies_in_its_own_start_is_named_and_replaced(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[InlineHandle] = []

    def started(self: InlineBackend, handles: list[InlineHandle]) -> Any:
        alive = [handle for handle in handles if handle.name == part]
        if len(deaths) == 3:
            assert alive
            assert not any(handle is dead for handle in alive for dead in deaths)
            return None
        deaths.append(alive[0])
        return alive[0], PartDied("killed by the test")

    monkeypatch.setattr(InlineBackend, "await_started", started)
    options = ("run.steps=3", "evaluation.every=2")
    result, screen = run(tmp_path / "hit", *options)
    assert result.finished
    assert screen.count(f"{part} died while the run started") == 3
    monkeypatch.undo()
    run(tmp_path / "whole", *options)
    whole, hit = weights(tmp_path / "whole"), weights(tmp_path / "hit")
    assert all((whole[key] == hit[key]).all() for key in whole)


def test_a_part_that_dies_in_every_start_ends_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(self: InlineBackend, handles: list[InlineHandle]) -> Any:
        dead = next(handle for handle in handles if handle.name == "worker-0")
        return dead, PartDied("killed by the test")

    monkeypatch.setattr(InlineBackend, "await_started", started)
    with pytest.raises(RunFailed, match=r"worker-0 was started 20 times .*killed by the test"):
        run(tmp_path / "r", "run.steps=3")
