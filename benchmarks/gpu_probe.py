"""The parts of `gpu_check.py` that are more than a command: each runs here, in its own process.

python benchmarks/gpu_probe.py images OUT | zero | samplers | fashion OUT [--device cpu]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def write_images(out: Path, side: int, num: int = 1024) -> None:
    """Shards of pictures of one bright bar, of ten classes: where there is no data set."""
    import numpy as np
    from PIL import Image

    from ebm_dist.data import prepare

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", num), ("test", num // 4)):
            for index in range(count):
                label = index % 10
                x = rng.integers(0, 40, (side, side), dtype=np.uint8)
                at = label % 5 * side // 5
                bar = np.s_[at : at + side // 5 + 1]
                x[(bar, slice(None)) if label < 5 else (slice(None), bar)] += 200
                path = Path(folder, split, str(label), f"{index}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(x).save(path)
        prepare("imagefolder", out, folder)


def zero(device: str) -> None:
    """ZeRO-2 in bf16 beside ZeRO-0, one rank: NCCL refuses two on one GPU, and a run of one rank
    shards nothing, so the stage is forced."""
    import torch

    from ebm_dist import energies, objectives
    from ebm_dist.core.types import Batch, Negatives
    from ebm_dist.learner.config import LearnerConfig
    from ebm_dist.learner.engine import LearnerEngine

    ends = []
    for stage in (0, 2):

        class Forced(LearnerEngine):
            zero_stage = property(lambda self, stage=stage: stage, lambda self, value: None)

        energy = energies.FAMILY.section(
            "resnet", event_shape=(1, 8, 8), width=16, spectral_norm=True
        ).build(seed=0)
        noise = torch.Generator().manual_seed(0)
        config = LearnerConfig(precision="bf16", zero_stage=stage, accumulation=2)
        with Forced(config, energy, objectives.make("contrastive"), device=device) as engine:
            # Left out for a single rank, which has nothing to reduce; sharding goes by it.
            engine._engine.enable_backward_allreduce = stage > 0
            for step in range(20):
                x, y = (torch.randn(64, 1, 8, 8, generator=noise) for _ in range(2))
                none = torch.zeros(64)
                told = engine.update(
                    Batch(x, None), Negatives(y, none, none.long(), none), seed=step, lr=1e-3
                )
            flat = engine.flat_weights()
            assert flat is not None
            ends.append(torch.from_numpy(flat))
            engine.load_state(engine.state())  # type: ignore[arg-type]
            print(f"stage {stage}: {json.dumps(told)}", flush=True)
    off = (ends[0] - ends[1]).abs().max().item()
    print(f"largest difference of a weight after 20 updates: {off:.3g}")
    assert math.isfinite(off), "weights are not finite"
    assert off < 0.02, "more than rounding: each weight moves by at most 0.02"


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """fp32, tf32 or bf16 for everything within."""
    import torch

    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if precision != "bf16":
        yield
        return
    import samplers

    with torch.autocast(samplers.DEVICE, dtype=torch.bfloat16):
        yield


def samplers_table(device: str, seconds: float) -> None:
    """A step of each contender over a bare forward and gradient, row by row until time is up."""
    import samplers
    import torch
    from common import seconds as timed

    import ebm_dist.samplers as ours

    samplers.DEVICE = device
    until = time.monotonic() + seconds
    kernel = ours.make("langevin", step_size=samplers.STEP_SIZE, temperature=1.0)
    batches = (128, 512, 4096) if device == "cuda" else (2, 4)
    steps = 20

    def ways(energy: Any, x: Any, precision: str) -> dict[str, Callable[[], Any]]:
        own: dict[str, Any] = {"precision": "bf16"} if precision == "bf16" else {}
        rounds: dict[str, Callable[[], Any]] = {
            "torchebm": lambda: samplers.torchebm_langevin(energy, x, steps),
            "ebmkit": lambda: samplers.ebmkit_sampler("LangevinDynamics", energy, x, steps),
            "ours, eager": lambda: samplers.ours(kernel, energy, x, steps, **own),
            "ours, channels last": lambda: samplers.ours(
                kernel, energy, x, steps, channels_last=True, **own
            ),
        }
        for name, captured in (("ours, graphs", True), ("ours, compiled", False)):
            rounds[name] = lambda captured=captured: samplers.compiled(
                kernel, energy, x, steps, captured=captured and device == "cuda", **own
            )
        return rounds

    # What is compiled comes last: it takes the longest.
    every = list(itertools.product(batches, ("fp32", "tf32", "bf16")))
    cases = [(case, kind) for kind in (False, True) for case in every]
    left_out = []
    for (batch, precision), slow in cases:
        if time.monotonic() > until:
            left_out.append(f"{batch} {precision} {'compiled' if slow else 'eager'}")
            continue
        with arithmetic(precision):
            energy, x = samplers.image_network(batch)

            def bare(energy: Any = energy, x: Any = x) -> None:
                leaf = x.detach().requires_grad_(True)
                torch.autograd.grad(energy(leaf).sum(), leaf)

            bare()
            floor = timed(bare, 5)
            print(f"{batch} chains, {precision}: bare {1e3 * floor:.3f} ms", flush=True)
            for name, make in ways(energy, x, precision).items():
                if (name in ("ours, graphs", "ours, compiled")) is not slow:
                    continue
                if (way := make()) is None:
                    continue
                try:
                    way()
                    step = timed(way, 2) / steps
                    line = f"{1e3 * step:.3f} ms a step, {step / floor:.2f} of bare"
                except Exception as error:  # the others are still worth knowing
                    line = f"failed: {str(error).splitlines()[0][:200]}"
                print(f"  {name:20} {line}", flush=True)
    if left_out:
        print(f"time was up before: {', '.join(left_out)}")


def fashion(out: Path, device: str, seconds: float) -> None:
    """The recipe for so long, stopped as Ctrl-C stops it."""
    from ebm_dist.data.sources.mnist import DIRECTORY

    data = ROOT / "data/fashion-mnist"
    if not data.exists():
        data = out / "data"
        if DIRECTORY.exists():
            from ebm_dist.data import prepare

            prepare("fashion-mnist", data)
        else:
            print("no Fashion-MNIST here: pictures of bars of its size in its place", flush=True)
            write_images(data, 28)
    run_dir = out / "run"
    command = [sys.executable, "-m", "ebm_dist", "train", "configs/fashion_mnist_pcd.yaml"]
    command += ["--run-dir", str(run_dir), f"data.source={data}", f"runtime.device={device}"]
    process = subprocess.Popen([*command, "tracking.wandb=off"], cwd=ROOT)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        code = process.wait(30)
    finally:
        process.kill()
    assert code in (0, 75), f"the run ended with exit code {code}"
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    known: dict[str, Any] = {}
    for row in rows:
        known |= row
    wanted = ("fidelity", "throughput", "time", "flow", "energy/gap")
    print(f"{len(rows)} rows")
    for name, value in known.items():
        if name.startswith(wanted):
            print(f"{name}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("images", "zero", "samplers", "fashion"))
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=85.0)
    options = parser.parse_args()
    if options.part == "images":
        write_images(options.out, 8)
    elif options.part == "zero":
        zero(options.device)
    elif options.part == "samplers":
        samplers_table(options.device, options.seconds)
    else:
        fashion(options.out, options.device, options.seconds)


if __name__ == "__main__":
    main()
