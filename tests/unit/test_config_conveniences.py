"""What people write in configs and on command lines, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ebm_dist.cli import main
from ebm_dist.commands.options import plain_overrides

SMALL = {
    "data": {"source": "toy:two_moons"},
    "energy": {"name": "mlp", "widths": [8, 16]},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0},
}


def shown(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> dict:
    assert main(["config", "show", str(path), *overrides]) == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


# -- on the command line


def test_overrides_as_sweep_agents_write_them_are_overrides(small: Path, capsys):
    read = shown(capsys, small, "--learner.lr=1e-3", "--sampler.step_size=0.5", "run.name=a--b")
    assert (read["learner"]["lr"], read["sampler"]["step_size"]) == (1e-3, 0.5)


def test_only_an_option_with_a_dot_is_an_override(small: Path, capsys):
    words = ["train", "--run-dir=a.b=c", "--resume", "--learner.lr", "a=--b.c=1"]
    assert plain_overrides(words) == words
    assert main(["config", "show", str(small), "--learner-lr=1"]) == 2
    assert "No such option: --learner-lr" in capsys.readouterr().err
