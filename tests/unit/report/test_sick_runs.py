"""The report of a real run names its sickness first, and finds none in a healthy run.

`docs/gallery/draw/sick_runs.py` has the runs: docs/report.md shows pictures of their reports.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import ebm_dist
from ebm_dist.config.run_config import load
from ebm_dist.report.health import Finding, examine, judged
from ebm_dist.report.run_files import RunFiles

sys.path.insert(0, str(Path(__file__).parents[3] / "docs/gallery/draw"))
import sick_runs

CONFIGS = Path(__file__).parents[3] / "configs"


def test_a_picture_of_a_page_ends_below_a_whole_row_of_figures(tmp_path: Path) -> None:
    pixels = np.full((200, 20, 3), 255, np.uint8)
    for top, bottom in ((10, 60), (76, 126), (142, 200)):  # the last row is not whole
        pixels[top:bottom, 5:15] = 0
    picture = tmp_path / "page.png"
    Image.fromarray(pixels).save(picture)
    sick_runs.end_below_a_row(picture)
    with Image.open(picture) as image:
        assert image.size == (20, 125 + sick_runs.GAP)


def findings_of(name: str, run_dir: Path) -> list[Finding]:
    sick_runs.train(name, run_dir)
    run = RunFiles(run_dir)
    return examine(run.series, run.config)


def test_a_healthy_run_is_told_of_nothing_to_change(tmp_path: Path) -> None:
    findings = findings_of("healthy", tmp_path / "healthy")
    found = {finding.metric for finding in findings}
    assert found >= {"energy/gap", "sampler/acceptance", "chain/stagnant", "energy/positive"}
    assert {finding.state for finding in findings} <= {"ok", "note"}
    run = RunFiles(tmp_path / "healthy")
    limits = judged(run.series, run.config)
    assert limits.keys() >= {"chain/trace_rhat", "flow/lag_max", "fault/restarts"}
    for name, (low, high) in limits.items():
        assert all(low <= value <= high for _, value in run.series[name]), name


@pytest.mark.slow
def test_the_start_of_the_default_run_is_told_of_nothing_to_change(tmp_path: Path) -> None:
    brief = ["run.steps=40", "evaluation.every=20", "runtime.backend=inline", "tracking.wandb=off"]
    config = load(CONFIGS / "digits.yaml", brief)
    ebm_dist.train(config, run_dir=tmp_path / "run", console=Console(file=io.StringIO()))
    run = RunFiles(tmp_path / "run")
    findings = {finding.metric: finding for finding in examine(run.series, run.config)}
    # The samples of so few updates are no better than a Gaussian, and may miss a class.
    assert findings.pop("fidelity/distance").advice.startswith("train longer")
    findings.pop("fidelity/class_ratio_K", None)
    assert findings.keys() >= {"energy/gap", "energy/positive", "flow/lag_max", "buffer/free"}
    assert {finding.state for finding in findings.values()} <= {"ok", "note"}, findings


@pytest.mark.parametrize(
    ("name", "metric", "says", "advises", "others"),
    [
        # Its moves are accepted: the barrier holds the chains, not the step.
        (
            "stagnated",
            "chain/stagnant",
            "stuck",
            "raise sampler.temperature",
            {"sampler/acceptance", "energy/positive", "energy/gap"},
        ),
        (
            "step",
            "sampler/acceptance",
            "moves are refused",
            "lower sampler.step_size",
            {"energy/positive"},
        ),
        ("exploding", "energy/positive", "the model runs away", "lower learner.lr", set()),
    ],
)
def test_a_sick_run_is_named_by_its_own_sickness(
    name: str, metric: str, says: str, advises: str, others: set[str], tmp_path: Path
) -> None:
    findings = findings_of(name, tmp_path / name)
    worst = findings[0]
    assert (worst.state, worst.metric) == ("bad", metric)
    assert says in worst.what
    assert advises in worst.advice
    fine = {finding.metric for finding in findings if finding.state == "ok"}
    assert fine >= others
    assert "energy/gap" in others or "energy/gap" not in fine
    if "sampler/acceptance" not in others:
        # More or longer ones of the steps that are refused help nobody.
        assert not any("raise sampler" in finding.advice for finding in findings)
