"""A stranger's package, all of it in one run: trained, killed, resumed, exported, read again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import ebm_dist
from ebm_dist import cli

PACKAGE = Path(__file__).parent / "stranger"
PARTS = ("nets", "moves", "losses", "data", "hooks")
READ = ("nets", "moves", "data")
"""Modules that an export is read with: those of its energy, its sampler and its data."""
CONFIG: dict[str, Any] = {
    "run": {"name": "stranger", "seed": 1, "steps": 9},
    "runtime": {"backend": "inline"},
    "data": {"source": "module", "target": "their_pkg.data:Ring", "params": {"num": 100}},
    "energy": {"name": "module", "target": "their_pkg.nets:Net", "params": {"width": 8}},
    "sampler": {"name": "module", "target": "their_pkg.moves:Walk", "num_steps": 3},
    "objective": {"name": "module", "target": "their_pkg.losses:contrast", "params": {"l2": 0.2}},
    "callbacks": [{"target": "their_pkg.hooks:Die", "params": {"at": 99, "kept": ""}}],
    "buffer": {"capacity": 64},
    # Threads change the order of sums, and with it the last bits.
    "workers": {"num_workers": 2, "num_chains": 16, "num_threads": 1},
    "learner": {"num_threads": 1},
    "flow": {"mode": "sync"},
    "checkpoint": {"every": 2},
    "evaluation": {"every": None},
    "tracking": {"wandb": "off", "log_every": 1},
}
CONFIG["data"] |= {"batch_size": 16, "holdout": 0.2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `their_pkg`, own.yaml, the killed run `begun`, and `whole`, which was not killed."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(PACKAGE, home / "their_pkg")
    (home / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sys, "path", list(sys.path))
        assert "saw 5:" in killed("begun", 5, 4)
        assert train("whole") == 0
        forget()
    return home


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`home` as the working directory; nothing has imported the package."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield home
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_pkg"]:
        del sys.modules[name]


def train(run_dir: str, *overrides: str) -> int:
    return cli.main(["train", "own.yaml", *overrides, "--run-dir", run_dir])


def train_apart(run_dir: str, *overrides: str, code: int = 0) -> str:
    """Train in a process of its own, which ends with `code`; what it shows."""
    command = [sys.executable, "-m", "ebm_dist", "train", "own.yaml", "--run-dir", run_dir]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def killed(run_dir: str, at: int, kept: int, *overrides: str) -> str:
    """Train in a process of its own, which its own callback kills at update `at`, once the
    checkpoint of update `kept` is there."""
    params = f"{{at: {at}, kept: {run_dir}/checkpoints/step_{kept:08d}}}"
    die = f"callbacks=[{{target: 'their_pkg.hooks:Die', params: {params}}}]"
    return train_apart(run_dir, die, *overrides, code=-signal.SIGKILL)


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / "export" / "model.safetensors")


def assert_same_weights(run_dir: str, other: str) -> None:
    a, b = weights(run_dir), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def flags(*parts: str) -> list[str]:
    return [word for part in parts for word in ("--plugin", f"their_pkg.{part}")]


def test_a_run_of_five_own_parts_is_killed_resumed_exported_and_read(
    here: Path, capsys: pytest.CaptureFixture
):
    assert all(len((PACKAGE / f"{part}.py").read_text().splitlines()) <= 15 for part in PARTS)
    shutil.copytree("begun", "run")
    assert train("run") == 0
    assert_same_weights("run", "whole")
    assert_resumed_at_4(capsys.readouterr().out)
    assert_can_be_read("run", capsys)


def assert_resumed_at_4(shown: str) -> None:
    assert "resumed from step_00000004" in shown
    assert [line.split(":")[0] for line in shown.splitlines() if "saw" in line] == [
        f"saw {step}" for step in range(5, 10)
    ]


def assert_can_be_read(run_dir: str, capsys: pytest.CaptureFixture) -> None:
    """Load, sample, evaluate and report the export, each with the modules that it asks for."""
    net = ebm_dist.load_energy(run_dir, plugins=["their_pkg.nets"])
    drawn, measured = f"{run_dir}.npz", f"{run_dir}.json"
    sample = ["sample", run_dir, "--num", "6", "--steps", "2", "--out", drawn]
    evaluate = ["evaluate", run_dir, "--suite", "ood", "--out", measured]
    for command in (sample, evaluate):
        forget()
        capsys.readouterr()
        given: list[str] = []
        # Whoever does what the line says gets there, and what was not named is not imported.
        while (code := cli.main([*command, *flags(*given)])) != 0:
            (line,) = capsys.readouterr().err.splitlines()
            assert code == 2
            wanted = next(part for part in READ if f"add --plugin their_pkg.{part}" in line)
            assert f"their_pkg.{wanted}" not in sys.modules
            given.append(wanted)
        assert given[0] == "nets"
    with np.load(drawn) as arrays:
        x, energy = (torch.from_numpy(arrays[name]) for name in ("x", "energy"))
    assert torch.allclose(net(x), energy, atol=1e-5)
    assert json.loads(Path(measured).read_text())["metrics"]
    forget()
    assert cli.main(["report", run_dir]) == 0
    assert "their_pkg.nets:Net" in Path(run_dir, "report.html").read_text()
    assert not [name for name in sys.modules if name.startswith("their_pkg")]


RAY = ("runtime.backend=ray", "runtime.start_timeout_s=400")


@pytest.mark.ray
def test_a_run_of_five_own_parts_that_knows_ray_alone_is_killed_resumed_exported_and_read(
    here: Path, capsys: pytest.CaptureFixture
):
    assert "resumed" not in killed("ray_alone", 5, 4, *RAY)
    assert_resumed_at_4(train_apart("ray_alone", *RAY))
    log = (here / "ray_alone" / "run.log").read_text()
    for part in ("worker-0", "worker-1", "learner-0"):
        assert log.count(f"{part} runs as process") == 2
    assert_same_weights("ray_alone", "whole")
    assert_can_be_read("ray_alone", capsys)


@pytest.mark.ray
def test_on_ray_a_run_of_five_own_parts_is_resumed_killed_and_the_same_bit_for_bit(here: Path):
    shutil.copytree("begun", "on_ray")
    assert "resumed from step_00000004" in killed("on_ray", 7, 6, *RAY)
    assert train("on_ray") == 0
    assert_same_weights("on_ray", "whole")


SCRIPT = """
import asyncio, sys
import yaml
import ebm_dist
from their_pkg.data import Ring
from their_pkg.nets import Net

class Seen:
    def __init__(self):
        self.steps = []
    def on_update(self, step, metrics):
        self.steps.append(step)

config = yaml.safe_load(open("own.yaml"))
for part in ("source", "target", "params"):
    del config["data"][part]
del config["energy"], config["callbacks"]
backend = sys.argv[1]
config["runtime"] = {"backend": backend, "start_timeout_s": 400}

def train(name):
    seen = Seen()
    run_dir = f"{backend}_{name}"
    result = ebm_dist.train(
        config, energy=lambda: Net(8), data=Ring(100), callbacks=[seen], run_dir=run_dir
    )
    assert result.finished and seen.steps == list(range(1, 10))
    x, energy = ebm_dist.sample(result.open_export(), 5, num_steps=2)
    assert x.shape == (5, 2)

async def coroutine():
    train("in_a_loop")
    await asyncio.to_thread(train, "in_a_thread")

train("plain")
asyncio.run(coroutine())
"""


@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_objects_given_from_python_train_the_same_weights_wherever_train_is_called(
    here: Path, backend: str
):
    command = [sys.executable, "-c", SCRIPT, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("plain", "in_a_loop", "in_a_thread"):
        assert_same_weights(f"{backend}_{name}", "whole")
        log = (here / f"{backend}_{name}" / "run.log").read_text()
        assert ("worker-1 runs as process" in log) == (backend == "ray")
