"""What ends a run ends it with a diagnosis and a valid checkpoint; what need not, does not."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from graph_runs import assert_bitwise_equal, run

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.core.errors import NonFinite, RunFailed, UserError


def test_a_non_finite_loss_ends_the_run_with_a_diagnosis_and_the_last_good_cut(
    tmp_path: Path,
) -> None:
    run(tmp_path / "x", "run.steps=8")
    with pytest.raises(NonFinite, match=r"learner\.lr|sampler\.step_size") as raised:
        run(tmp_path / "x", "run.steps=20", "learner.lr=1e37")
    assert "\n" not in str(raised.value)
    found = checkpoint.latest(tmp_path / "x")
    assert found is not None
    assert all(bool(np.isfinite(a).all()) for a in found.arrays("learner").values())
    assert run(tmp_path / "x", "run.steps=12").finished


def test_a_full_disk_at_checkpoint_time_costs_one_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save

    def full_at_8(run_dir, step, *args, **kwargs):
        if step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(run_dir, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", full_at_8)
    assert run(tmp_path / "full").finished
    steps = sorted(p.name for p in (tmp_path / "full" / "checkpoints").iterdir())
    assert steps == ["step_00000000", "step_00000004", "step_00000012"]
    said = (tmp_path / "full" / "run.log").read_text()
    assert "checkpoint at update 8 not written (No space left on device)" in said
    monkeypatch.undo()
    run(tmp_path / "whole")
    assert_bitwise_equal(tmp_path / "full", tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_result_is_the_same(
    tmp_path: Path,
) -> None:
    run(tmp_path / "x", "run.steps=8")
    (tmp_path / "x" / "checkpoints" / "step_00000008" / "learner.safetensors").write_bytes(b"torn")
    run(tmp_path / "x", "run.steps=12", resume="must")
    assert "passed over a damaged checkpoint: step_00000008" in (
        (tmp_path / "x.txt").read_text() + (tmp_path / "x" / "run.log").read_text()
    )
    run(tmp_path / "whole", "run.steps=12")
    assert_bitwise_equal(tmp_path / "x", tmp_path / "whole")


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_run_resumes_with_another_number_of_shards_and_every_chain(
    num_shards: int, tmp_path: Path
) -> None:
    run(tmp_path / "x", "run.steps=8", "buffer.reinit_prob=0.0")
    before = _chains(tmp_path / "x")
    run(tmp_path / "x", "run.steps=9", "buffer.reinit_prob=0.0", f"buffer.num_shards={num_shards}")
    after = _chains(tmp_path / "x")
    assert after.keys() == before.keys()
    moved = [name for name in before if before[name] != after[name]]
    # One update more moves its batch of 32 chains and no other.
    assert len(moved) == 32


def _chains(run_dir: Path) -> dict[int, bytes]:
    found = checkpoint.latest(run_dir)
    assert found is not None
    out: dict[int, bytes] = {}
    for name in found.names:
        if name.startswith("shard_"):
            arrays = found.arrays(name)
            for identity, x in zip(arrays["chain_id"].tolist(), arrays["position"]):
                assert identity not in out
                out[identity] = x.tobytes()
    assert len(out) == 96
    return out


def test_versions_and_epochs_grow_over_restarts(tmp_path: Path) -> None:
    seen = []
    for steps in (4, 8, 12):
        run(tmp_path / "x", f"run.steps={steps}")
        meta = checkpoint.latest(tmp_path / "x").meta  # type: ignore[union-attr]
        seen.append((meta["epoch"], meta["version"], meta["step"]))
    assert seen == [(0, 4, 4), (1, 8, 8), (2, 12, 12)]


def test_a_checkpoint_of_more_chains_than_there_is_room_for_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "x", "run.steps=4")
    with pytest.raises((RunFailed, UserError), match=r"buffer\.capacity"):
        run(tmp_path / "x", "run.steps=8", "buffer.capacity=64")
