"""What an update costs the learner with its chains inside the loss, and with chains from the pool.

    python benchmarks/chains_in_loss.py [--updates 40] [--out FILE]

Recovery likelihood (30 Langevin steps) and energy matching (200 steps of dt .01) on 8x8 digits with
one network, 64 events an update, one thread, one process, at the same law. The pool moves the
chains of recovery likelihood by as many steps in a round; those of energy matching live for twenty
rounds of ten steps (`buffer.context.clock`). This package has no energy matching with chains inside
the loss; the arm for it renews all 64 chains at every update and moves them by 200 steps under the
weights of that update (`flow.mode: sync`). Those are the steps that the loss would take, so their
time counts as the learner's. Processor time of `LearnerRank.update` and of `Worker.run_round`,
medians over the second half of the updates.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "runtime": {"backend": "inline"},
    "data": {"source": "digits", "batch_size": 64},
    "energy": {"name": "resnet", "width": 24},
    "workers": {"num_workers": 1, "num_chains": 64, "num_threads": 1},
    "flow": {"mode": "sync"},
    "learner": {"lr": 1e-4, "num_threads": 1},
    "tracking": {"wandb": "off"},
    "evaluation": {"every": None},
}
UNUSED = {"name": "mala", "step_size": 0.1, "num_steps": 1}
PAIRS = {"level": "stratified", "pair": "data", "condition": "noisy_pair"}
NOISE = [0.1, 0.3]
MATCHING = {"name": "energy_matching", "coupling": "independent", "contrastive_weight": 1e-3}
FLOW = {"name": "flow_langevin", "step_size": 0.01, "temperature": 0.01}
FRESH = "energy matching, in the loss"

ARMS: dict[str, dict[str, Any]] = {
    "recovery likelihood, in the loss": {
        "sampler": UNUSED,
        "objective": {"name": "recovery_likelihood", "noise_std": NOISE, "num_steps": 30},
    },
    "recovery likelihood, pool": {
        "sampler": {"name": "langevin", "step_size": 1e-3, "temperature": 1.0, "num_steps": 30},
        "objective": {"name": "recovery_likelihood", "chains": "pool", "noise_std": NOISE},
        "buffer": {"capacity": 64, "init": "condition", "reinit_prob": 1.0, "context": PAIRS},
    },
    FRESH: {
        "sampler": {**FLOW, "num_steps": 200},
        "objective": MATCHING,
        "buffer": {"capacity": 64, "init": "gaussian", "reinit_prob": 1.0},
    },
    "energy matching, pool": {
        "sampler": {**FLOW, "num_steps": 10},
        "objective": {**MATCHING, "min_clock": 100},
        "buffer": {
            "capacity": 1280,
            "init": "gaussian",
            "reinit_prob": 0.05,
            "context": {"clock": True},
        },
    },
}


def measured(config: dict[str, Any], updates: int) -> dict[str, float]:
    """Processor milliseconds of an update in the learner and in the rounds that it takes."""
    from rich.console import Console

    import ebm_dist
    from ebm_dist.actors.learner_rank import LearnerRank
    from ebm_dist.actors.worker import Worker

    spent: dict[str, list[float]] = {"learner": [], "rounds": []}

    def timed(kind: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent[kind].append(1e3 * (time.thread_time() - start))

        return call

    update, run_round = LearnerRank.update, Worker.run_round
    LearnerRank.update, Worker.run_round = timed("learner", update), timed("rounds", run_round)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = {"seed": 0, "steps": updates}
            console = Console(file=io.StringIO())
            ebm_dist.train(
                {**BASE, **config, "run": run}, run_dir=Path(folder, "r"), console=console
            )
    finally:
        LearnerRank.update, Worker.run_round = update, run_round  # type: ignore[method-assign]
    late = {kind: values[len(values) // 2 :] for kind, values in spent.items()}
    per_update = len(spent["rounds"]) / updates
    rounds = per_update * statistics.median(late["rounds"]) if late["rounds"] else 0.0
    learner = statistics.median(late["learner"])
    return {"learner": learner, "rounds": rounds, "share": learner / (learner + rounds)}


def main() -> None:
    from common import keep
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args()
    table = Table("", "learner, ms an update", "workers, ms an update", "the learner's share")
    rows = []
    for name, config in ARMS.items():
        found = measured(config, options.updates)
        if name == FRESH:
            learner = found["learner"] + found["rounds"]
            found = {"learner": learner, "rounds": 0.0, "share": 1.0}
        rows.append({"name": name, **found})
    for row in rows:
        numbers = f"{row['learner']:.1f}", f"{row['rounds']:.1f}", f"{row['share']:.0%}"
        table.add_row(row["name"], *numbers)
    Console().print(table)
    keep("chains_in_loss", rows, options.out)


if __name__ == "__main__":
    main()
