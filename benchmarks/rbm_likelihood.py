"""What each way of taking negatives costs an RBM in exact log-likelihood, on binarised digits.

    python benchmarks/rbm_likelihood.py [--updates 2000] [--num-hidden 10]

Four runs from the same initial weights, with the same optimiser and schedule: the exact gradient
(log Z by enumeration, differentiated), and through the real trainer PCD, PCD with Jarzynski
weights, and CD-1. Prints the exact log-likelihood of the training data under the final weights,
and how far the logged Jarzynski log Z strayed from the exact one.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ebm_dist.config import load
from ebm_dist.data import load_split
from ebm_dist.energies.boltzmann import Rbm
from ebm_dist.export import load_energy
from ebm_dist.learner import learning_rate
from ebm_dist.run import bind, describe, train
from ebm_dist.seeds import derive_seed

SEED = 0
BATCH = 1408


def config(num_hidden: int, updates: int) -> dict[str, Any]:
    return {
        "run": {"name": "rbm", "seed": SEED, "steps": updates},
        "runtime": {"backend": "inline"},
        "data": {"source": "digits", "binarize": "threshold", "batch_size": BATCH, "prefetch": 0},
        "energy": {"name": "rbm", "num_hidden": num_hidden},
        "sampler": {"name": "gibbs", "num_steps": 10},
        "buffer": {"capacity": BATCH, "num_shards": 1, "reinit_prob": 0.0},
        "workers": {"num_workers": 1, "num_chains": BATCH, "num_threads": 1},
        "learner": {
            "lr": 0.01,
            "warmup_steps": 50,
            "schedule": "cosine",
            "final_lr_fraction": 0.01,
            "ema_decay": 0.0,
            "num_threads": 1,
        },
        "flow": {"mode": "sync"},
        "checkpoint": {"every": updates, "keep": 1},
        "tracking": {"wandb": "off", "log_every": 50},
        "evaluation": {"every": 25, "fidelity": False},
    }


def log_z(rbm: Rbm) -> Tensor:
    """Exact log Z by a sum over the hidden side, differentiable."""
    num_hidden = rbm.weight.shape[0]
    h = (torch.arange(2**num_hidden)[:, None] >> torch.arange(num_hidden) & 1).float()
    visible = torch.nn.functional.softplus(rbm.visible_bias + h @ rbm.weight).sum(1)
    return (h @ rbm.hidden_bias + visible).logsumexp(0)


def log_likelihood(rbm: Rbm, x: Tensor) -> float:
    with torch.no_grad():
        return float(-rbm(x).double().mean()) - rbm.log_z()


def exact_gradient(base: dict[str, Any], x: Tensor) -> Rbm:
    """The same updates with log Z known: Adam on the whole training set."""
    run = load(base)
    run = bind(run, describe(run.data))
    rbm = run.energy.build(seed=derive_seed(SEED, "energy"))
    assert isinstance(rbm, Rbm)
    optimizer = torch.optim.Adam(rbm.parameters(), betas=run.learner.betas)
    for step in range(run.run.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.learner, step, run.run.steps)
        loss = rbm(x).mean() + log_z(rbm)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rbm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--num-hidden", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = config(options.num_hidden, options.updates)
    data = load(base).data
    train_x, test_x = load_split(data, "train").x, load_split(data, "test").x
    rows = []
    start = time.monotonic()
    rbm = exact_gradient(base, train_x)
    best = log_likelihood(rbm, train_x)
    rows.append(("exact gradient", best, log_likelihood(rbm, test_x), "", time.monotonic() - start))
    methods: dict[str, list[str]] = {
        "PCD-10": [],
        "PCD-10 + Jarzynski": ["buffer.jarzynski=true"],
        "CD-1": ["buffer.init=data", "buffer.reinit_prob=1.0", "sampler.num_steps=1"],
    }
    for name, overrides in methods.items():
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            start = time.monotonic()
            train(load(base, overrides), run_dir=run_dir, console=Console(quiet=True))
            seconds = time.monotonic() - start
            energy = load_energy(run_dir / "export")
            lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        strayed = [
            abs(row["likelihood/log_z"] - row["likelihood/log_z_exact"])
            for row in map(json.loads, lines)
            if "likelihood/log_z_exact" in row
        ]
        assert isinstance(energy, Rbm)
        worst = f"{max(strayed):.3f}" if strayed else ""
        rows.append(
            (name, log_likelihood(energy, train_x), log_likelihood(energy, test_x), worst, seconds)
        )
    print(
        f"{options.updates} updates of {BATCH}, {options.num_hidden} hidden, {platform.machine()}"
    )
    print(
        f"{'method':20} {'train':>9} {'to exact':>9} {'test':>9} {'log Z off':>10} {'seconds':>8}"
    )
    for name, value, test, off, seconds in rows:
        print(f"{name:20} {value:9.3f} {value - best:9.3f} {test:9.3f} {off:>10} {seconds:8.1f}")


if __name__ == "__main__":
    main()
