"""Every script of `benchmarks/` starts, and those that take seconds measure something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ebm_dist
from ebm_dist.checkpoint.files import latest
from ebm_dist.config.run_config import load

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))

from chains_in_loss import ARMS, BASE, FRESH  # noqa: E402
from gpu_probe import write_images  # noqa: E402

SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "common.py")

# All in one process, which imports torch and Ray once.
HELP = """
import contextlib, io, json, runpy, sys, traceback
found = {}
folder, *scripts = sys.argv[1:]
sys.path.insert(0, folder)
for name in scripts:
    sys.argv = [name, "--help"]
    shown, code = io.StringIO(), "it did not end by itself"
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_path(f"{folder}/{name}", run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = traceback.format_exc()
    found[name] = [code, shown.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[Any, str]]:
    """Exit code and output of `--help`, by script."""
    command = [sys.executable, "-c", HELP, str(FOLDER), *SCRIPTS]
    wide = {**os.environ, "COLUMNS": "10000"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=wide)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_imports_all_that_it_names_and_says_how_it_is_called(
    name: str, helps: dict[str, tuple[Any, str]]
) -> None:
    code, shown = helps[name]
    assert not code, code
    assert shown.startswith(f"usage: {name}")
    assert (FOLDER / name).read_text().split('"""')[1].splitlines()[0] in shown


def measured(name: str, *arguments: str | Path) -> str:
    """What a benchmark prints."""
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(out: Path) -> list[dict[str, Any]]:
    kept = json.loads(out.read_text())
    assert kept["commit"]
    return kept["rows"]


def test_chains_in_the_loss_are_timed_beside_those_of_the_pool(tmp_path: Path) -> None:
    measured("chains_in_loss.py", "--updates", "2", "--out", tmp_path / "x.json")
    rows = {row["name"]: row for row in rows_of(tmp_path / "x.json")}
    assert len(rows) == 4
    for name, row in rows.items():
        assert row["learner"] > 0
        assert (row["rounds"] > 0) == ("pool" in name)


def test_negatives_that_stand_for_those_of_a_loss_are_200_steps_from_noise_by_its_weights(
    tmp_path: Path,
) -> None:
    arm = {**BASE, **ARMS[FRESH], "energy": {"name": "mlp"}, "run": {"seed": 0, "steps": 3}}
    arm["buffer"] = {**arm["buffer"], "context": {"clock": True}}
    logged = {"tracking": {"wandb": "off", "log_every": 1}, "checkpoint": {"every": 3}}
    ebm_dist.train({**arm, **logged}, run_dir=tmp_path / "r")
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").open()]
    updates = [row for row in rows if "flow/lag_max" in row]
    assert len(updates) == 3
    for row in updates:
        assert row["flow/lag_max"] == 0
        assert row["flow/mcmc_steps_per_update"] == 64 * 200
    last = latest(tmp_path / "r")
    assert last is not None
    shard = last.arrays("shard_0000")
    # All 64 are those of the last update, and none goes on from the one before.
    assert (shard["context/clock"] == 200).all()
    assert (shard["age"] == 1).all()
    assert (shard["generation"] == 3).all()


def test_the_completions_of_a_run_are_measured_beside_a_regression(tmp_path: Path) -> None:
    few = ("run.steps=2", "tracking.wandb=off", "evaluation.every=null")
    ebm_dist.train(load(ROOT / "configs/digits_completion.yaml", few), run_dir=tmp_path / "r")
    files = ("--picture", tmp_path / "x.png", "--out", tmp_path / "x.json")
    measured("completion.py", "--export", tmp_path / "r", "--steps", "2", *files)
    rows = {row["what"]: row for row in rows_of(tmp_path / "x.json")}
    assert list(rows) == ["held-out digits", "regression", "energy", "shuffled"]
    assert rows["held-out digits"]["confident"] > 0.8
    assert rows["held-out digits"]["distance"] == 0
    assert rows["regression"]["both"] == 0  # it has one answer
    # Two steps from noise draw no digit, and read no condition.
    assert rows["energy"]["grey"] > rows["held-out digits"]["grey"]
    assert rows["energy"]["distance"] > rows["regression"]["distance"]
    assert abs(rows["energy"]["distance"] - rows["shuffled"]["distance"]) < 0.5
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_samples_show_both_digits_of_a_left_part_of_which_a_regression_draws_the_mean(
    tmp_path: Path,
) -> None:
    measured("completion.py", "--out", tmp_path / "x.json")
    rows = {row["what"]: row for row in rows_of(tmp_path / "x.json")}
    energy, mean, shuffled = rows["energy"], rows["regression"], rows["shuffled"]

    def error(name: str, *of: dict[str, Any]) -> float:
        return sum(row["error"][name] ** 2 for row in of) ** 0.5

    confident = energy["confident"] - mean["confident"]
    assert confident > 2 * error("confident", energy, mean)
    assert mean["both"] == 0
    # Joined with another left part they are such digits less often: samples depend on their own.
    for name in ("confident", "likely", "both"):
        assert energy[name] - shuffled[name] > 2 * error(name, energy, shuffled)
    assert shuffled["best"] - energy["best"] > 3 * error("best", energy, shuffled)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of small pictures in the shape of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("bars") / "images"
    write_images(folder, 28, 160)
    return folder


@pytest.mark.slow
def test_the_judge_is_trained_once_and_kept_and_the_arms_of_pictures_are_measured_by_it(
    images: Path, tmp_path: Path
) -> None:
    arms = tmp_path / "arms"
    (arms / "pcd_0").mkdir(parents=True)
    judge = arms / "judge.safetensors"
    first = measured("judge.py", images, judge)
    before = judge.stat().st_mtime_ns
    again = measured("judge.py", images, judge)
    assert "epoch 5 of 5" in first
    assert "epoch" not in again
    assert first.splitlines()[-1] == again.splitlines()[-1]
    assert "label_accuracy" in again

    # An arm that has run: chains that are noise, at two times.
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 40, 1, 28, 28)).astype(np.float32)
    np.savez(arms / "pcd_0" / "chains.npz", chains=noise, times=np.array([1.0, 2.0]), updates=7)
    out = tmp_path / "x.json"
    options = ("--peer-python", "none", "--data", images, "--seeds", "0", "--arms", "pcd")
    measured("pictures.py", arms, *options, "--out", out)
    (row,) = rows_of(out)
    assert (row["arm"], row["updates"], len(row["curve"])) == ("pcd", 7, 2)
    assert row["last"]["precision"] < 0.2
    assert judge.stat().st_mtime_ns == before
    assert (arms / "pcd_0" / "samples.png").is_file()
