"""Sample quality over time on Fashion-MNIST: two recipes of ours and two trainers of ebmkit.

    python benchmarks/pictures.py DIR --peer-python PYTHON [--minutes 10] [--seeds 0 1] [--out FILE]

Each arm has the machine for itself for the same minutes, one after the other: chains down the noise
levels (configs/fashion_mnist.yaml), persistent chains (configs/fashion_mnist_pcd.yaml, as a sync
run in one process), ebmkit's PCD trainer with the recipe of the latter, and ebmkit's diffusion
recovery likelihood with the network of the former. No arm knows labels. The schedule of each falls
to zero over its minutes; ours is given as many updates as a short run before it shows to fit.
Quality is measured afterwards, off everybody's clock: the Frechet distance of 500 samples
to held-out images by one feature network for all arms and seeds, and the shares of classes and of
confident calls by a classifier that no run ever saw (judge.py). DIR keeps what the arms made and
that classifier; an arm that is there is not run again.

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
from time_to_quality import ROOT, recipe_of
from torch import Tensor, nn

NUM_POINTS, NUM_SAMPLES = 10, 500
LEVELS, CHAINS = ROOT / "configs/fashion_mnist.yaml", ROOT / "configs/fashion_mnist_pcd.yaml"
IN_PROCESS = (
    "runtime.backend=inline",
    "flow.mode=sync",
    "workers.num_workers=1",
    "workers.num_chains=64",
    "buffer.num_shards=1",
)
RECOVERY = {"num_levels": 10, "noise_stds": [0.05, 1.5], "num_steps": 15, "lr": 1e-3}
"""Steps as published for CIFAR-10 (Zhu et al. 2024), levels as ebmkit advises: from about the scale
of the data, each 1.5 times the one below. The published rate of 1e-4 is for days."""

Point = tuple[float, Tensor]  # seconds since the first update, samples (N, C, H, W)


def recovery_network(recipe: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The network of ours as ebmkit calls one, energy(x, sigma), and its levels, falling."""
    from ebm_dist import energies

    network = energies.make(**recipe["energy"])
    rising = torch.tensor(network.noise_stds)

    class BySigma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.network(x, level=torch.searchsorted(rising, sigma * 0.999))

    return BySigma(), rising.flip(0)


def recovery(recipe: dict[str, Any], data: Tensor, seconds: float, out: Path) -> None:
    """ebmkit's diffusion recovery likelihood for `seconds`, in its interpreter; keeps averages."""
    from ebm.losses.drl import DiffusionRecoveryLikelihood

    torch.manual_seed(recipe["seed"])
    energy, sigmas = recovery_network(recipe)
    loss = DiffusionRecoveryLikelihood(sigmas, mcmc_steps=recipe["num_steps"])
    optimizer = torch.optim.Adam(energy.parameters(), lr=recipe["lr"], betas=(0.9, 0.999))
    average = torch.optim.swa_utils.AveragedModel(
        energy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    kept: dict[str, np.ndarray] = {}
    times: list[float] = []

    def keep_average(now: float) -> None:
        for name, value in average.module.state_dict().items():
            kept[f"{len(times)}/{name}"] = value.numpy().copy()
        times.append(now)

    start, step = time.monotonic(), 0
    while (now := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * recipe["lr"] * (1 + math.cos(math.pi * now / seconds))
        x = data[torch.randint(len(data), (recipe["batch_size"],))]
        optimizer.zero_grad()
        loss(energy, x).loss.backward()
        optimizer.step()
        average.update_parameters(energy)
        step += 1
        if now >= seconds / NUM_POINTS * (len(times) + 1):
            keep_average(now)
    keep_average(seconds)
    np.savez(out, times=np.array(times), updates=step, **kept)


def draw(recipe: dict[str, Any], shape: tuple[int, ...], averages: Path, out: Path) -> None:
    """Draw samples from every average that `recovery` kept, in ebmkit's interpreter."""
    from ebm.losses.drl import drl_sample

    torch.manual_seed(recipe["seed"])
    energy, sigmas = recovery_network(recipe)
    chains = []
    with np.load(averages, allow_pickle=False) as kept:
        for index in range(len(kept["times"])):
            names = energy.state_dict()
            state = {name: torch.from_numpy(kept[f"{index}/{name}"]) for name in names}
            energy.load_state_dict(state)
            steps = recipe["num_steps"]
            drawn = drl_sample(energy, sigmas, NUM_SAMPLES, shape, mcmc_steps=steps)
            chains.append(drawn.numpy())
        times, updates = kept["times"], kept["updates"]
    np.savez(out, chains=np.stack(chains), times=times, updates=updates)


def of_peer(
    kind: str, python: str, recipe: dict[str, Any], data: Tensor, minutes: float, out: Path
) -> None:
    """Run one of ebmkit's trainers, which writes chains.npz or averages.npz into `out`."""
    files = [out / "recipe.json", out / "data.npy", out / "chains.npz"]
    script = str(ROOT / "benchmarks/time_to_quality.py")
    if kind == "recovery":
        files[2], script = out / "averages.npz", __file__
    files[0].write_text(json.dumps(recipe))
    np.save(files[1], data.numpy())
    run_peer(python, script, "--peer", *map(str, files), str(60 * minutes))
    files[1].unlink()


def run_peer(python: str, script: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    subprocess.run([python, script, *arguments], check=True, env=environment)


def of_ours(config: Path, overrides: list[str], minutes: float, out: Path) -> None:
    """Run `ebm-dist train` in `out`/run, with checkpoints along its curve."""

    def train(name: str, num_updates: int, every: int) -> float:
        run_dir = out / name
        command = [sys.executable, "-m", "ebm_dist", "train", str(config), *overrides]
        command += [f"run.steps={num_updates}", "tracking.wandb=off", "evaluation.every=null"]
        command += [f"checkpoint={{every: {every}, keep: 1000}}", "--run-dir", str(run_dir)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        first, *_, last = sorted(run_dir.glob("checkpoints/step_*"))
        return last.stat().st_mtime - first.stat().st_mtime

    # The first updates are slower: they allocate, and compile where the sampler does.
    rate = 150 / train("probe", 150, 150)
    num_updates = int(rate * 60 * minutes)
    train("run", num_updates, num_updates // NUM_POINTS)


def points_of(arm: Path, python: str, shape: tuple[int, ...]) -> tuple[list[Point], int]:
    """The samples that an arm had, with the seconds since its first update; and its updates."""
    from ebm_dist.checkpoint.files import open_checkpoint

    if (arm / "averages.npz").exists() and not (arm / "chains.npz").exists():
        files = [arm / name for name in ("recipe.json", "averages.npz", "chains.npz")]
        run_peer(python, __file__, "--draw", json.dumps(shape), *map(str, files))
    if (arm / "chains.npz").exists():
        with np.load(arm / "chains.npz", allow_pickle=False) as kept:
            pairs = [(float(t), torch.from_numpy(x)) for t, x in zip(kept["times"], kept["chains"])]
            return pairs, int(kept["updates"])
    cuts = sorted((arm / "run").glob("checkpoints/step_*"))
    opened = [open_checkpoint(cut) for cut in cuts]
    started = cuts[0].stat().st_mtime  # of update 0, before the first one
    times = [cut.stat().st_mtime - started for cut in cuts]
    samples = [samples_of(arm / "run", one) for one in opened[1:]]
    return list(zip(times[1:], samples)), opened[-1].step


def samples_of(run_dir: Path, opened: Any) -> Tensor:
    """The chains of the buffer, of all shards alike; without one, new samples of the averaged
    weights."""
    import ebm_dist
    from ebm_dist.export.writer import export_run

    if shards := [opened.arrays(n) for n in opened.names if n.startswith("shard")]:
        share = NUM_SAMPLES // len(shards)
        return torch.from_numpy(np.concatenate([s["position"][:share] for s in shards]))
    with tempfile.TemporaryDirectory() as out:
        export_run(run_dir, Path(out) / "export", found=opened)
        return ebm_dist.sample(Path(out) / "export", NUM_SAMPLES)[0]


def run_arm(
    name: str, source: str, seed: int, options: argparse.Namespace, spec: Any, data: Tensor
) -> Path:
    """The folder of what one arm made in its time."""
    from ebm_dist.config.run_config import load
    from ebm_dist.run.train import bind

    ours, out = [source, f"run.seed={seed}"], options.dir.resolve() / f"{name}_{seed}"
    if out.exists():
        return out
    out.mkdir(parents=True)
    if name in ("levels", "chains"):
        config, more = (LEVELS, []) if name == "levels" else (CHAINS, IN_PROCESS)
        of_ours(config, [*ours, *more], options.minutes, out)
        return out
    recipe = recipe_of(bind(load(CHAINS, ours), spec))
    if name == "recovery":
        levels = bind(load(LEVELS, ours), spec)
        network = levels.energy.model_dump(mode="json")
        recipe = {
            "seed": seed,
            "energy": network | {key: RECOVERY[key] for key in ("num_levels", "noise_stds")},
            "batch_size": levels.data.batch_size,
            **{key: RECOVERY[key] for key in ("num_steps", "lr")},
        }
    of_peer(name, options.peer_python, recipe, data, options.minutes, out)
    return out


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--peer":
        recipe, data, out, seconds = sys.argv[2:]
        loaded = torch.from_numpy(np.load(data, allow_pickle=False))
        recovery(json.loads(Path(recipe).read_text()), loaded, float(seconds), Path(out))
        return
    if len(sys.argv) > 1 and sys.argv[1] == "--draw":
        shape, recipe, averages, out = sys.argv[2:]
        content = json.loads(Path(recipe).read_text())
        draw(content, tuple(json.loads(shape)), Path(averages), Path(out))
        return
    import judge
    from common import keep
    from rich.console import Console
    from rich.table import Table

    from ebm_dist.config.run_config import load
    from ebm_dist.data import describe, load_split
    from ebm_dist.evaluation.fidelity import Fidelity, of_logits
    from ebm_dist.report.grid import save_grid

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path, help="keeps what the arms made")
    parser.add_argument("--peer-python", required=True, help="an interpreter that has ebmkit")
    parser.add_argument("--data", default="data/fashion-mnist", help="its shards")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=["levels", "chains", "pcd", "recovery"])
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    parser.add_argument("--run-only", action="store_true", help="measure nothing yet")
    options = parser.parse_args()
    source = f"data.source={options.data}"
    data = load(LEVELS, [source]).data
    spec = describe(data)
    train, test = load_split(data, "train"), load_split(data, "test")
    console = Console()
    made: list[tuple[str, int, Path]] = []
    for seed in options.seeds:
        for name in options.arms:
            console.print(f"{name}, seed {seed}")
            made.append((name, seed, run_arm(name, source, seed, options, spec, train.x)))
    if options.run_only:
        return
    fidelity = Fidelity.fit(train, test, spec, 0)
    net = judge.kept(options.dir / "judge.safetensors", train)
    real = of_logits(judge.logits_of(net, test.x), test.label)
    console.print(f"held-out images by the judge: {real}")
    rows: list[dict[str, Any]] = []
    for name, seed, folder in made:
        points, updates = points_of(folder, options.peer_python, spec.shape)
        shown = [(t, x.clamp(-1, 1)) for t, x in points]
        last = shown[-1][1]
        row = {
            "arm": name,
            "seed": seed,
            "updates": updates,
            "curve": [(t, fidelity.distance(x)) for t, x in shown],
            "last": fidelity.measure(last) | of_logits(judge.logits_of(net, last)),
        }
        rows.append(row)
        console.print(row)
        save_grid(last[:100], folder / "samples.png", spec)
    table = Table("arm", "seed", "updates", *[f"{k + 1}/{NUM_POINTS}" for k in range(NUM_POINTS)])
    for row in rows:
        curve = [f"{distance:.1f}" for _, distance in row["curve"]]
        table.add_row(row["arm"], str(row["seed"]), str(row["updates"]), *curve[:NUM_POINTS])
    console.print(table)
    keep("pictures", rows, options.out, real=real)


if __name__ == "__main__":
    main()
