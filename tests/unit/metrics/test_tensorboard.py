"""TensorBoard as a sink beside or instead of W&B."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from summary_writer import SummaryWriter

from ebm_dist.core.errors import UserError
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.run.preflight import check_tracking

TENSORBOARD = TrackingConfig(sinks=("tensorboard",))


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[SummaryWriter]:
    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr(SummaryWriter, "made", [])
    return SummaryWriter.made


def test_tensorboard_gets_every_metric_image_histogram_and_alert(
    writers: list[SummaryWriter], tmp_path: Path, picture: str
) -> None:
    with MetricHub(TENSORBOARD, tmp_path, {}, "t") as hub:
        for step in (0, 10):
            hub.log(step, 0, {"energy/gap": step / 8, "loss/total": float("nan")})
        hub.images("samples/chains", 10, picture)
        hub.histogram("histogram/age", 10, np.array([0.0, 1.0, 1.0, 3.0]))
        hub.alert(10, "Chains are stuck", "raise sampler.step_size", "WARN")
        hub.artifact(10, "model", str(tmp_path), ["latest"], {})
    assert hub.notices() == []
    info = hub.info()
    assert (info["mode"], info["id"]) == ("off", None)
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in info["notice"]
    (writer,) = writers
    assert writer.given == {"log_dir": str(tmp_path / "tensorboard"), "purge_step": None}
    assert writer.scalars["energy/gap"] == [(0, 0.0), (10, 1.25)]
    assert [step for step, value in writer.scalars["loss/total"] if math.isnan(value)] == [0, 10]
    assert writer.images["samples/chains"].shape == (8, 8, 3)
    age = writer.histograms["histogram/age"]
    assert (age["min"], age["max"], age["num"], age["global_step"]) == (0.0, 3.0, 4.0, 10)
    assert age["sum"] == pytest.approx(5.0, abs=0.2)
    assert writer.texts == {"alerts/Chains are stuck": "raise sampler.step_size"}
    assert writer.is_closed


def test_a_resume_and_a_return_to_a_checkpoint_hide_the_points_that_are_repeated(
    writers: list[SummaryWriter], tmp_path: Path
) -> None:
    with MetricHub(TENSORBOARD, tmp_path, {}, "t", resume_step=50) as hub:
        hub.log(51, 1, {"energy/gap": 0.0})
        hub.log(40, 2, {"energy/gap": 1.0})
    assert [writer.given["purge_step"] for writer in writers] == [51, 40]
    assert [writer.scalars["energy/gap"] for writer in writers] == [[(51, 0.0)], [(40, 1.0)]]


def test_a_failing_writer_is_told_once_and_the_other_files_are_whole(
    writers: list[SummaryWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SummaryWriter, *_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", refuse)
    with MetricHub(TENSORBOARD, tmp_path, {}, "t") as hub:
        for step in range(3):
            hub.log(step, 0, {"energy/gap": 0.0})
    (said,) = hub.notices()
    assert "TensorBoard failed (No space left on device); the run goes on" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_without_its_package_tensorboard_is_the_users_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    missing = lambda name, *a: None if name == "tensorboard" else real(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(UserError, match=r"^tracking\.sinks: tensorboard needs .*pip install \S+"):
        check_tracking(TrackingConfig(sinks=("wandb", "tensorboard")))
    check_tracking(TrackingConfig())


def test_without_wandb_among_the_sinks_it_is_not_imported(tmp_path: Path) -> None:
    program = (
        "import sys, types\n"
        "sys.path.append(sys.argv[2])\n"
        "import summary_writer\n"
        "sys.modules['torch.utils.tensorboard'] = summary_writer\n"
        "from ebm_dist.metrics.hub import MetricHub\n"
        "from ebm_dist.metrics.config import TrackingConfig\n"
        "hub = MetricHub(TrackingConfig(sinks=('tensorboard',)), sys.argv[1], {}, 't')\n"
        "hub.log(1, 0, {'energy/gap': 1.0}); hub.artifact(1, 'model', '.', [], {}); hub.close()\n"
        "assert summary_writer.SummaryWriter.made[0].scalars == {'energy/gap': [(1, 1.0)]}\n"
        "assert not hub.notices(), hub.notices()\n"
        "assert 'wandb' not in sys.modules\n"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", program, str(tmp_path), here], check=True)
