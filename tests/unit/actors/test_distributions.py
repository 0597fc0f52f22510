"""Every evaluation leaves histograms of the chains' energies and ages."""

from __future__ import annotations

import json

from rich.console import Console
from small_runs import SMALL, run

from ebm_dist.run.train import train


def test_an_evaluation_logs_histograms_of_all_moved_chains(tmp_path):
    config = {
        "run": {"name": "small", "steps": 4},
        "runtime": {"backend": "inline", "device": "cpu"},
        "data": {"source": "toy:two_moons", "batch_size": 16, "toy_samples": 256},
        "energy": {"name": "mlp", "widths": [8]},
        "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 3},
        "objective": {"name": "contrastive", "energy_l2": 0.1},
        "buffer": {"capacity": 64, "num_shards": 2, "reinit_prob": 0.0},
        "workers": {"num_chains": 8, "num_threads": 1},
        "flow": {"mode": "sync"},
        "tracking": {"wandb": "off"},
        "evaluation": {"every": 4, "likelihood": False},
    }
    config["data"]["cache_dir"] = str(tmp_path / "cache")
    train(config, run_dir=tmp_path / "run", console=Console(quiet=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "histograms.jsonl").open()]
    first = {row["name"]: row for row in rows if row["step"] == 4}
    assert {"histogram/energy_negative", "histogram/age"} <= set(first)
    # Four updates of two leases of eight chains: what was moved, and how often.
    age = first["histogram/age"]
    assert 16 <= sum(age["counts"]) <= 64
    assert 1.0 <= age["edges"][-1] <= 4.0 + 0.5


def test_an_evaluation_of_images_draws_the_oldest_the_newest_and_the_lowest_chains(tmp_path):
    base = {
        **SMALL,
        "data": {"source": "digits", "batch_size": 128, "prefetch": 0},
        "energy": {"name": "quadratic", "precision": [2.0] * 64, "learnable": True},
        "sampler": {"name": "langevin", "step_size": 0.01, "temperature": 1.0, "num_steps": 2},
    }
    evaluated = ("evaluation.every=2", "evaluation.fidelity=false", "evaluation.likelihood=false")
    _, screen = run(tmp_path / "r", "run.steps=2", *evaluated, base=base)
    drawn = {f"{path.parent.name}/{path.name}" for path in (tmp_path / "r/samples").rglob("*.png")}
    name = "step_00000002.png"
    assert drawn == {f"{kind}/{name}" for kind in ("samples", "oldest", "newest", "lowest_energy")}
    assert f"samples/{name}" in screen, "the last screen names the samples"
