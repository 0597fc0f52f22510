"""Small runs in this process for the tests of the graph's parts: a config, a run, its metrics."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ebm_dist.config.run_config import load
from ebm_dist.run.train import RunResult, train

SMALL: dict[str, Any] = {
    "run": {"name": "small", "seed": 3, "steps": 20},
    "runtime": {"backend": "inline"},
    "data": {
        "source": "toy:unit_gaussian_1d",
        "toy_samples": 4096,
        "batch_size": 128,
        "prefetch": 0,
    },
    "energy": {"name": "quadratic", "precision": [2.0], "learnable": True},
    "sampler": {"name": "mala", "step_size": 0.5, "temperature": 1.0, "num_steps": 4},
    "buffer": {"capacity": 256, "num_shards": 2, "reinit_prob": 0.0},
    "workers": {"num_workers": 1, "num_chains": 64, "num_threads": 1},
    "learner": {"num_threads": 1, "lr": 0.01, "ema_decay": 0.9},
    "flow": {"mode": "sync"},
    "checkpoint": {"every": 1000, "keep": 1},
    "tracking": {"wandb": "off", "log_every": 5},
    "evaluation": {"every": None},
}


def run(
    run_dir: Path, *overrides: str, base: dict[str, Any] = SMALL, **options: Any
) -> tuple[RunResult, str]:
    """Train `base` with `key.sub=value` overrides; the result, and what the terminal showed."""
    screen = io.StringIO()
    console = Console(file=screen, width=400)
    result = train(load(base, overrides), run_dir=run_dir, console=console, **options)
    return result, screen.getvalue()


def curve(run_dir: Path, name: str) -> dict[int, float]:
    """The logged values of a metric by update."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}
