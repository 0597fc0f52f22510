"""The hub writes everything once, in order, and never stands in the way of training."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ebm_dist.core.errors import UserError
from ebm_dist.metrics import hub as hub_module
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.metrics.jsonl import SUPERSEDED_FILE, read_rows

OFF = TrackingConfig(wandb="off")


def opened(run_dir: Path, **kwargs: Any) -> MetricHub:
    return MetricHub(OFF, run_dir, {"run": {"name": "t"}}, "t", **kwargs)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_rows(run_dir / "metrics.jsonl"))


def test_rows_hold_step_epoch_and_plain_numbers(tmp_path: Path) -> None:
    with opened(tmp_path) as hub:
        hub.log(
            3, 1, {"energy/gap": torch.tensor(0.5), "loss/total": np.float32(2), "wait/x": "no"}
        )
        hub.log(4, 1, {"loss/total": float("nan")})
    assert rows_of(tmp_path) == [
        {"step": 3, "epoch": 1, "energy/gap": 0.5, "loss/total": 2.0},
        {"step": 4, "epoch": 1, "loss/total": None},
    ]
    assert any("wait/x" in line for line in hub.notices())


def test_off_never_imports_wandb(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from ebm_dist.metrics.hub import MetricHub\n"
        "from ebm_dist.metrics.config import TrackingConfig\n"
        "hub = MetricHub(TrackingConfig(wandb='off'), sys.argv[1], {}, 't')\n"
        "hub.log(1, 0, {'energy/gap': 1.0}); hub.close()\n"
        "info = hub.info()\n"
        "assert (info['id'], info['mode'], info['url']) == (None, 'off', None), info\n"
        "assert 'wandb' not in sys.modules\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert not (tmp_path / "wandb").exists()


def test_a_resumed_run_leaves_one_history(tmp_path: Path) -> None:
    with opened(tmp_path) as hub:
        for step in range(0, 100, 10):
            hub.log(step, 0, {"energy/gap": float(step)})
    with opened(tmp_path, resume_step=50) as hub:
        for step in range(60, 90, 10):
            hub.log(step, 1, {"energy/gap": -1.0})
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(0, 90, 10))
    assert [row["epoch"] for row in rows] == [0] * 6 + [1] * 3
    gone = [row["step"] for row in read_rows(tmp_path / SUPERSEDED_FILE)]
    assert gone == [60, 70, 80, 90]


def test_a_newer_epoch_supersedes_rows_beyond_it_without_being_told(tmp_path: Path) -> None:
    with opened(tmp_path) as hub:
        for step in range(0, 50, 10):
            hub.log(step, 0, {"energy/gap": 0.0})
        hub.log(20, 1, {"fault/restarts": 1})
        hub.log(30, 1, {"energy/gap": 1.0})
    assert [(row["step"], row["epoch"]) for row in rows_of(tmp_path)] == [
        (0, 0),
        (10, 0),
        (20, 0),
        (20, 1),
        (30, 1),
    ]


def test_training_does_not_wait_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MAX_WAITING", 20)
    hub = opened(tmp_path)
    stuck, real = threading.Event(), hub._jsonl.append

    def append(rows: Any) -> None:
        stuck.wait(20)
        real(rows)

    monkeypatch.setattr(hub._jsonl, "append", append)
    start = time.monotonic()
    for step in range(200):
        hub.log(step, 0, {"energy/gap": 0.0})
    took = time.monotonic() - start
    stuck.set()
    hub.flush()
    hub.log(500, 0, {"energy/gap": 0.0})
    hub.close()
    assert took < 1.0
    rows = rows_of(tmp_path)
    # 20 wait, one more is in the writer's hands; what was dropped is counted in the rows.
    assert 20 <= len(rows) - 1 <= 21
    assert rows[-1]["hub/dropped"] == 200 - (len(rows) - 1)
    assert sum("dropped" in line for line in hub.notices()) == 1


def test_a_failing_disk_is_said_once_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as hub:

        def append(rows: Any) -> None:
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(hub._jsonl, "append", append)
            for step in range(5):
                hub.log(step, 0, {"energy/gap": 0.0})
            hub.flush()
        hub.log(9, 0, {"energy/gap": 0.0})
    assert [row["step"] for row in rows_of(tmp_path)] == [9]
    assert len(hub.notices()) == 1
    assert "No space left" in hub.notices()[0]


def test_bad_arguments_raise_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as hub:
        hub.log("x", 0, {"a": 1})  # type: ignore[arg-type]
        hub.log(1, 0, None)  # type: ignore[arg-type]
        hub.images("samples", 1, str(tmp_path / "not_there.png"))
        hub.histogram("histogram/age", 1, np.array(["a"]))
        hub.log(2, 0, {"energy/gap": 1.0})
    hub.log(3, 0, {"energy/gap": 1.0})  # closed: ignored
    hub.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [2]


def test_histograms_are_kept_in_a_file(tmp_path: Path) -> None:
    with opened(tmp_path) as hub:
        hub.histogram("histogram/age", 7, np.r_[np.arange(640), np.nan])
    (row,) = read_rows(tmp_path / "histograms.jsonl")
    assert sum(row["counts"]) == 640
    assert row["counts"] == [10] * 64
    assert row["edges"][0] == 0
    assert row["edges"][-1] == 639


def test_a_run_directory_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: cannot write metrics below .*file/run"):
        opened(tmp_path / "file" / "run")
