"""Runs on a dataset of the user's own: trained, stopped, resumed, exported and evaluated."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ebm_dist.cli import main
from ebm_dist.config.run_config import RunConfig, load
from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, given
from ebm_dist.files.strict_yaml import write_yaml
from ebm_dist.run.train import RunResult, train

MINE = """
import numpy as np
class Points:
    def __init__(self, num=300, seed=0):
        rng = np.random.default_rng(seed)
        self.x = (rng.normal(size=(num, 2)) * 0.3 + [1, 0]).astype(np.float32)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index]
class Labelled(Points):
    classes = ("left", "right")
    def __getitem__(self, index):
        return self.x[index], int(self.x[index, 0] > 1)
class Reads:
    needs_labels = True
    def __call__(self, energy, batch, negatives, generator):
        loss = energy(batch.x).mean() - energy(negatives.x).mean()
        agree = (batch.x[:, 0] > 1) == batch.label
        seen = {"mean": batch.x.mean(), "right": batch.label.float().mean()}
        return loss, {"agree": agree.float().mean(), **seen}
"""
SMALL: dict[str, Any] = {
    "run": {"name": "own", "steps": 6},
    "runtime": {"backend": "inline"},
    "energy": {"name": "mlp", "widths": [8]},
    "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
    "buffer": {"capacity": 64, "init": "data"},
    "workers": {"num_chains": 16},
    "flow": {"mode": "sync"},
    "checkpoint": {"every": 2},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": 3, "num_samples": 32, "fidelity": False},
}


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "path" / "points_pkg").mkdir(parents=True)
    (tmp_path / "path" / "points_pkg" / "__init__.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield
    sys.modules.pop("points_pkg", None)


def config(data: dict[str, Any], **changes: Any) -> RunConfig:
    return load({**SMALL, "data": {"batch_size": 16, **data}, **changes})


def run(config: RunConfig, path: Path) -> RunResult:
    return train(config, run_dir=path, console=Console(file=io.StringIO()))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "export" / "model.safetensors")


OWN = {"source": "module", "target": "points_pkg:Points", "test_params": {"num": 64, "seed": 1}}


def test_a_run_on_a_module_is_resumed_bit_for_bit_exported_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = run(config(OWN), tmp_path / "whole")
    assert whole.finished
    assert "energy/test" in whole.metrics
    run(config(OWN, run={"name": "own", "steps": 4}), tmp_path / "parts")
    run(config(OWN), tmp_path / "parts")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)
    card = (tmp_path / "whole" / "export" / "README.md").read_text()
    assert "points_pkg:Points" in card
    assert "300 samples, " in card
    with pytest.raises(UserError, match=r"data.params.num: |data.fingerprint: "):
        run(config({**OWN, "params": {"num": 299}}), tmp_path / "parts")


def test_a_run_goes_on_with_the_tensor_it_began_with_and_no_other(tmp_path: Path):
    x = torch.randn(200, 2)

    def of(x: torch.Tensor, steps: int) -> RunConfig:
        base = config({}, run={"name": "own", "steps": steps})
        return base.model_copy(
            update={"data": given(x, DataConfig(batch_size=16, holdout=0.2, prefetch=0))}
        )

    run(of(x, 4), tmp_path / "parts")
    with pytest.raises(UserError, match=r"^data.fingerprint: .* has 15\d|16\d samples"):
        run(of(x + 1, 6), tmp_path / "parts")
    run(of(x.clone().numpy(), 6), tmp_path / "parts")  # type: ignore[arg-type]
    run(of(x, 6), tmp_path / "whole")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_on_the_prepared_shards_is_of_the_same_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = str(tmp_path / "out")
    assert main(["data", "prepare", OWN["target"], out, "test_params={num: 64, seed: 1}"]) == 0
    result = run(config({"source": out}), tmp_path / "run")
    assert result.finished
    export = str(tmp_path / "run" / "export")
    assert main(["evaluate", export, "--suite", "landscape"]) == 0


LABELLED = {"source": "module", "target": "points_pkg:Labelled"}


def test_the_labels_of_an_own_dataset_train_a_classifier(tmp_path: Path):
    result = run(
        config(
            LABELLED | {"batch_size": 64},
            run={"name": "own", "steps": 100},
            energy={"name": "mlp", "widths": [8], "num_classes": "data"},
            objective={"name": "joint"},
            learner={"lr": 0.05},
            evaluation={"every": None},
        ),
        tmp_path / "run",
    )
    assert result.metrics["objective/accuracy"] > 0.8  # half without the labels


READS: dict[str, Any] = {
    **SMALL,
    "data": {**LABELLED, "batch_size": 16},
    "objective": {"name": "module", "target": "points_pkg:Reads"},
    "buffer": {"capacity": 64},
    "workers": {"num_chains": 8},
    "tracking": {"wandb": "off", "log_every": 1},
    "evaluation": {"every": None},
}


def seen(run_dir: Path, name: str) -> list[float]:
    """The values of an own metric, update by update."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[f"user/{name}"] for row in rows if f"user/{name}" in row]


def test_each_label_of_an_own_dataset_reaches_an_own_objective_with_its_event(tmp_path: Path):
    run(load(READS), tmp_path / "run")
    assert seen(tmp_path / "run", "agree") == [1.0] * 6
    assert min(seen(tmp_path / "run", "right")) > 0
    assert max(seen(tmp_path / "run", "right")) < 1


@pytest.mark.ray
def test_two_learner_ranks_read_an_own_labelled_dataset_as_one_does(tmp_path: Path):
    run(load(READS), tmp_path / "one")
    (tmp_path / "own.yaml").write_text(write_yaml(READS))
    two = ("runtime.backend=ray", "runtime.start_timeout_s=400", "learner.num_ranks=2")
    command = [sys.executable, "-m", "ebm_dist", "train", str(tmp_path / "own.yaml"), *two]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "two")],
        cwd=tmp_path / "path",
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learner-1 runs as process" in (tmp_path / "two" / "run.log").read_text()
    assert seen(tmp_path / "two", "agree") == [1.0] * 6
    for name in ("mean", "right"):  # averages over the ranks, each of which reads half a batch
        values = seen(tmp_path / "one", name)
        assert len(set(values)) > 1
        assert seen(tmp_path / "two", name) == pytest.approx(values, abs=1e-5)
