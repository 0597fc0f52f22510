"""An evaluation that a part's death cuts short is made up for."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import run

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
