"""What a learner's update costs beside its forward, backward and optimiser step.

    python benchmarks/learner.py [--quick] [--out FILE.json]

One rank on the network and shapes of configs/fashion_mnist_pcd.yaml, in turn: `LearnerRank.update`
as the run calls it (the next batch of data, the negatives of two leases, metrics, the finite check,
clipping, a copy of the weights where the model is), DeepSpeed's forward, backward and step alone,
and the same three in plain torch. Two rows say what parts of the difference cost by themselves; the
last two what a second thread of the rank does beside the next update: `LearnerRank.published` (off
the device, into the average, as the wire has it), and Ray's copy into shared memory.

On a CPU with the threads that an asynchronous run gives its rank, half of the cores, and with those
of a synchronous one, which are all: there the thread that reads ahead has no core to itself.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from common import fastest_device, interleaved, keep, keep_memory, medians, seconds, spread
from end_to_end import BATCH, config, write_images
from rich.console import Console
from rich.table import Table

from ebm_dist.actors.learner_rank import LearnerRank
from ebm_dist.config.run_config import RunConfig
from ebm_dist.core.types import Batch, NegativeArrays, Negatives
from ebm_dist.data import describe, prepare
from ebm_dist.run.placement.plan import available_cores
from ebm_dist.run.train import bind

LR = 1e-5


def leases(rng: np.random.Generator) -> list[NegativeArrays]:
    """The negatives of an update as two shards hand them over."""
    half = BATCH // 2
    return [
        NegativeArrays(
            x=rng.uniform(-1, 1, (half, 1, 28, 28)).astype(np.float32),
            energy=np.zeros(half, np.float32),
            version=np.zeros(half, np.int64),
            log_weight=np.zeros(half, np.float32),
        )
        for _ in range(2)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args()
    # Many updates in a row: what was read ahead while another arm ran is cheap for the first few.
    number, repetitions = (5, 5) if options.quick else (30, 10)
    with tempfile.TemporaryDirectory() as directory:
        write_images(Path(directory) / "images", 512)
        prepare("imagefolder", Path(directory) / "shards", Path(directory) / "images")
        measure(Path(directory) / "shards", number, repetitions, options.out)


def measure(source: Path, number: int, repetitions: int, out: Path | None) -> None:
    run = RunConfig.model_validate(config(source, 1))
    run = bind(run, describe(run.data))
    device = fastest_device()
    keep_memory()
    rank = LearnerRank(
        run.learner, run.data, run.energy, run.objective, rank=0, seed=0, device=device
    )
    rank.start(("127.0.0.1", 0))
    negatives = leases(np.random.default_rng(0))
    slices = [(0, BATCH // 2)] * 2
    engine = rank._engine
    wrapped, module = engine._engine, engine._module
    x = (torch.rand(BATCH, 1, 28, 28) * 2 - 1).to(device)
    batch = Batch(x)
    joined = {
        name: torch.from_numpy(np.concatenate([getattr(n, name) for n in negatives])).to(device)
        for name in ("x", "energy", "version", "log_weight")
    }
    negative = Negatives(**joined)
    trainable = [p for p in module.parameters() if p.requires_grad]
    plain = torch.optim.Adam(trainable, lr=LR, fused=True)

    def deepspeed() -> None:
        wrapped.set_gradient_accumulation_boundary(True)
        loss, _ = wrapped(batch, negative, 0)
        wrapped.backward(loss)
        wrapped.step()

    def torch_alone() -> None:
        loss, _ = module(batch, negative, 0)
        loss.backward()
        plain.step()
        plain.zero_grad()

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    flat, packed, outbox = rank.weights(), engine.packed_weights(), rank._outbox
    assert flat is not None
    assert packed is not None
    assert outbox is not None

    def update() -> None:
        rank.update(0, LR, None, slices, *negatives)
        outbox._waiting.clear()  # nobody fetches them

    def published() -> None:
        outbox.add(packed)
        rank.published(False)

    arms: dict[str, Any] = {
        "the run's update": update,
        "DeepSpeed's forward, backward, step": deepspeed,
        "torch's": torch_alone,
        "of it: next batch of data": lambda: rank._data.next_batch(BATCH),
        "of it: a copy of the weights": engine.packed_weights,
        "beside the next: published": published,
        "beside the next: Ray's copy of them": lambda: ray.put(flat),
    }
    cores, rows = available_cores(), []
    for threads in sorted({max(1, cores // 2), cores}) if device == "cpu" else [1]:
        torch.set_num_threads(threads)
        for arm in arms.values():
            arm()
        results = interleaved(
            {name: lambda a=arm: seconds(a, number) for name, arm in arms.items()}, repetitions
        )
        times = medians(results)
        base = times["DeepSpeed's forward, backward, step"]
        what = f"{flat.size / 1e6:.2f}M weights, batch {BATCH} and {BATCH}, {device}"
        table = Table(f"{what}, threads: {threads}", "ms", "of it", "±")
        for name, value in times.items():
            of, noise = value / base, spread(results[name])
            row = {"what": name, "ms": 1e3 * value, "of_the_step": of, "spread": noise}
            rows.append({"threads": threads, **row})
            table.add_row(name, f"{1e3 * value:.2f}", f"{of:.1%}", f"{noise:.0%}")
        Console().print(table)
    rank.close()
    ray.shutdown()
    keep("learner", rows, out, repetitions=repetitions, weights=int(flat.size), device=device)


if __name__ == "__main__":
    main()
