"""What a pool of workers is worth against lock-step sampling over the same devices.

    python benchmarks/pool.py [--quick] [--out FILE.json]

First on this machine: two workers on one core each, one of them stopped half of the time, and a
global batch of 128. Lock-step is `flow.mode: sync` with 64 chains on each; the pool is `async`
with whole batches of 128, so that different workers serve different updates.

Then simulated from 1 to 64 devices: the seconds of a round are measured here at batches from 2 to
128, and an event-driven simulation of both ways takes its times from that table, with one device
at half speed and with none. The simulated device is one core of this machine, or its GPU where
torch finds one. A GPU's table is flatter at small batches, which favours the pool further.

The runs of the first part stay on the CPU: half the speed of a part is half of its core's time, and
what it has given to a GPU would go on.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import fastest_device, interleaved, keep, medians, seconds, spread
from rich.console import Console
from rich.table import Table

from ebm_dist import energies, samplers
from ebm_dist.samplers import run_chain

BATCH, NUM_STEPS = 128, 40
ENERGY = {"name": "resnet", "width": 16, "multipliers": [1, 2]}
SAMPLER = {"name": "langevin", "step_size": 10.0, "noise_std": 0.01, "grad_clip": 0.05}

GRAPHS: dict[str, dict[str, dict[str, Any]]] = {
    "lock-step": {
        "workers": {"num_workers": 2, "num_chains": BATCH // 2, "num_threads": 1},
        "flow": {"mode": "sync"},
    },
    "pool": {
        "workers": {"num_workers": 2, "num_chains": BATCH, "num_threads": 1},
        "flow": {"mode": "async", "max_lag": 8},
    },
}


def config(updates: int) -> dict[str, Any]:
    return {
        "run": {"name": "pool", "seed": 0, "steps": updates},
        "runtime": {"device": "cpu"},
        "data": {"source": "digits", "batch_size": BATCH},
        "energy": ENERGY,
        "sampler": {**SAMPLER, "num_steps": NUM_STEPS},
        "objective": {"name": "contrastive", "energy_l2": 0.1},
        "buffer": {"capacity": 2048, "num_shards": 2, "reinit_prob": 0.05},
        "learner": {"lr": 1e-5, "num_threads": 1},
        "checkpoint": {"every": 10 * updates},
        "tracking": {"wandb": "off", "log_every": 5},
        "evaluation": {"every": None},
    }


class HalfSpeed:
    """Stops a part of a run for half of the time, as a slow device would be."""

    def __init__(self, log: Path, name: str) -> None:
        self._log, self._name = log, name
        self.stops = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        pid = None
        while not self._done.wait(0.02):
            pid = pid or self._find()
            if pid is None:
                continue
            try:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.02)
                os.kill(pid, signal.SIGCONT)
                self.stops += 1
            except ProcessLookupError:
                return

    def _find(self) -> int | None:
        """The process of the part, which the run notes in its log."""
        if not self._log.exists():
            return None
        found = re.search(rf"{self._name} runs as process (\d+)", self._log.read_text())
        return int(found[1]) if found else None

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def measured_rate(name: str, updates: int, *, straggler: bool) -> float:
    """Updates a second of a real run, past its first third."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        path.write_text(json.dumps(config(updates) | GRAPHS[name]))
        command = [sys.executable, "-m", "ebm_dist", "train", str(path), "--run-dir"]
        run = subprocess.Popen(
            [*command, f"{directory}/run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        slow = HalfSpeed(Path(directory) / "run/run.log", "worker-1") if straggler else None
        try:
            output, _ = run.communicate()
        finally:
            if slow is not None:
                slow.stop()
        if run.returncode:
            raise SystemExit(f"{name}: {output}")
        if slow is not None and not slow.stops:
            raise SystemExit(f"{name}: worker-1 was never slowed down")
        rows = [json.loads(x) for x in (Path(directory) / "run/metrics.jsonl").open()]
    rates = [r["throughput/updates_per_s"] for r in rows if r["step"] > updates // 3]
    return len(rates) / sum(1 / rate for rate in rates)


def round_seconds(batches: list[int], repetitions: int) -> dict[int, float]:
    """Seconds of a round of `NUM_STEPS` steps on one core, or on the GPU, by batch."""
    torch.set_num_threads(1)
    device = fastest_device()
    energy = energies.make(**ENERGY, event_shape=(1, 8, 8)).eval().to(device)
    kernel = samplers.make(**SAMPLER)
    generator = torch.Generator(device).manual_seed(0)

    def one(batch: int) -> float:
        x = torch.rand(batch, 1, 8, 8, generator=generator, device=device) * 2 - 1
        return seconds(lambda: run_chain(kernel, x, energy, NUM_STEPS, generator), 1)

    one(batches[0])
    return {
        int(name): value
        for name, value in medians(
            interleaved({str(b): lambda b=b: one(b) for b in batches}, repetitions)
        ).items()
    }


def lock_step_rate(table: dict[int, float], speeds: list[float]) -> float:
    """Updates a second when each device moves an equal part of every batch, by sampling alone."""
    share = -(-BATCH // len(speeds))
    return 1.0 / max(_interpolate(table, share) / speed for speed in speeds)


def pool_rate(table: dict[int, float], speeds: list[float], num_updates: int = 2000) -> float:
    """The same when each device moves whole batches, and updates take them as they come."""
    whole = table[BATCH]
    events = [(whole / speed, index) for index, speed in enumerate(speeds)]
    heapq.heapify(events)
    now = 0.0
    for _ in range(num_updates):
        now, index = heapq.heappop(events)
        heapq.heappush(events, (now + whole / speeds[index], index))
    return num_updates / now


def _interpolate(table: dict[int, float], batch: int) -> float:
    sizes = sorted(table)
    return float(np.interp(batch, sizes, [table[size] for size in sizes]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer updates and repetitions")
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args()
    updates, repetitions = (30, 1) if options.quick else (90, 3)
    console = Console()
    arms = {
        f"{name}, {what}": lambda n=name, s=slow: measured_rate(n, updates, straggler=s)
        for name in GRAPHS
        for what, slow in (("one at half speed", True), ("equal", False))
    }
    results = interleaved(arms, repetitions)
    rates = medians(results)
    rows: list[dict[str, Any]] = []
    table = Table("two workers, batch 128", "lock-step, updates/s", "pool, updates/s", "ratio")
    for what in ("one at half speed", "equal"):
        slow, fast = rates[f"lock-step, {what}"], rates[f"pool, {what}"]
        noise = max(spread(results[f"{name}, {what}"]) for name in GRAPHS)
        rows.append(
            {"measured": what, "lock_step": slow, "pool": fast, "ratio": fast / slow}
            | {"spread": noise}
        )
        table.add_row(what, f"{slow:.2f}", f"{fast:.2f}", f"{fast / slow:.2f} (± {noise:.0%})")
    console.print(table)
    times = round_seconds([2, 4, 8, 16, 32, 64, 128], 3 if options.quick else 9)
    where = "on one core" if fastest_device() == "cpu" else "on the GPU"
    console.print(f"seconds of a round {where}:", {k: round(v, 4) for k, v in times.items()})
    table = Table("devices (simulated)", "pool / lock-step, equal", "with one at half speed")
    for num in (1, 2, 4, 8, 16, 32, 64):
        equal = [1.0] * num
        uneven = [*equal[:-1], 0.5]
        ratios = [pool_rate(times, s) / lock_step_rate(times, s) for s in (equal, uneven)]
        rows.append({"simulated_devices": num, "equal": ratios[0], "one_at_half_speed": ratios[1]})
        table.add_row(str(num), *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    keep(
        "pool",
        rows,
        options.out,
        round_seconds=times,
        repetitions=repetitions,
        simulated_device=fastest_device(),
    )


if __name__ == "__main__":
    main()
