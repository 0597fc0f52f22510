"""The shipped W&B sweep: what its agents call, and where its trials write."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ebm_dist.commands.options import plain_overrides
from ebm_dist.config import run_config
from ebm_dist.metrics.names import METRICS
from ebm_dist.run.run_dir import run_directory

ROOT = Path(__file__).parents[3]


def test_the_arguments_of_a_sweeps_agent_are_read_and_each_trial_has_its_own_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = yaml.safe_load((ROOT / "launch/sweep.yaml").read_text())
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    directories = set()
    for trial, pick in (("trial1", 0), ("trial2", -1)):
        values = {
            key: choice.get("values", [choice.get("value", choice.get("min"))])[pick]
            for key, choice in sweep["parameters"].items()
        }
        # As the agent does it, which writes --key=value whatever the key.
        said = {"args": {key: {"value": value} for key, value in values.items()}}
        parts = {"${args}": utils.create_sweep_command_args(said)["args"]}
        parts["${program}"] = [sweep["program"]]
        words = utils.create_sweep_command(sweep["command"])
        program, *argv = [word for part in words for word in parts.get(part, [part])]
        assert program == "ebm-dist"
        verb, config, *overrides = plain_overrides(argv)
        assert verb == "train"
        loaded = run_config.load(ROOT / config, overrides)
        assert loaded.learner.lr == values["learner.lr"]
        assert loaded.sampler.num_steps == values["sampler.num_steps"]
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        directories.add(str(run_directory(loaded.run, None)))
        directories.add(str(run_directory(loaded.run, "/out/mine")))
    assert directories == {
        "runs/digits-trial1",
        "runs/digits-trial2",
        "/out/mine-trial1",
        "/out/mine-trial2",
    }
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert str(run_directory(loaded.run, None)) == "runs/digits"
    assert sweep["metric"] == {"name": "fidelity/distance", "goal": "minimize"}
    assert sweep["metric"]["name"] in METRICS
