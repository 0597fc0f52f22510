"""Updates a second of a whole training run: on Ray, in one process, and by a plain PCD loop.

    python benchmarks/end_to_end.py [--quick] [--out FILE.json]

Fashion-MNIST shapes (1x28x28), the network of configs/fashion_mnist_pcd.yaml, K=40, batch 64, fp32,
the same cores for all, or the same GPU where torch finds one. The plain loop is that of JEM, well
written: data and buffer in memory, one gradient in x a step, two forwards and Adam an update; it
logs, saves and averages nothing.

Ours runs blocks of steps, `sampler.engine: compiled`, which `auto` comes to after two minutes;
what is measured is the second half of each run, when they are compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import fastest_device, interleaved, keep, medians, spread, wait
from PIL import Image
from rich.console import Console
from rich.table import Table

from ebm_dist import energies
from ebm_dist.data import prepare

NUM_STEPS, BATCH, CAPACITY = 40, 64, 2000
ENERGY = {"name": "resnet", "width": 24, "multipliers": [1, 2, 4], "stem_stride": 2}
STEP_SIZE, NOISE_STD, CLIP = 10.0, 0.01, 0.03


def config(source: Path, updates: int) -> dict[str, Any]:
    return {
        "run": {"name": "end_to_end", "seed": 0, "steps": updates},
        "data": {"source": str(source), "batch_size": BATCH},
        "energy": ENERGY,
        "sampler": {
            "name": "langevin",
            "step_size": STEP_SIZE,
            "noise_std": NOISE_STD,
            "grad_clip": CLIP,
            "num_steps": NUM_STEPS,
            "engine": "compiled",
        },
        "objective": {"name": "contrastive", "energy_l2": 0.1},
        "buffer": {"capacity": CAPACITY, "num_shards": 2, "reinit_prob": 0.05},
        "learner": {"lr": 1e-5},
        "checkpoint": {"every": 10 * updates},
        "tracking": {"wandb": "off", "log_every": 5},
        "evaluation": {"every": None},
    }


GRAPHS: dict[str, dict[str, dict[str, Any]]] = {
    "inline": {
        "runtime": {"backend": "inline"},
        "workers": {"num_workers": 1, "num_chains": BATCH},
        "flow": {"mode": "sync"},
    },
    "ray, async": {
        "runtime": {"backend": "ray", "address": "local"},
        "workers": {"num_workers": 2, "num_chains": BATCH // 2},
        "flow": {"mode": "async", "max_lag": 2},
    },
    "ray, sync": {
        "runtime": {"backend": "ray", "address": "local"},
        "workers": {"num_workers": 2, "num_chains": BATCH // 2, "num_threads": 1},
        "flow": {"mode": "sync"},
    },
}


def graph_rate(name: str, source: Path, updates: int) -> float:
    """Updates a second of `ebm-dist train` in its second half."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        # A JSON document is a YAML one.
        path.write_text(json.dumps(config(source, updates) | GRAPHS[name]))
        command = [sys.executable, "-m", "ebm_dist", "train", str(path), "--run-dir"]
        done = subprocess.run([*command, f"{directory}/run"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr or done.stdout}")
        rows = [json.loads(x) for x in (Path(directory) / "run/metrics.jsonl").open()]
        if "compiled runs blocks" not in (Path(directory) / "run/run.log").read_text():
            raise SystemExit(f"{name}: nothing was compiled")
    rates = [r["throughput/updates_per_s"] for r in rows if r["step"] > updates // 2]
    # Windows hold equal numbers of updates: their mean rate is the harmonic one.
    return len(rates) / sum(1 / rate for rate in rates)


def plain_loop_rate(data: torch.Tensor, updates: int) -> float:
    """The same of the loop that one would write."""
    device = torch.device(fastest_device())
    data = data.to(device)
    generator = torch.Generator(device).manual_seed(0)
    on_it: dict[str, Any] = {"generator": generator, "device": device}
    energy = energies.make(**ENERGY, event_shape=(1, 28, 28)).to(device)
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-5)
    buffer = torch.rand(CAPACITY, 1, 28, 28, **on_it) * 2 - 1
    start = time.perf_counter()
    for update in range(updates):
        if update == updates // 2:
            wait()
            start = time.perf_counter()
        index = torch.randint(CAPACITY, (BATCH,), **on_it)
        x = buffer[index]
        fresh = torch.rand(BATCH, **on_it) < 0.05
        x[fresh] = torch.rand(int(fresh.sum()), 1, 28, 28, **on_it) * 2 - 1
        energy.eval()
        x.requires_grad_(True)
        for _ in range(NUM_STEPS):
            (grad,) = torch.autograd.grad(energy(x).sum(), x)
            noise = torch.randn(x.shape, **on_it)
            x.data += -STEP_SIZE * grad.clamp(-CLIP, CLIP) + NOISE_STD * noise
        x = x.detach()
        buffer[index] = x
        energy.train()
        positive = energy(data[torch.randint(len(data), (BATCH,), **on_it)])
        negative = energy(x)
        magnitude = positive.square().mean() + negative.square().mean()
        loss = positive.mean() - negative.mean() + 0.1 * magnitude
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wait()
    return (updates - updates // 2) / (time.perf_counter() - start)


def write_images(folder: Path, num: int) -> torch.Tensor:
    """`num` smooth 28x28 images as files; the same as a tensor (num, 1, 28, 28) in [-1, 1]."""
    (folder / "only").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = []
    for index in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7), dtype=np.uint8))
        image = coarse.resize((28, 28), Image.Resampling.BICUBIC)
        image.save(folder / "only" / f"{index:05d}.png")
        images.append(np.asarray(image, np.float32) / 127.5 - 1)
    return torch.from_numpy(np.stack(images))[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer updates and repetitions")
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args()
    updates, repetitions = (90, 1) if options.quick else (120, 5)
    # A run's parts share the cores out by themselves; a limit from outside would bind only some.
    os.environ.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryDirectory() as directory:
        data = write_images(Path(directory) / "images", 512)
        source = Path(directory) / "shards"
        prepare("imagefolder", source, Path(directory) / "images")
        arms = {name: lambda n=name: graph_rate(n, source, updates) for name in GRAPHS}
        arms["plain loop"] = lambda: plain_loop_rate(data, updates)
        results = interleaved(arms, repetitions)
    rates = medians(results)
    table = Table("run", "updates/s", "± half range", "of inline", "of the plain loop")
    rows = []
    for name, rate in rates.items():
        row = {
            "run": name,
            "updates_per_s": rate,
            "spread": spread(results[name]),
            "of_inline": rate / rates["inline"],
            "of_plain_loop": rate / rates["plain loop"],
        }
        rows.append(row)
        table.add_row(
            name,
            f"{rate:.3f}",
            f"{row['spread']:.0%}",
            f"{row['of_inline']:.2f}",
            f"{row['of_plain_loop']:.2f}",
        )
    Console().print(table)
    keep(
        "end_to_end",
        rows,
        options.out,
        repetitions=repetitions,
        updates=updates,
        device=fastest_device(),
    )


if __name__ == "__main__":
    main()
