"""From numbers that are not finite a run goes back, and tries again with other noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_runs import assert_bitwise_equal, run

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.cut import Progress
from ebm_dist.core.errors import NonFinite
from ebm_dist.core.types import Batch
from ebm_dist.learner.engine import LearnerEngine

ROLLBACK = "learner.on_nonfinite=rollback"
# The first update throws the weights out of the numbers; a roll-back brings the rate to 1e-4.
EXPLODES = (ROLLBACK, "learner.lr=1e30", "learner.rollback_lr_factor=1e-34")


def manifest(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "manifest.json").read_text())


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("rollback") / "recovered"
    assert run(run_dir, *EXPLODES).finished
    return run_dir


def test_a_run_whose_weights_explode_goes_back_and_finishes_with_the_smaller_rate(
    recovered: Path,
) -> None:
    log = (recovered / "run.log").read_text()
    assert log.count("going back") == 1
    assert "learning rate x 1e-34" in log
    assert manifest(recovered)["rollbacks"] == 1
    assert manifest(recovered)["epoch"] == 1
    found = checkpoint.latest(recovered)
    assert found is not None
    assert found.meta["lr_factor"] == pytest.approx(1e-34)
    assert all(bool(np.isfinite(a).all()) for a in found.arrays("learner").values())


def test_the_attempt_after_a_roll_back_is_repeatable_to_the_bit(
    recovered: Path, tmp_path: Path
) -> None:
    run(tmp_path / "again", *EXPLODES)
    assert_bitwise_equal(recovered, tmp_path / "again")


@pytest.mark.ray
def test_the_attempt_after_a_roll_back_is_the_same_on_ray(recovered: Path, tmp_path: Path) -> None:
    run(tmp_path / "ray", *EXPLODES, "runtime.backend=ray", "workers.num_workers=2")
    assert_bitwise_equal(recovered, tmp_path / "ray")


def test_the_attempt_after_a_roll_back_has_other_noise_and_other_data(
    recovered: Path, tmp_path: Path
) -> None:
    run(tmp_path / "straight", "learner.lr=1e-4")
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(recovered, tmp_path / "straight")
    ours, theirs = (checkpoint.latest(path) for path in (recovered, tmp_path / "straight"))
    assert ours is not None
    assert theirs is not None
    assert ours.meta["ranks"][0]["order"] != theirs.meta["ranks"][0]["order"]
    # No chain has the position it would have had: every lease had other noise or other chains.
    moved = ours.arrays("shard_0000"), theirs.arrays("shard_0000")
    both = (moved[0]["age"] > 0) & (moved[1]["age"] > 0)
    assert both.any()
    assert (
        not (moved[0]["position"] == moved[1]["position"]).reshape(len(both), -1).all(1)[both].any()
    )


def test_a_resumed_run_keeps_the_smaller_rate_and_the_noise_of_its_attempt(
    recovered: Path, tmp_path: Path
) -> None:
    run(tmp_path / "halves", *EXPLODES, "run.steps=8")
    run(tmp_path / "halves", *EXPLODES, "run.steps=12", resume="must")
    assert_bitwise_equal(recovered, tmp_path / "halves")


def test_a_roll_back_that_no_checkpoint_has_seen_yet_is_remembered_by_the_manifest() -> None:
    meta = {"version": 5, "epoch": 0, "next_lease": 20, "wall_s": 1.0, "rollbacks": 1}
    newer = {"version": 9, "epoch": 1, "rollbacks": 2, "lr_factor": 0.25}
    progress = Progress()
    progress.resume(4, meta, newer)
    assert (progress.rollbacks, progress.lr_factor) == (2, 0.25)
    assert (progress.version, progress.epoch, progress.step) == (9, 2, 4)
    assert progress.next_lease == progress.lease_of(0) > 20


def test_it_goes_back_as_often_as_it_may_and_then_ends_with_the_diagnosis(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"went back 2 times already \(learner\.max_rollbacks\)"):
        run(tmp_path / "x", ROLLBACK, "learner.lr=1e30", "learner.max_rollbacks=2")
    assert manifest(tmp_path / "x")["rollbacks"] == 2
    assert manifest(tmp_path / "x")["lr_factor"] == 0.25
    assert checkpoint.latest(tmp_path / "x").step == 0  # type: ignore[union-attr]


def test_async_chains_go_back_with_the_weights_that_spoiled_them(tmp_path: Path) -> None:
    assert run(tmp_path / "x", *EXPLODES, "flow.mode=async", "flow.max_lag=2").finished
    found = checkpoint.latest(tmp_path / "x")
    assert found is not None
    for name in ("shard_0000", "shard_0001"):
        assert np.abs(found.arrays(name)["position"]).max() < 10.0


def poison_once(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """The data of update `step` hold a NaN the first time; returns a list of when they did."""
    real, seen = LearnerEngine.update, []

    def update(self: LearnerEngine, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        if self.step == step and not seen:
            seen.append(step)
            batch.x.view(-1)[0] = torch.nan
        return real(self, batch, *args, **kwargs)

    monkeypatch.setattr(LearnerEngine, "update", update)
    return seen


def test_a_nan_between_two_checkpoints_goes_back_to_the_first_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = poison_once(monkeypatch, 6)
    assert run(tmp_path / "x", ROLLBACK).finished
    assert seen == [6]
    assert "going back 2 updates to step_00000004" in (tmp_path / "x" / "run.log").read_text()
    seen.clear()
    run(tmp_path / "again", ROLLBACK)
    assert_bitwise_equal(tmp_path / "x", tmp_path / "again")


def test_optimiser_state_that_is_not_finite_is_not_written_and_not_gone_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = LearnerEngine.state, []

    def state(self: LearnerEngine) -> Any:
        out = real(self)
        # Adam's second moment can overflow under a gradient that is finite.
        if self.step == 8 and not seen:
            seen.append(8)
            next(v for k, v in out.items() if k.startswith("optim/exp_avg_sq"))[...] = torch.inf
        return out

    monkeypatch.setattr(LearnerEngine, "state", state)
    with pytest.raises(NonFinite, match=r"learner/optim/exp_avg_sq\S* holds numbers that are not"):
        run(tmp_path / "stop")
    assert checkpoint.latest(tmp_path / "stop").step == 4  # type: ignore[union-attr]
    seen.clear()
    assert run(tmp_path / "back", ROLLBACK).finished
    assert "updates to step_00000004" in (tmp_path / "back" / "run.log").read_text()


def test_a_gap_past_the_limit_is_refused_before_the_optimiser_step(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"energy/gap is .*past learner\.gap_limit = 1e-09"):
        run(tmp_path / "x", "learner.gap_limit=1e-9")
    run(tmp_path / "one", "run.steps=1")
    first, refused = (
        checkpoint.open_checkpoint(tmp_path / name / "checkpoints" / "step_00000000")
        for name in ("one", "x")
    )
    for key, value in first.arrays("learner").items():
        assert np.array_equal(value, refused.arrays("learner")[key])
    assert checkpoint.latest(tmp_path / "x").step == 0  # type: ignore[union-attr]
    run(tmp_path / "wide", "learner.gap_limit=1e9")
    run(tmp_path / "none")
    assert_bitwise_equal(tmp_path / "wide", tmp_path / "none")
