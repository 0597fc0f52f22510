"""Completes held-out digits: samples of E(y | x) against a regression network of the same size.

    python benchmarks/completion.py [--seed 0] [--export RUN] [--picture x.png] [--out x.json]

Trains `configs/digits_completion.yaml`, or takes its export, and a perceptron of the same widths
from x to y by least squares. Both complete held-out left parts x. Those of them count as ambiguous
whose ten nearest training x have a second class three times at least. Measures, by a classifier of
whole digits that neither has seen: the share of completed digits that it calls with a confidence of
.9, and the share of ambiguous x of which the samples show both of the two classes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import keep
from rich.console import Console
from torch import Tensor, nn

import ebm_dist
from ebm_dist.config.run_config import load
from ebm_dist.core.types import Batch, EventSpec
from ebm_dist.data import load_split
from ebm_dist.export.reader import open_export
from ebm_dist.report.grid import save_grid

CONFIG = Path(__file__).parents[1] / "configs" / "digits_completion.yaml"
QUIET = ("tracking.wandb=off", "tracking.log_every=100", "evaluation.trace_chains=0")
NUM_SAMPLES = 8
CONFIDENT = 0.9


def whole(batch: Batch) -> Tensor:
    assert batch.condition is not None
    return torch.cat([batch.condition, batch.x], -1)


def fitted(net: nn.Sequential, x: Tensor, y: Tensor, loss: Any, noise: float) -> nn.Sequential:
    """`net` trained from x to y; the weights of the best of 60 epochs on a fifth held out of it."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    apart, rest = order.split([len(x) // 5, len(x) - len(x) // 5])
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    best, weights = float("inf"), net.state_dict()
    for _ in range(60):
        for rows in rest[torch.randperm(len(rest), generator=generator)].split(64):
            noisy = x[rows] + noise * torch.empty_like(x[rows]).normal_(generator=generator)
            optimizer.zero_grad()
            loss(net(noisy), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            value = float(loss(net(x[apart]), y[apart]))
        if value < best:
            best, weights = value, {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(weights)
    return net.eval()


def perceptron(num_in: int, widths: tuple[int, ...], num_out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers += [nn.Linear(num_in, width), nn.SiLU()]
        num_in = width
    return nn.Sequential(*layers, nn.Linear(num_in, num_out))


def ambiguous(train: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the left parts x (N, ...) with two likely classes, and those classes (M, 2)."""
    assert train.condition is not None
    assert train.label is not None
    near = torch.cdist(x.flatten(1), train.condition.flatten(1)).topk(10, largest=False).indices
    counts = F.one_hot(train.label[near], 10).sum(1).sort(1, descending=True)
    rows = (counts.values[:, 1] >= 3).nonzero()[:, 0]
    return rows, counts.indices[rows, :2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", help="the run or export of the config; trained if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    parser.add_argument("--steps", type=int, default=None, help="of each sample's chain")
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    start, run = (
        time.process_time(),
        load(CONFIG, [f"run.seed={options.seed}", *QUIET]),
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.export is None:
            options.export = f"{folder}/run"
            ebm_dist.train(run, run_dir=options.export, console=Console(quiet=True))
        export = open_export(options.export)
    training = time.process_time() - start
    train, test = load_split(run.data, "train"), load_split(run.data, "test")
    assert test.condition is not None
    assert train.condition is not None
    rows, classes = ambiguous(train, test.condition)
    given, answer = test.condition[rows], test.x[rows]

    widths = run.energy.widths  # type: ignore[attr-defined]
    num_in, num_out = given[0].numel(), answer[0].numel()
    regression = fitted(
        perceptron(num_in, widths, num_out), train.condition, train.x.flatten(1), F.mse_loss, 0.03
    )
    classifier = fitted(perceptron(64, (128,), 10), whole(train), train.label, F.cross_entropy, 0.1)
    with torch.no_grad():
        mean = regression(given).reshape(answer.shape)
        seen = classifier(whole(test)).argmax(1)
    repeated = given.repeat_interleave(NUM_SAMPLES, 0)
    drawn, _ = ebm_dist.sample(
        export, len(repeated), condition=repeated, num_steps=options.steps, seed=1
    )

    def measured(x: Tensor, y: Tensor) -> tuple[dict[str, float], Tensor]:
        with torch.no_grad():
            probability = classifier(torch.cat([x, y], -1)).softmax(1)
        near = torch.cdist(torch.cat([x, y], -1).flatten(1), whole(test).flatten(1)).amin(1)
        return {
            "confident": float((probability.amax(1) >= CONFIDENT).float().mean()),
            "distance": float(near.mean()),
            "grey": float((y.abs() < 0.5).float().mean()),
        }, probability.argmax(1)

    found = {
        "held-out digits": measured(given, answer)[0],
        "regression": measured(given, mean)[0],
        "energy": measured(repeated, drawn)[0],
    }
    called = measured(repeated, drawn)[1].reshape(-1, NUM_SAMPLES)
    both = torch.stack([(called == classes[:, k : k + 1]).any(1) for k in (0, 1)]).all(0)
    found["energy"]["both"] = float(both.float().mean())
    found["regression"]["both"] = 0.0  # it has one answer
    accuracy = float((seen == test.label).float().mean())
    print(
        f"{len(rows)} ambiguous of {len(test.x)} held-out left parts; the classifier has "
        f"{accuracy:.1%} of whole held-out digits; {training:.0f} s of CPU for the energy"
    )
    for name, values in found.items():
        print(f"{name:16}", "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    if options.picture is not None:
        shown = torch.cat([both.nonzero()[:, 0], (~both).nonzero()[:, 0]])[:16]
        columns = [torch.cat([given[shown], part[shown]], -1) for part in (answer, mean)]
        samples = torch.cat([repeated, drawn], -1).unflatten(0, (-1, NUM_SAMPLES))[shown]
        pictures = torch.cat([torch.stack(columns, 1), samples], 1).flatten(0, 1)
        spec = EventSpec((1, 8, 8), "image")
        save_grid(pictures, options.picture, spec, num_columns=2 + NUM_SAMPLES)
    keep("completion", [{"what": k, **v} for k, v in found.items()], options.out)


if __name__ == "__main__":
    main()
