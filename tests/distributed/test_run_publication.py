"""Weights leave the learner beside its next update, and rank 0 may die before they have left."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_runs import assert_bitwise_equal, rows, run

from ebm_dist.actors.learner_rank import LearnerRank

pytestmark = pytest.mark.ray

RAY = ("runtime.backend=ray", "workers.num_workers=2")
DEADLINE_S = 60.0


def rank_that(monkeypatch: pytest.MonkeyPatch, publishes: Any, begins: Any = None) -> None:
    """Ranks call `publishes` before they send weights and `begins` with an update, with its number.

    The class is local: Ray then sends it to the actors by value.
    """

    class Rank(LearnerRank):
        num_published = 0

        def update(self, step: int, *args: Any) -> dict[str, float]:
            if begins is not None:
                begins(step)
            return super().update(step, *args)

        def published(self, average: bool) -> tuple[bool, np.ndarray, np.ndarray | None]:
            publishes(self.num_published, average)
            self.num_published += 1
            return super().published(average)

    # By value means that it has no module to be found in.
    Rank.__module__ = "__main__"
    monkeypatch.setattr("ebm_dist.run.assembly.LearnerRank", Rank)


def test_an_update_is_made_while_the_weights_of_the_one_before_have_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()

    def publishes(step: int, average: bool) -> None:
        deadline = time.monotonic() + DEADLINE_S
        # Averaged weights are waited for: whoever looks at them is not given what may not come.
        while not average and not (begun / str(step + 1)).exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"update {step + 1} waited for the weights of update {step}")
            time.sleep(0.001)

    def begins(step: int) -> None:
        (begun / str(step)).touch()

    rank_that(monkeypatch, publishes, begins)
    # In sync mode the negatives of an update are drawn under the weights of the one before.
    assert run(tmp_path / "r", *RAY, "flow.mode=async", "flow.max_lag=4").finished
    assert len(list(begun.iterdir())) == 12
    assert max(row["flow/lag_max"] for row in rows(tmp_path / "r") if "flow/lag_max" in row) <= 4


@pytest.mark.parametrize(("mode", "update"), [("sync", 6), ("async", 12)])
def test_a_rank_killed_before_its_weights_have_left_costs_the_updates_since_the_last_cut(
    update: int, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = tmp_path / "died"

    def publishes(number: int, average: bool) -> None:
        if number == update - 1 and not died.exists():
            died.touch()
            time.sleep(0.2)  # rounds are given the weights, and wait for them
            os.kill(os.getpid(), signal.SIGKILL)

    rank_that(monkeypatch, publishes)
    options = (f"flow.mode={mode}", "evaluation.every=6", "evaluation.fidelity=false")
    assert run(tmp_path / "hit", *RAY, *options).finished
    log = (tmp_path / "hit" / "run.log").read_text()
    assert died.exists()
    assert log.count("going back") == 1
    assert re.findall(r"(\S+) died \(", log) == ["learner-0"]
    last = [row for row in rows(tmp_path / "hit") if "fault/restarts" in row][-1]
    assert (last["step"], last["fault/restarts"]) == (12, 1)
    if mode == "sync":
        monkeypatch.undo()
        run(tmp_path / "whole", *options)
        assert_bitwise_equal(tmp_path / "whole", tmp_path / "hit")
