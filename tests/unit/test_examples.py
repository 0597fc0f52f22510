"""Each file of `examples/` and each line of docs/extending.md trains, from outside the package."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import ebm_dist
from ebm_dist import energies

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
SMALL = {
    "run": {"steps": 3},
    "runtime": {"backend": "inline"},
    "data": {"source": "toy:two_moons", "toy_samples": 64, "batch_size": 16, "prefetch": 0},
    "energy": {"name": "mlp", "widths": [8]},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
    "buffer": {"capacity": 64},
    "workers": {"num_chains": 16},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": None},
}


@pytest.fixture
def outside(tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of the examples in a directory that only Python's path knows."""
    copy = shutil.copytree(EXAMPLES, tmp_path / "outside")
    monkeypatch.setattr(sys, "path", [str(copy), *sys.path])
    for example in EXAMPLES.glob("own_*.py"):
        monkeypatch.delitem(sys.modules, example.stem, raising=False)
    yield copy
    energies.FAMILY.members.pop("tall", None)
    for example in EXAMPLES.glob("own_*.py"):  # of a directory that is about to go
        sys.modules.pop(example.stem, None)


def named(block: str) -> set[str]:
    """The examples that lines of a config name."""
    return set(re.findall(r"\bown_\w+", block))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.partition(":")[0])
def test_each_line_of_the_page_trains_with_its_example(block, outside, tmp_path):
    sections = {
        name: section | {"batch_size": 16} if name == "data" else section
        for name, section in yaml.safe_load(block).items()
    }
    result = ebm_dist.train(
        SMALL | sections, run_dir=tmp_path / "run", console=Console(file=io.StringIO())
    )
    assert result.step == 3
    (module,) = named(block)
    assert Path(sys.modules[module].__file__ or "").parent == outside


def test_the_page_shows_each_example():
    shown = set().union(*map(named, BLOCKS))
    assert shown == {example.stem for example in EXAMPLES.glob("own_*.py")}


def test_the_first_program_runs_and_has_ten_lines(outside):
    program = (outside / "first_program.py").read_text()
    lines = [line for line in program.splitlines()[1:] if line]
    assert len(lines) <= 10
    assert program.count('"steps": 400') == 1
    assert program.partition('"""\n')[2].strip() in (ROOT / "README.md").read_text()
    short = program.replace('"steps": 400', '"steps": 5').replace(", 1000)", ", 50, num_steps=5)")
    done = subprocess.run(
        [sys.executable, "-c", short], cwd=outside, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("% of the samples lie left")


@pytest.mark.slow
def test_the_first_program_as_it_is_written_finds_the_shares_of_the_clusters(outside):
    done = subprocess.run(
        [sys.executable, "first_program.py"],
        cwd=outside,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(r"(\d+)% of the samples lie left", last)
    assert found is not None, last
    # 1000 draws of a fair 70% spread by 1.5%; the rest is for what 400 updates leave.
    assert abs(int(found[1]) - 70) <= 8
