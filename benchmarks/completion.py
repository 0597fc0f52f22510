"""Completes held-out digits: samples of E(y | x) against a regression network of the same size.

    python benchmarks/completion.py [--seed 0] [--export RUN] [--picture x.png] [--out x.json]

Trains `configs/digits_completion.yaml`, or takes its export, and a perceptron of the same widths
from x to y by least squares. Both complete held-out left parts x. Those of them count as ambiguous
whose ten nearest training x have a second class three times at least. A classifier of whole digits
judges the completed digits; no model is trained by it. Each figure is a mean over ambiguous x, with
its standard error:

    confident  share of completed digits that the classifier gives a class with probability .9
    likely     the same, and the class is one of the two of x
    both       share of x with such a sample of each of the two; a single answer shows one at most
    distance   |y - true y|, the mean of the samples of x
    best       the same, of the nearest sample of x
    grey       share of the pixels of y within [-.5, .5]

"shuffled" joins each x with the samples of another x. Samples that do not depend on their condition
would do as well so.
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
from ebm_dist.core.types import Batch
from ebm_dist.data import load_split
from ebm_dist.export.reader import Export, open_export
from ebm_dist.report.grid import save_grid

CONFIG = Path(__file__).parents[1] / "configs" / "digits_completion.yaml"
QUIET = ("tracking.wandb=off", "tracking.log_every=100", "evaluation.trace_chains=0")
NUM_SAMPLES = 8
NUM_SHOWN = 16
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


def another(num: int) -> Tensor:
    """For each of `num` rows another one, each of them once."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    others = torch.empty_like(order)
    others[order] = order.roll(1)
    return others


def measured(
    classifier: nn.Module, x: Tensor, y: Tensor, classes: Tensor, answer: Tensor
) -> dict[str, Tensor]:
    """Each measure for each left part, (M,).

    Args:
        x: left parts (M, ...), of which `classes` (M, 2) are the likely classes.
        y: S completions of each, (M, S, ...).
        answer: the true right parts (M, ...).
    """
    digits = torch.cat([x[:, None].expand(-1, y.shape[1], -1, -1, -1), y], -1)
    with torch.no_grad():
        probability = classifier(digits.flatten(0, 1)).softmax(1).unflatten(0, y.shape[:2])
    sure = probability >= CONFIDENT  # (M, S, 10), of one class at most
    likely = sure.gather(2, classes[:, None].expand(-1, y.shape[1], -1))
    apart = (y - answer[:, None]).flatten(2).norm(dim=2)
    return {
        "confident": sure.any(2).float().mean(1),
        "likely": likely.any(2).float().mean(1),
        "both": likely.any(1).all(1).float(),
        "distance": apart.mean(1),
        "best": apart.amin(1),
        "grey": (y.abs() < 0.5).float().flatten(1).mean(1),
    }


def summary(values: dict[str, Tensor]) -> dict[str, Any]:
    """The mean of each measure, and their standard errors by the same names under `error`."""
    errors = {name: float(value.std() / len(value) ** 0.5) for name, value in values.items()}
    return {**{name: float(value.mean()) for name, value in values.items()}, "error": errors}


def trained(seed: int, folder: str) -> tuple[str, float]:
    """Trains the config in `folder`; returns that and the seconds of processor time."""
    start = time.process_time()
    run = load(CONFIG, [f"run.seed={seed}", *QUIET])
    ebm_dist.train(run, run_dir=folder, console=Console(quiet=True))
    return folder, time.process_time() - start


def draw_grid(path: Path, export: Export, given: Tensor, *columns: Tensor) -> None:
    """A row for each of the first left parts (M, ...): its completions (M, S, ...), in columns."""
    shown = torch.cat([column[:NUM_SHOWN] for column in columns], 1)
    left = given[: len(shown)].repeat_interleave(shown.shape[1], 0)
    save_grid(shown.flatten(0, 1), path, export.spec, num_columns=shown.shape[1], condition=left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", help="the run or export of the config; trained if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the regression")
    parser.add_argument("--steps", type=int, default=None, help="of each sample's chain")
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, cpu_s = options.export, None
        if path is None:
            path, cpu_s = trained(options.seed, f"{folder}/run")
        export = open_export(path)
    run = load(CONFIG)
    train, test = load_split(run.data, "train"), load_split(run.data, "test")
    assert train.condition is not None
    assert test.condition is not None
    rows, classes = ambiguous(train, test.condition)
    given, answer = test.condition[rows], test.x[rows]

    torch.manual_seed(0)  # every seed of a run has the same judge
    classifier = fitted(perceptron(64, (128,), 10), whole(train), train.label, F.cross_entropy, 0.1)
    torch.manual_seed(options.seed)
    widths = run.energy.widths  # type: ignore[attr-defined]
    regression = perceptron(given[0].numel(), widths, answer[0].numel())
    fitted(regression, train.condition, train.x.flatten(1), F.mse_loss, run.data.noise_std)
    with torch.no_grad():
        mean = regression(given).reshape(answer.shape)[:, None]
        accuracy = float((classifier(whole(test)).argmax(1) == test.label).float().mean())
    repeated = given.repeat_interleave(NUM_SAMPLES, 0)
    drawn, _ = ebm_dist.sample(
        export, len(repeated), condition=repeated, num_steps=options.steps, seed=1
    )
    drawn = drawn.unflatten(0, (-1, NUM_SAMPLES))
    completions = {
        "held-out digits": answer[:, None],
        "regression": mean,
        "energy": drawn,
        "shuffled": drawn[another(len(drawn))],
    }
    found = {
        name: measured(classifier, given, y, classes, answer) for name, y in completions.items()
    }
    unsure = float((found["energy"]["both"] * (1 - found["regression"]["confident"])).mean())
    print(
        f"{len(rows)} ambiguous of {len(test.x)} held-out left parts; the classifier has "
        f"{accuracy:.1%} of whole held-out digits"
        + ("" if cpu_s is None else f"; {cpu_s:.0f} s of CPU for the energy")
    )
    kept = [{"what": name, **summary(values)} for name, values in found.items()]
    for row in kept:
        shares = (f"{key} {row[key]:.3f} ({error:.3f})" for key, error in row["error"].items())
        print(f"{row['what']:16}", "  ".join(shares))
    print(f"both, where the regression is confident of neither: {unsure:.3f}")
    if options.picture is not None:
        draw_grid(options.picture, export, given, answer[:, None], mean, drawn)
    keep("completion", kept, options.out, both_where_regression_is_unsure=unsure)


if __name__ == "__main__":
    main()
