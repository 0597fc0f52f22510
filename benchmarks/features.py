"""What each feature of a run costs, as a percentage of its time.

    python benchmarks/features.py [--quick] [--out FILE.json]

Whole runs in one process, in turn, on the network and shapes of configs/digits.yaml; each arm
differs from the bare one in the feature alone. The time is that of the updates, by the run's clock,
and a price the median of what the runs of one turn say. One checkpoint in 30 s is less than what
two runs differ by: they are written twenty times as often, and a twentieth of it is told.
Repair is not among them: a repaired lease costs `flow.repair_steps` of `sampler.num_steps` (a
quarter), and how many there are is the straggler's doing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import interleaved, keep, medians, spread
from rich.console import Console
from rich.table import Table

BARE: dict[str, dict[str, Any]] = {
    "runtime": {"backend": "inline"},
    "data": {"source": "digits", "batch_size": 64},
    "energy": {"name": "resnet", "width": 24, "multipliers": [1, 2]},
    "sampler": {
        "name": "langevin",
        # Unclipped: Jarzynski weights know the density of such a step only.
        "step_size": 1.0,
        "noise_std": 0.01,
        "num_steps": 20,
    },
    "objective": {"name": "contrastive", "energy_l2": 0.1},
    # No chain starts anew: such a one has no Jarzynski weight.
    "buffer": {"capacity": 1000, "num_shards": 2, "reinit_prob": 0.0},
    "workers": {"num_workers": 1, "num_chains": 64},
    "learner": {"lr": 1e-4},
    "flow": {"mode": "sync"},
    "checkpoint": {"every": 100_000},
    "tracking": {"wandb": "off", "log_every": 1000},
    "evaluation": {"every": None, "trace_chains": 0},
}

# The sections that an arm changes.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "bare": {},
    "all diagnostics, a log line every 10 updates": {
        "tracking": {"log_every": 10},
        "evaluation": {"trace_chains": 64},
    },
    "Jarzynski weights": {"buffer": {"jarzynski": True}},
    "gradient penalty": {"objective": {"gradient_penalty": 0.1}},
    "a checkpoint every 25 updates": {"checkpoint": {"every": 25}},
}
OFTEN, ASKED = "a checkpoint every 25 updates", "a checkpoint every 500 updates"


def run_seconds(changes: dict[str, dict[str, Any]], updates: int) -> float:
    """Seconds an update of a run, without its start and its last checkpoint."""
    config = {name: section | changes.get(name, {}) for name, section in BARE.items()}
    config["run"] = {"name": "features", "seed": 0, "steps": updates}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "ebm_dist", "train", str(path), "--run-dir"]
        done = subprocess.run([*command, f"{directory}/run"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr or done.stdout)
        rows = [json.loads(x) for x in (Path(directory) / "run/metrics.jsonl").open()]
    rates = [row["throughput/updates_per_s"] for row in rows if "throughput/updates_per_s" in row]
    windows = _window_sizes([r["step"] for r in rows if "throughput/updates_per_s" in r])
    return sum(n / rate for n, rate in zip(windows, rates)) / sum(windows)


def _window_sizes(steps: list[int]) -> list[int]:
    return [b - a for a, b in zip([0, *steps], steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer updates and repetitions")
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args()
    updates, repetitions = (50, 1) if options.quick else (600, 3)
    os.environ.pop("OMP_NUM_THREADS", None)
    results = interleaved(
        {name: lambda c=changes: run_seconds(c, updates) for name, changes in ARMS.items()},
        repetitions,
    )
    bare = results["bare"]
    results[ASKED] = [b + (often - b) * 25 / 500 for b, often in zip(bare, results[OFTEN])]
    ratios = {name: [t / b for t, b in zip(times, bare)] for name, times in results.items()}
    table = Table("feature", "ms an update", "price", "± half range")
    rows = []
    for name, value in medians(results).items():
        price = statistics.median(ratios[name]) - 1
        noise = spread(bare if name == "bare" else ratios[name])
        rows.append({"feature": name, "seconds": value, "price": price, "spread": noise})
        table.add_row(name, f"{1e3 * value:.1f}", f"{price:+.1%}", f"{noise:.1%}")
    Console().print(table)
    keep("features", rows, options.out, repetitions=repetitions, updates=updates)


if __name__ == "__main__":
    main()
