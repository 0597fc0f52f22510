"""`make gpu-check`: what fails or hangs is named and ends nothing else; without a GPU, one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ebm_dist.config.run_config import load
from ebm_dist.data.config import DataConfig
from ebm_dist.data.stream.stream import DataStream
from ebm_dist.learner import engine

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
import gpu_probe  # noqa: E402


def of(code: str, name: str = "part", limit_s: float = 60.0, needs: tuple[str, ...] = ()):
    return gpu_check.Part(name, (sys.executable, "-c", code), limit_s, needs)


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu_check.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no GPU" in line


def test_a_part_that_fails_crashes_or_hangs_is_named_with_its_cause_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    seen = f"print(open({str(tmp_path / 'report.md')!r}).read())"
    every = [
        of("raise RuntimeError('no such kernel')", "fails"),
        of("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes"),
        of("import time; print('at the door', flush=True); time.sleep(600)", "hangs", 2.0),
        of("", "lacks", needs=("a_package_that_is_not_there",)),
        of(seen, "goes on"),
    ]
    failed = gpu_check.check(every, tmp_path, "HARDWARE and COMMIT\n")
    assert failed == ["fails", "crashes", "hangs", "lacks"]
    report = (tmp_path / "report.md").read_text()
    for text in (
        "fails: FAILED, exit code 1: RuntimeError: no such kernel",
        "crashes: FAILED, signal SIGSEGV",
        "hangs: FAILED, not done within 2 s; its last line: at the door",
        "lacks: FAILED, not run: a_package_that_is_not_there not installed",
        "goes on: ok",
    ):
        assert text in report
    # The last part has read what was written before it was over.
    assert "HARDWARE and COMMIT" in (tmp_path / "4.log").read_text()
    assert "lacks: FAILED" in (tmp_path / "4.log").read_text()


def test_what_a_part_has_started_ends_with_it(tmp_path: Path) -> None:
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    assert gpu_check.run(of(child), tmp_path / "log") == ""
    pid = int((tmp_path / "log").read_text())
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 60
    while stat.exists() and stat.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)


@pytest.mark.parametrize("sklearn", [True, False])
def test_its_parts_fit_into_ten_minutes_and_their_configs_load(
    monkeypatch, tmp_path: Path, sklearn: bool
) -> None:
    here = gpu_check.is_here
    monkeypatch.setattr(gpu_check, "is_here", lambda p: sklearn if p == "sklearn" else here(p))
    every = gpu_check.parts(tmp_path)
    assert sum(part.limit_s for part in every) < 600
    trained = [part.command for part in every if "train" in part.command]
    assert len(trained) == 3
    for command in trained:
        words = command[command.index("train") + 1 :]
        overrides = [word for word in words if "=" in word]
        config = load(ROOT / words[0], overrides)
        assert config.runtime.device == "cuda"
        assert (config.data.source == str(tmp_path / "images")) == (
            not sklearn and "digits" in words[0]
        )
    (tests,) = [part.command for part in every if "pytest" in part.command]
    assert "tests/unit/samplers/test_engine_cuda.py" in tests


def test_it_runs_in_the_environment_that_is_there_and_builds_none(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())

    def said() -> list[str]:
        command = ["make", "-n", "-C", str(tmp_path), "--no-print-directory", "gpu-check"]
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()

    assert said() == ["python3 benchmarks/gpu_check.py"]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert said() == [".venv/bin/python benchmarks/gpu_check.py"]


def test_its_pictures_are_a_data_set_of_ten_classes_that_trains(tmp_path: Path) -> None:
    gpu_probe.write_images(tmp_path / "shards", 8, num=40)
    data = DataConfig(source=str(tmp_path / "shards"), batch_size=40)
    batch = DataStream(data, rank=0, world_size=1, seed=0).next_batch(40)
    assert batch.x.shape == (40, 1, 8, 8)
    assert batch.label is not None
    assert sorted(batch.label.tolist()) == sorted(list(range(10)) * 4)


def test_its_comparison_of_zero_stages_forces_the_stage_and_sees_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = []
    real = engine.partition_of

    def seen(optimizer: Any, *, zero_stage: int, rank: int) -> Any:
        stages.append((zero_stage, type(optimizer).__name__))
        return real(optimizer, zero_stage=zero_stage, rank=rank)

    flat, asked = engine.LearnerEngine.flat_weights, []

    def moved(self: Any) -> Any:
        asked.append(self)
        weights = flat(self)
        return weights if len(asked) == 1 else weights + 0.03

    monkeypatch.setattr(engine, "partition_of", seen)
    monkeypatch.setattr(engine.LearnerEngine, "flat_weights", moved)
    with pytest.raises(AssertionError, match="more than rounding"):
        gpu_probe.zero("cpu")
    assert stages == [(0, "Adam"), (2, "DeepSpeedZeroOptimizer")]
    assert "after 20 updates: 0.03\n" in capsys.readouterr().out, "0 but for what was added"
