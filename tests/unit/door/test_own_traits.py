"""What objects of the user say of themselves reaches the run, whichever way they came."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import own_package
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import ebm_dist
from ebm_dist.config.run_config import load
from ebm_dist.core.errors import UserError

MODULE = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Estimates:
    estimates_log_z = True

    def __call__(self, energy, batch, negatives, generator):
        loss = energy(batch.x).mean() - energy(negatives.x).mean()
        return loss, {"likelihood/log_z": torch.tensor(12.5)}


class Silent(Estimates):
    estimates_log_z = False


def estimates(*given):
    return Estimates()(*given)


estimates.estimates_log_z = True


class Blocks(nn.Sequential):
    recompute = False
    num_recomputed = 0

    def forward(self, x):
        if not self.recompute:
            return super().forward(x)
        Blocks.num_recomputed += 1
        return checkpoint(super().forward, x, use_reentrant=False)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = Blocks(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.blocks(x).squeeze(1) + x.square().sum(1)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x).squeeze(1) + x.square().sum(1)
"""
LANGEVIN = {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, which holds the module `traits_of_theirs`; nothing has imported it."""
    (tmp_path / "traits_of_theirs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("traits_of_theirs", None)


def theirs(name: str) -> dict[str, str]:
    return {"name": "module", "target": f"traits_of_theirs:{name}"}


def config(**sections: Any) -> dict[str, Any]:
    return own_package.config(
        **{"sampler": LANGEVIN, "objective": {"name": "contrastive"}} | sections
    )


def train(run_dir: str, *, network: Any = None, **sections: Any) -> Any:
    console = Console(file=io.StringIO())
    return ebm_dist.train(config(**sections), energy=network, run_dir=run_dir, console=console)


def module() -> ModuleType:
    return sys.modules["traits_of_theirs"]


@pytest.mark.parametrize(("name", "says"), [("Estimates", 1), ("estimates", 1), ("Silent", 0)])
def test_an_own_objective_that_estimates_log_z_keeps_its_name_beside_the_exact_value(
    name: str, says: bool
):
    train(
        "run",
        data={"source": "toy:unit_gaussian_1d", "toy_samples": 256, "batch_size": 32},
        energy={"name": "quadratic", "precision": [2.0], "learnable": True},
        objective=theirs(name),
        evaluation={"every": 4, "fidelity": False},
    )
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert any("energy/test" in row for row in rows)
    assert any("likelihood/log_z_exact" in row for row in rows) == says
    if says:
        assert {row["likelihood/log_z"] for row in rows if "likelihood/log_z" in row} == {12.5}


def test_own_modules_that_can_recompute_do_so_in_the_learner_when_the_config_asks():
    load(config(energy=theirs("Deep"), learner={"recompute_activations": True}))
    assert "traits_of_theirs" not in sys.modules, "reading a config imports nothing"
    weights = {}
    for asked in (True, False):
        learner = {"lr": 0.01, "recompute_activations": asked}
        train(f"asked_{asked}", energy=theirs("Deep"), learner=learner)
        assert (module().Blocks.num_recomputed > 0) == asked
        module().Blocks.num_recomputed = 0
        weights[asked] = load_file(f"asked_{asked}/export/model.safetensors")
    for name, weight in weights[True].items():
        torch.testing.assert_close(weight, weights[False][name])
    given = module().Deep()
    train("given", network=given, learner={"recompute_activations": True})
    assert module().Blocks.num_recomputed > 0
    assert not given.blocks.recompute, "the caller's own network stays as it is"


def test_an_own_network_that_cannot_recompute_is_refused_before_the_run_if_it_is_asked_to():
    with pytest.raises(UserError, match=r"^learner.recompute_activations: .* attribute `recomp"):
        train("run", energy=theirs("Plain"), learner={"recompute_activations": True})
    assert not Path("run").exists()
