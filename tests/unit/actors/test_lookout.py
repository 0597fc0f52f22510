"""An evaluation that a part's death cuts short is made up for."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import run

from ebm_dist.actors.flow import RollBack
from ebm_dist.actors.handles import PartDied
from ebm_dist.actors.lookout import Lookout


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
    chains, calls = Lookout.chains, []

    def dying(self: Lookout, *args):
        calls.append(args)
        if len(calls) == fatal + 1:
            raise PartDied("a shard was killed")
        return chains(self, *args)

    monkeypatch.setattr(Lookout, "chains", dying)
    result, _ = run(tmp_path / "r", "run.steps=8", "evaluation.every=4")
    assert result.finished
    assert len(calls) == 3
    pictures = sorted((tmp_path / "r" / "samples").glob("*.png"))
    assert [int(path.stem.removeprefix("step_")) for path in pictures] == evaluated


def test_a_run_that_goes_back_evaluates_at_its_usual_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains, calls = Lookout.chains, []

    def dying(self: Lookout, *args):
        calls.append(args)
        if len(calls) == 1:
            raise RollBack("a shard was killed")
        return chains(self, *args)

    monkeypatch.setattr(Lookout, "chains", dying)
    options = ["run.steps=8", "evaluation.every=4", "checkpoint.every=2"]
    result, screen = run(tmp_path / "r", *options)
    assert result.finished
    assert "going back" in screen
    pictures = sorted((tmp_path / "r" / "samples").glob("*.png"))
    assert [int(path.stem.removeprefix("step_")) for path in pictures] == [4, 8]
