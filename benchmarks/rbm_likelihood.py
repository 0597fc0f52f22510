"""What each way of taking negatives costs an RBM in exact log-likelihood, on binarised digits.

    python benchmarks/rbm_likelihood.py [--updates 1000] [--seeds 0 1 2]

Four runs for each seed, from the same initial weights, with the same optimiser and schedule: the
exact gradient (log Z by enumeration, differentiated), and through the real trainer PCD with
Jarzynski weights, PCD without, and CD-1. Prints the exact log-likelihood of the training data under
the final weights, and how far the logged Jarzynski log Z strayed from the exact one at worst.
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

from ebm_dist.config.run_config import load
from ebm_dist.core.seeds import derive_seed
from ebm_dist.data import load_split
from ebm_dist.energies.closed_form.boltzmann import Rbm
from ebm_dist.export.reader import load_energy
from ebm_dist.learner import learning_rate
from ebm_dist.learner.optimizer import make_optimizer
from ebm_dist.run.train import bind, describe, train

TRAINING_SET = 1442
"""Images: a batch has them all, so that the positive phase has no noise."""

METHODS: dict[str, list[str]] = {
    "PCD + Jarzynski": ["buffer.jarzynski=true"],
    "PCD": [],
    "CD-1": ["buffer.init=data", "buffer.reinit_prob=1.0", "sampler.num_steps=1"],
}


def config(updates: int, seed: int = 0) -> dict[str, Any]:
    """The run of which all methods are variants."""
    num_chains = 8192
    return {
        "run": {"name": "rbm", "seed": seed, "steps": updates},
        "runtime": {"backend": "inline"},
        "data": {
            "source": "digits",
            "binarize": "threshold",
            "batch_size": TRAINING_SET,
            "prefetch": 0,
        },
        "energy": {"name": "rbm", "num_hidden": 10},
        "sampler": {"name": "gibbs", "num_steps": 16},
        "buffer": {
            "capacity": num_chains,
            "num_negatives": num_chains,
            "num_shards": 1,
            "reinit_prob": 0.0,
        },
        "workers": {"num_workers": 1, "num_chains": num_chains, "num_threads": 1},
        # Not Adam: it divides by the size of the gradient, which near the end is the noise of the
        # chains, and then walks at a distance of the optimum that exact gradients do not have.
        "learner": {
            "optimizer": "sgd",
            # The noise of the chains acts over many updates: as many of the same chains are not
            # yet forgotten at the next jump, a large rate with little momentum biases log Z more.
            "lr": 0.03,
            "momentum": 0.97,
            "grad_clip": 0.5,
            "warmup_steps": 300,
            "schedule": "cosine",
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
    """Mean exact log-likelihood of x (N, *event), in nats."""
    with torch.no_grad():
        return float(-rbm(x).double().mean()) - rbm.log_z()


def exact_gradient(base: dict[str, Any], x: Tensor) -> Rbm:
    """The updates of the run `base` with log Z known, on the whole training set x (N, *event)."""
    run = load(base)
    run = bind(run, describe(run.data))
    rbm = run.energy.build(seed=derive_seed(run.run.seed, "energy"))
    assert isinstance(rbm, Rbm)
    optimizer = make_optimizer(run.learner, list(rbm.parameters()))
    for step in range(run.run.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.learner, step, run.run.steps)
        optimizer.zero_grad()
        (rbm(x).mean() + log_z(rbm)).backward()
        if run.learner.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(rbm.parameters(), run.learner.grad_clip)
        optimizer.step()
    return rbm


def trained(base: dict[str, Any], overrides: list[str], run_dir: Path) -> tuple[Rbm, float | None]:
    """What the run of `base` learns, and how far its logged log Z strayed at worst, in nats."""
    train(load(base, overrides), run_dir=run_dir, console=Console(quiet=True))
    energy = load_energy(run_dir / "export")
    assert isinstance(energy, Rbm)
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    strayed = [
        abs(row["likelihood/log_z"] - row["likelihood/log_z_exact"])
        for row in rows
        if "likelihood/log_z_exact" in row
    ]
    return energy, max(strayed, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(config(options.updates)).data
    train_x, test_x = load_split(data, "train").x, load_split(data, "test").x
    print(f"{options.updates} updates, 10 hidden units, {platform.machine()}")
    print(
        f"{'seed':4} {'method':16} {'train':>9} {'to exact':>9} {'test':>9} {'log Z off':>10} "
        f"{'seconds':>8}"
    )

    def show(name: str, rbm: Rbm, best: float | None, off: float | None, start: float) -> float:
        value, test = log_likelihood(rbm, train_x), log_likelihood(rbm, test_x)
        gap = "" if best is None else f"{value - best:.3f}"
        worst = "" if off is None else f"{off:.3f}"
        seconds = time.monotonic() - start
        print(
            f"{seed:4} {name:16} {value:9.3f} {gap:>9} {test:9.3f} {worst:>10} {seconds:8.1f}",
            flush=True,
        )
        return value

    for seed in options.seeds:
        base = config(options.updates, seed)
        start = time.monotonic()
        best = show("exact gradient", exact_gradient(base, train_x), None, None, start)
        for name, overrides in METHODS.items():
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                rbm, off = trained(base, overrides, Path(folder) / "run")
            show(name, rbm, best, off, start)


if __name__ == "__main__":
    main()
