"""Own data on Ray: every actor that reads finds the module, or was sent the tensor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_runs import TINY, assert_bitwise_equal
from rich.console import Console

from ebm_dist.config.run_config import load
from ebm_dist.data import DataConfig, given
from ebm_dist.run.train import train

MINE = """
import torch
class Points:
    def __init__(self, num=200):
        self.x = torch.randn(num, 2, generator=torch.Generator().manual_seed(0))
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index]
"""


def run(run_dir: Path, data: dict[str, Any] | torch.Tensor, *overrides: str) -> None:
    config = {**TINY, "data": {"batch_size": 32}, "evaluation": {"every": 6, "num_samples": 64}}
    if isinstance(data, dict):
        config["data"] |= data
    loaded = load(config, ["buffer.init=data", *overrides])
    if isinstance(data, torch.Tensor):
        section = given(data, DataConfig(batch_size=32, holdout=0.2))
        loaded = loaded.model_copy(update={"data": section})
    assert train(loaded, run_dir=run_dir, console=Console(file=io.StringIO())).finished


@pytest.mark.parametrize("kind", ["module", "given"])
def test_a_run_on_ray_reads_the_same_data_as_one_in_this_process(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "points_on_ray.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"), prepend=":")
    own = {"source": "module", "target": "points_on_ray:Points", "holdout": 0.2}
    data = own if kind == "module" else torch.randn(200, 2)
    run(tmp_path / "inline", data)
    run(tmp_path / "ray", data, "runtime.backend=ray", "workers.num_workers=2")
    assert_bitwise_equal(tmp_path / "inline", tmp_path / "ray")
