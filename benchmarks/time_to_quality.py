"""Wall-clock to the sample quality that ebmkit's PCD trainer reaches in 15 minutes.

    python benchmarks/time_to_quality.py CONFIG --peer-python PYTHON [--minutes 15] [--out FILE]

CONFIG is a run of ours, such as configs/fashion_mnist_pcd.yaml; the peer knows no labels. It trains
the same network on the same data with the same recipe: batch, optimiser, clipping, buffer, sampler,
energy_l2 and data noise are read from CONFIG; its trainer has no learning-rate schedule, so it is
given a cosine over its whole time, as ours has over its own. Each gets the machine for itself, one
after the other. Quality is the Frechet distance of `num_samples` of the buffer's chains to held-out
data, by one feature network of `ebm_dist.evaluation`, computed afterwards, off everybody's clock.
Ours runs from the first update and includes the run's own evaluations and checkpoints, which the
chains are read from.

PYTHON is an interpreter that has ebmkit, torch, einops and pydantic.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]

NUM_POINTS = 45
"""Of each curve: points scatter, and the best of more of them would be better by that alone."""


def peer(recipe: dict[str, Any], data: torch.Tensor, seconds: float, out: Path) -> None:
    """Train with ebmkit for `seconds`; write chains at equal intervals. Runs in its interpreter."""
    import ebm

    from ebm_dist import energies

    torch.manual_seed(recipe["seed"])
    energy = energies.make(**recipe["energy"])
    sampler = ebm.LangevinDynamics(**recipe["sampler"])
    buffer = ebm.ReplayBuffer(
        recipe["capacity"],
        tuple(data.shape[1:]),
        reinit_prob=recipe["reinit_prob"],
        init_fn=lambda shape: torch.rand(shape) * 2 - 1,
    )
    loss = ebm.ContrastiveDivergence(sampler, buffer, energy_reg=recipe["energy_l2"])
    lr = recipe["lr"]
    optimizer = torch.optim.Adam(energy.parameters(), lr=lr, betas=tuple(recipe["betas"]))
    taken: list[np.ndarray] = []
    times: list[float] = []
    start = time.monotonic()
    every = seconds / NUM_POINTS

    class Stop(Exception):
        pass

    def callback(step: int, output: Any) -> None:
        now = time.monotonic() - start
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * lr * (1 + math.cos(math.pi * min(now / seconds, 1.0)))
        if now >= every * (len(times) + 1):
            times.append(now)
            taken.append(buffer.data[: recipe["num_samples"]].numpy().copy())
        if now >= seconds:
            np.savez(out, chains=np.stack(taken), times=np.array(times), updates=step)
            raise Stop

    class Noisy:
        """Batches of the data with the recipe's noise."""

        def __iter__(self) -> Any:
            while True:
                x = data[torch.randint(len(data), (recipe["batch_size"],))]
                if recipe["flip"]:
                    flipped = torch.rand(len(x), 1, 1, 1) < 0.5
                    x = torch.where(flipped, x.flip(-1), x)
                yield x + recipe["noise_std"] * torch.randn_like(x)

    trainer = ebm.Trainer(
        energy,
        loss,
        optimizer,
        device="cpu",
        ema_decay=recipe["ema_decay"],
        grad_clip_norm=recipe["grad_clip"],
        callback=callback,
    )
    try:
        trainer.fit(Noisy(), steps=10**9, verbose=False)
    except Stop:
        return


def recipe_of(config: Any) -> dict[str, Any]:
    """What the peer is told, from a bound RunConfig."""
    sampler = config.sampler
    return {
        "seed": config.run.seed,
        "energy": config.energy.model_dump(mode="json"),
        "sampler": {
            "step_size": sampler.step_size,
            "steps": sampler.num_steps,
            "noise_scale": sampler.build().noise_std,
            "grad_clip": sampler.grad_clip,
            "clamp": sampler.clamp,
        },
        "capacity": config.buffer.capacity,
        "reinit_prob": config.buffer.reinit_prob,
        "energy_l2": config.objective.energy_l2,
        "lr": config.learner.lr,
        "betas": config.learner.betas,
        "ema_decay": config.learner.ema_decay,
        "grad_clip": config.learner.grad_clip,
        "batch_size": config.data.batch_size,
        "noise_std": config.data.noise_std,
        "flip": config.data.flip,
        "num_samples": config.evaluation.num_samples,
    }


def peer_curve(
    python: str, recipe: dict[str, Any], data: torch.Tensor, minutes: float, fidelity: Any
) -> tuple[list[tuple[float, float]], int]:
    """(seconds, distance) pairs, and the number of updates that the peer made."""
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory) / name for name in ("recipe.json", "data.npy", "out.npz")}
        files["recipe.json"].write_text(json.dumps(recipe))
        np.save(files["data.npy"], data.numpy())
        subprocess.run(
            [python, __file__, "--peer", *map(str, files.values()), str(60 * minutes)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        with np.load(files["out.npz"], allow_pickle=False) as kept:
            chains, times, updates = kept["chains"], kept["times"], int(kept["updates"])
    return [
        (float(t), fidelity.distance(torch.from_numpy(x).clamp(-1, 1)))
        for t, x in zip(times, chains)
    ], updates


def our_curve(
    path: Path, overrides: list[str], num_updates: int, num: int, fidelity: Any
) -> tuple[list[tuple[float, float]], int]:
    """The same of `ebm-dist train`, whose chains are those of its checkpoints."""
    from ebm_dist.checkpoint.files import open_checkpoint

    with tempfile.TemporaryDirectory() as directory:
        run_dir = f"{directory}/run"
        command = [sys.executable, "-m", "ebm_dist", "train", str(path), *overrides]
        every = max(1, num_updates // NUM_POINTS)
        command += [f"checkpoint={{every: {every}, keep: 1000}}", "tracking.wandb=off"]
        subprocess.run(
            [*command, "--run-dir", run_dir],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        curve, started = [], None
        for cut in sorted(Path(run_dir, "checkpoints").glob("step_*")):
            opened, written = open_checkpoint(cut), cut.stat().st_mtime
            started = started or written  # of update 0, before the first one
            shards = [opened.arrays(n) for n in opened.names if n.startswith("shard")]
            # Of all shards alike: one alone may hold a part of the modes.
            x = np.concatenate([s["position"][: num // len(shards)] for s in shards])
            distance = fidelity.distance(torch.from_numpy(x).clamp(-1, 1))
            curve.append((written - started, distance))
        return curve, opened.step


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--peer":
        recipe, data, out, seconds = sys.argv[2:]
        loaded = torch.from_numpy(np.load(data, allow_pickle=False))
        peer(json.loads(Path(recipe).read_text()), loaded, float(seconds), Path(out))
        return
    from common import keep
    from rich.console import Console
    from rich.table import Table

    from ebm_dist.config.run_config import load
    from ebm_dist.data import describe, load_split
    from ebm_dist.evaluation.fidelity import Fidelity
    from ebm_dist.run.train import bind

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="a config of ours, with evaluation.every")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, for our run alone")
    parser.add_argument("--peer-python", required=True, help="an interpreter that has ebmkit")
    parser.add_argument("--minutes", type=float, default=15.0, help="that the peer has")
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    options = parser.parse_args()
    config = load(options.config)
    num_updates = load(options.config, options.overrides).run.steps
    spec = describe(config.data)
    config = bind(config, spec)
    train, test = load_split(config.data, "train"), load_split(config.data, "test")
    fidelity = Fidelity.fit(train, test, spec, config.run.seed)
    console = Console()
    num = config.evaluation.num_samples
    ours, our_updates = our_curve(options.config, options.overrides, num_updates, num, fidelity)
    rows: list[dict[str, Any]] = [{"who": "ebm_dist", "updates": our_updates, "curve": ours}]
    recipe = recipe_of(config)
    curve, updates = peer_curve(options.peer_python, recipe, train.x, options.minutes, fidelity)
    rows.append({"who": "ebmkit", "updates": updates, "curve": curve})
    # Its best point, not its last: a peer that ran away late is not held to that.
    best = min(distance for _, distance in curve)
    reached = next((t for t, distance in ours if distance <= best), None)
    table = Table("who", "updates", "last point at, s", "best distance", "last distance")
    for row in rows:
        points = row["curve"]
        table.add_row(
            row["who"],
            str(row["updates"]),
            f"{points[-1][0]:.0f}",
            f"{min(d for _, d in points):.2f}",
            f"{points[-1][1]:.2f}",
        )
    console.print(table)
    share = None if reached is None else reached / (60 * options.minutes)
    console.print(
        f"ebmkit's best in {options.minutes:g} min is {best:.2f}; ebm_dist "
        + ("did not reach it" if share is None else f"reached it in {reached:.0f} s ({share:.0%})")
    )
    keep("time_to_quality", rows, options.out, share=share, config=str(options.config))


if __name__ == "__main__":
    main()
