"""A run's checkpoints: written beside the loop, shards by what changed, resumed at any size."""

from __future__ import annotations

import errno
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_runs import assert_bitwise_equal, run

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.controller import checkpointer
from ebm_dist.controller.controller import Controller
from ebm_dist.core.errors import RunFailed

BIG = ("buffer.capacity=960", "checkpoint.every=2", "checkpoint.keep=2")


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def bases(run_dir: Path, step: int) -> set[str]:
    opened = checkpoint.open_checkpoint(run_dir / "checkpoints" / checkpoint.name_of(step))
    return {base["checkpoint"] for base in opened.meta["bases"].values()}


def test_shards_write_what_changed_and_a_run_resumed_from_that_is_bitwise_the_same(
    tmp_path: Path,
) -> None:
    run(tmp_path / "x", *BIG, "run.steps=6")
    assert bases(tmp_path / "x", 6) == {"step_00000000"}
    assert steps_of(tmp_path / "x") == [0, 4, 6]
    size = {
        step: (tmp_path / "x" / "checkpoints" / checkpoint.name_of(step) / "shard_0000.safetensors")
        .stat()
        .st_size
        for step in (0, 4)
    }
    # 4 updates of 32 chains, of 960.
    assert size[4] < 0.2 * size[0]
    run(tmp_path / "x", *BIG, "run.steps=12", resume="must")
    # The new process remembers nothing: its first cut is whole.
    assert bases(tmp_path / "x", 8) == set()
    assert bases(tmp_path / "x", 12) == {"step_00000008"}
    run(tmp_path / "whole", *BIG, "run.steps=12")
    assert_bitwise_equal(tmp_path / "x", tmp_path / "whole")


@pytest.mark.parametrize("file", ["shard_0001.safetensors", "learner.safetensors", "meta.json"])
def test_a_torn_difference_costs_a_run_its_newest_checkpoint_and_nothing_else(
    file: str, tmp_path: Path
) -> None:
    run(tmp_path / "x", *BIG, "run.steps=6")
    torn = tmp_path / "x" / "checkpoints" / "step_00000006" / file
    torn.write_bytes(torn.read_bytes()[:-9])
    run(tmp_path / "x", *BIG, "run.steps=8", resume="must")
    assert "resumed from step_00000004" in (tmp_path / "x.txt").read_text()
    run(tmp_path / "whole", *BIG, "run.steps=8")
    assert_bitwise_equal(tmp_path / "x", tmp_path / "whole")


class SlowDisk:
    """Stands in for `checkpoint.save`, and notes what the loop did meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self._seconds = seconds
        self._real = checkpoint.save
        self.steps: list[int] = []
        self.updates_meanwhile: list[int] = []
        self.most_at_once = self._at_once = 0
        self._done = 0
        real_update = Controller._update

        def update(controller: Controller) -> None:
            real_update(controller)
            self._done += 1

        monkeypatch.setattr(checkpoint, "save", self.save)
        monkeypatch.setattr(Controller, "_update", update)

    def save(self, run_dir: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        assert threading.current_thread() is not threading.main_thread()
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        before = self._done
        time.sleep(self._seconds)
        path = self._real(run_dir, step, *args, **kwargs)
        self.steps.append(step)
        self.updates_meanwhile.append(self._done - before)
        self._at_once -= 1
        return path


def test_updates_go_on_while_a_checkpoint_is_written_but_wait_for_the_first_and_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch, 2.0)
    assert run(tmp_path / "x", "run.steps=40", "checkpoint.every=30").finished
    assert disk.steps == [0, 30, 40]
    first, between, last = disk.updates_meanwhile
    assert first == last == 0
    assert between > 0
    assert steps_of(tmp_path / "x") == [0, 30, 40]


def test_one_write_is_under_way_at_a_time_and_a_cut_that_is_due_meanwhile_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointer, "PATIENCE_S", 0.01)
    disk = SlowDisk(monkeypatch, 0.5)
    assert run(tmp_path / "x", "run.steps=40", "checkpoint.every=1").finished
    assert disk.most_at_once == 1
    assert disk.steps[0] == 0
    assert disk.steps[-1] == 40
    assert len(disk.steps) < 30
    assert "is still being written" in (tmp_path / "x" / "run.log").read_text()


def test_a_run_whose_last_checkpoint_cannot_be_written_fails_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = checkpoint.save, []

    def save(run_dir: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step == 12:
            tries.append(step)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(run_dir, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(RunFailed, match=r"update 12 could not be written.*--resume auto"):
        run(tmp_path / "x")
    assert len(tries) == checkpointer.FINAL_TRIES
    monkeypatch.undo()
    assert run(tmp_path / "x", resume="must").step == 12
    run(tmp_path / "whole")
    assert_bitwise_equal(tmp_path / "x", tmp_path / "whole")


RESUMED = [("1", "2", "2"), ("4", "5", "1")]


@pytest.mark.ray
@pytest.mark.slow
def test_two_ranks_three_shards_and_four_workers_resume_as_other_numbers_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = ("runtime.backend=ray", "learner.zero_stage=2", "checkpoint.every=8", "learner.lr=1e-3")

    def sized(ranks: str, shards: str, workers: str) -> tuple[str, ...]:
        sizes = (f"learner.num_ranks={ranks}", f"buffer.num_shards={shards}")
        return (*ray, *sizes, f"workers.num_workers={workers}")

    run(tmp_path / "saved", *sized("2", "3", "4"), "run.steps=8")
    saved = checkpoint.latest(tmp_path / "saved")
    assert saved is not None

    def cut_at_once(controller: Controller) -> bool:
        controller._cuts.resumed_from(-1)
        controller._cuts.finish(controller.progress)
        return False

    for ranks, shards, workers in RESUMED:
        name = f"{ranks}-{shards}-{workers}"
        shutil.copytree(tmp_path / "saved", tmp_path / name)
        with monkeypatch.context() as patch:
            # What the resumed graph holds before any update, as it would save it itself.
            patch.setattr(Controller, "run", cut_at_once)
            run(tmp_path / name, *sized(ranks, shards, workers), resume="must")
        again = checkpoint.latest(tmp_path / name)
        assert again is not None
        assert again.step == 8
        assert len(again.meta["shards"]) == int(shards)
        assert len(again.meta["ranks"]) == int(ranks)
        assert _by_identity(again) == _by_identity(saved)
        for file in ("learner", "ema"):
            before, after = saved.arrays(file), again.arrays(file)
            assert before.keys() == after.keys()
            for key in before:
                assert np.array_equal(before[key], after[key]), key
        result = run(tmp_path / name, *sized(ranks, shards, workers), "run.steps=12", resume="must")
        assert (result.finished, result.step) == (True, 12)
        later = checkpoint.latest(tmp_path / name)
        assert later is not None
        assert _by_identity(later).keys() == _by_identity(saved).keys()
        assert any(not np.array_equal(later.arrays("ema")[k], v) for k, v in after.items())


def _by_identity(found: checkpoint.CheckpointDir) -> dict[int, bytes]:
    """Everything else about each chain."""
    out: dict[int, bytes] = {}
    for name in found.names:
        if re.match(r"shard_\d", name):
            arrays = found.arrays(name)
            keys = sorted(arrays.keys() - {"chain_id"})
            for i, identity in enumerate(arrays["chain_id"].tolist()):
                assert identity not in out
                out[identity] = b"".join(arrays[key][i].tobytes() for key in keys)
    assert len(out) == 96
    return out


def test_no_more_than_ten_checkpoints_refer_to_one_file(tmp_path: Path) -> None:
    few = ("buffer.capacity=9600", "checkpoint.every=1", "checkpoint.keep=30")
    run(tmp_path / "x", *few, "run.steps=14")
    refers = [bases(tmp_path / "x", step) for step in range(15)]
    assert [step for step, found in enumerate(refers) if not found] == [0, 11]
    assert refers[10] == {"step_00000000"}
    assert refers[14] == {"step_00000011"}
