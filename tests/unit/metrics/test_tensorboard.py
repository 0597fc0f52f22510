"""TensorBoard as a sink beside or instead of W&B, read back by TensorBoard's own package."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ebm_dist.core.errors import UserError
from ebm_dist.metrics.config import TrackingConfig
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.run.preflight import check_tracking

pytest.importorskip("tensorboard")

TENSORBOARD = TrackingConfig(sinks=("tensorboard",))


def shown(run_dir: Path):
    """What TensorBoard shows of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in shown(run_dir).Scalars(name)]


def test_tensorboard_shows_every_metric_image_histogram_and_alert(
    tmp_path: Path, picture: str
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

    read = shown(tmp_path)
    assert scalars(tmp_path, "energy/gap") == [(0, 0.0), (10, 1.25)]
    assert [step for step, v in scalars(tmp_path, "loss/total") if math.isnan(v)] == [0, 10]
    (image,) = read.Images("samples/chains")
    with Image.open(io.BytesIO(image.encoded_image_string)) as got, Image.open(picture) as sent:
        assert (image.step, got.size, got.tobytes()) == (10, sent.size, sent.tobytes())
    (age,) = read.Histograms("histogram/age")
    found = age.histogram_value
    assert (age.step, found.min, found.max, found.num) == (10, 0.0, 3.0, 4.0)
    assert found.sum == pytest.approx(5.0, abs=0.2)
    assert (sum(found.bucket), found.bucket_limit[-1]) == (4.0, 3.0)
    # Those below 1.5, by TensorBoard's own buckets.
    assert sum(n for n, end in zip(found.bucket, found.bucket_limit) if end < 1.5) == 3.0
    (text,) = read.Tensors("alerts/Chains are stuck/text_summary")
    assert text.tensor_proto.string_val == [b"raise sampler.step_size"]


def test_a_resume_and_a_return_to_a_checkpoint_hide_the_points_that_are_repeated(
    tmp_path: Path,
) -> None:
    with MetricHub(TENSORBOARD, tmp_path, {}, "t") as hub:
        for step in (30, 40, 50, 60):
            hub.log(step, 0, {"energy/gap": 0.0})
    with MetricHub(TENSORBOARD, tmp_path, {}, "t", resume_step=50) as hub:
        hub.log(51, 1, {"energy/gap": 1.0})
    assert scalars(tmp_path, "energy/gap") == [(30, 0.0), (40, 0.0), (50, 0.0), (51, 1.0)]
    with MetricHub(TENSORBOARD, tmp_path, {}, "t", resume_step=51) as hub:
        hub.log(52, 2, {"energy/gap": 2.0})
        hub.log(40, 3, {"energy/gap": 3.0})
    assert scalars(tmp_path, "energy/gap") == [(30, 0.0), (40, 3.0)]


def test_a_failing_writer_is_told_once_and_the_other_files_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

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
        "import sys\n"
        "from ebm_dist.metrics.hub import MetricHub\n"
        "from ebm_dist.metrics.config import TrackingConfig\n"
        "hub = MetricHub(TrackingConfig(sinks=('tensorboard',)), sys.argv[1], {}, 't')\n"
        "hub.log(1, 0, {'energy/gap': 1.0}); hub.artifact(1, 'model', '.', [], {}); hub.close()\n"
        "assert not hub.notices(), hub.notices()\n"
        "assert 'wandb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert scalars(tmp_path, "energy/gap") == [(1, 1.0)]
