"""Samplers against torchebm, ebmkit and a plain loop: time of one step, interleaved in one run.

    python benchmarks/samplers.py [--quick] [--out samplers.json] [--threads N]

The peers are installed beside this package, in an environment of their own:

    python -m venv peers
    peers/bin/pip install torch torchebm==0.8.9 ebmkit==0.16.0 einops pydantic numpy
    PYTHONPATH=. peers/bin/python benchmarks/samplers.py

Every contender moves the same chains on the same network. A case's contenders take turns within
each repetition, so that a busy machine is busy for all of them; the figures are medians over the
repetitions. Ratios compare within one run; absolute times do not compare between machines.

Where arithmetic is the limit, the floating-point operations of one forward and input gradient,
over what one bare convolution of the same type reaches in the same run (the roofline), say how
close a step is to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm_dist import energies, samplers
from ebm_dist.samplers import Engine, compiler, run_chain

Round = Callable[[], object]

STEP_SIZE, NUM_STEPS = 0.01, 40


@dataclass(frozen=True)
class Case:
    """One task: `ways` move the same chains `num_steps` times."""

    name: str
    num_steps: int
    ways: dict[str, Round]
    base: str
    """The way that ratios are taken against."""
    flops: float | None = None
    """Of one step, where convolutions dominate it."""


# --- the plain loop, as JEM and most research code write it --------------------------------


def plain_loop(energy: nn.Module, x: Tensor, num_steps: int) -> Tensor:
    """Grathwohl et al. (2020)'s sampler: a leaf, `autograd.grad` of the sum, randn_like."""
    noise_std = (2 * STEP_SIZE) ** 0.5
    x = x.clone().requires_grad_(True)
    for _ in range(num_steps):
        (grad,) = torch.autograd.grad(energy(x).sum(), [x])
        x.data += -STEP_SIZE * grad + noise_std * torch.randn_like(x)
    return x.detach()


# --- the peers -----------------------------------------------------------------------------


def torchebm_langevin(energy: nn.Module, x: Tensor, num_steps: int) -> Round | None:
    try:
        from torchebm.core import BaseModel  # type: ignore[import-not-found]
        from torchebm.samplers import LangevinDynamics  # type: ignore[import-not-found]
    except ImportError:
        return None

    class Wrapped(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.inner = energy

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    sampler = LangevinDynamics(Wrapped(), step_size=STEP_SIZE, noise_scale=1.0)
    return lambda: sampler.sample(x=x, n_steps=num_steps)


def ebmkit_sampler(name: str, energy: nn.Module, x: Tensor, num_steps: int) -> Round | None:
    try:
        from ebm import samplers as theirs  # type: ignore[import-not-found]
    except ImportError:
        return None
    params = {"step_size": STEP_SIZE} if name == "LangevinDynamics" else {}
    sampler = getattr(theirs, name)(steps=num_steps, **params)
    return lambda: sampler.sample(energy, x)


def ours(kernel: Any, energy: nn.Module, x: Tensor, num_steps: int, **options: Any) -> Round:
    generator = torch.Generator().manual_seed(0)
    return lambda: run_chain(kernel, x, energy, num_steps, generator, **options)


def compiled(kernel: Any, energy: nn.Module, x: Tensor, num_steps: int, **options: Any) -> Round:
    """Ours with the engine's blocks, compiled before the first measurement."""
    engine = Engine("compiled", background=False, say=lambda line: print(f"  {line}", flush=True))
    return ours(kernel, energy, x, num_steps, engine=engine, **options)


# --- the tasks -----------------------------------------------------------------------------


def small_network(num_chains: int) -> Case:
    energy = seeded(
        lambda: nn.Sequential(
            nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1), Squeeze()
        )
    )
    x = torch.randn(num_chains, 2, generator=torch.Generator().manual_seed(1))
    return langevin_case(f"MLP 2-64-64-1, {num_chains} chains", energy, x)


def images(shape: tuple[int, int, int], num_chains: int = 64) -> Case:
    """A plain convolutional network of 1.26 million parameters."""
    channels, side, _ = shape
    energy = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(channels, 64, 3, 1, 1),
            nn.SiLU(),
            nn.Conv2d(64, 128, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(128, 256, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(256, 256, 3, 1, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(256 * (side // 4) ** 2, 1),
            Squeeze(),
        )
    )
    x = torch.rand(num_chains, *shape, generator=torch.Generator().manual_seed(1))
    name = "conv " + "x".join(map(str, shape)) + f", {num_chains} chains"
    return langevin_case(name, energy, x, convolutions=True)


def langevin_case(name: str, energy: nn.Module, x: Tensor, *, convolutions: bool = False) -> Case:
    # Ours evaluates the start too, one gradient more than the steps: a training run's 20 to 60
    # steps hide it, and fewer than these would not.
    num_steps = 10 if convolutions else NUM_STEPS
    kernel = samplers.make("langevin", step_size=STEP_SIZE, temperature=1.0)
    ways: dict[str, Round | None] = {
        "torchebm": torchebm_langevin(energy, x, num_steps),
        "ebmkit": ebmkit_sampler("LangevinDynamics", energy, x, num_steps),
        "plain loop": lambda: plain_loop(energy, x, num_steps),
        "ours, eager": ours(kernel, energy, x, num_steps),
    }
    if convolutions:
        ways["ours, auto"] = ours(kernel, energy, x, num_steps, engine=Engine("auto"))
        ways["ours, auto, bf16"] = ours(
            kernel, energy, x, num_steps, engine=Engine("auto"), precision="bf16"
        )
    elif compiler.missing() is None:
        ways["ours, compiled"] = compiled(kernel, energy, x, num_steps)
    flops = count_flops(energy, x) if convolutions else None
    return Case(name, num_steps, present(ways), "torchebm", flops)


def digits_network(num_chains: int) -> Case:
    """The residual network of `configs/digits.yaml`: between dispatch and arithmetic."""
    energy = energies.make("resnet", event_shape=(1, 8, 8), width=24).eval()
    energy.requires_grad_(False)
    x = torch.rand(num_chains, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    kernel = samplers.make("langevin", step_size=STEP_SIZE, temperature=1.0)
    case = langevin_case(f"resnet 1x8x8, {num_chains} chains", energy, x, convolutions=True)
    if compiler.missing() is None:
        case.ways["ours, compiled"] = compiled(kernel, energy, x, case.num_steps)
    return case


def rbm_gibbs(num_chains: int) -> Case:
    energy = energies.rbm(784, 256, weight_std=0.05)
    x = torch.randint(0, 2, (num_chains, 784), generator=torch.Generator().manual_seed(1)).float()
    kernel = samplers.make("gibbs")
    ways: dict[str, Round | None] = {"ours, eager": ours(kernel, energy, x, NUM_STEPS)}
    try:
        from ebm.nets import RBM  # type: ignore[import-not-found]
    except ImportError:
        pass
    else:
        theirs = RBM(784, 256)
        with torch.no_grad():
            theirs.W.copy_(energy.weight)  # type: ignore[arg-type]
        ways = {"ebmkit": ebmkit_sampler("GibbsSampler", theirs, x, NUM_STEPS), **ways}
    if compiler.missing() is None:
        ways["ours, compiled"] = compiled(kernel, energy, x, NUM_STEPS)
    return Case(f"RBM 784-256 block Gibbs, {num_chains} chains", NUM_STEPS, present(ways), "ebmkit")


def ising_gwg(num_chains: int) -> Case:
    energy = energies.ising((16, 16), 0.4)
    x = torch.randint(0, 2, (num_chains, 16, 16), generator=torch.Generator().manual_seed(1))
    x = x.float()
    kernel = samplers.make("gibbs_with_gradients")
    ways: dict[str, Round | None] = {
        # The same energy for both: ours, on a periodic lattice.
        "ebmkit": ebmkit_sampler("GibbsWithGradients", energy, x, NUM_STEPS),
        "ours, eager": ours(kernel, energy, x, NUM_STEPS),
    }
    if compiler.missing() is None:
        ways["ours, compiled"] = compiled(kernel, energy, x, NUM_STEPS)
    name = f"Ising 16x16 Gibbs with gradients, {num_chains} chains"
    return Case(name, NUM_STEPS, present(ways), "ebmkit")


class Squeeze(nn.Module):
    """(B, 1) -> (B,)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval().requires_grad_(False)


def present(ways: dict[str, Round | None]) -> dict[str, Round]:
    return {name: way for name, way in ways.items() if way is not None}


def count_flops(energy: nn.Module, x: Tensor) -> float:
    """Of one forward and input gradient, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    x = x.clone().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        energy(x).sum().backward()
    return float(counter.get_total_flops())


class Roofline:
    """FLOP/s of one bare convolution of 256 channels on 64 images of 16x16."""

    flops = 2 * 64 * 256 * 256 * 9 * 16 * 16

    def __init__(self, dtype: torch.dtype) -> None:
        last = torch.channels_last
        self._x = torch.randn(64, 256, 16, 16).to(dtype).contiguous(memory_format=last)
        self._weight = torch.randn(256, 256, 3, 3).to(dtype).contiguous(memory_format=last)
        self.times: list[float] = []

    def __call__(self) -> None:
        for _ in range(3):
            started = time.perf_counter()
            torch.conv2d(self._x, self._weight, padding=1)
            self.times.append(time.perf_counter() - started)

    @property
    def flops_per_s(self) -> float:
        return self.flops / statistics.median(self.times)


# --- the run -------------------------------------------------------------------------------


def measure(
    case: Case, repetitions: int, seconds: float, peaks: dict[str, Roofline]
) -> dict[str, list[float]]:
    """Seconds of one step, by way; every way runs once in each repetition, and the rooflines
    where arithmetic is the limit."""
    for peak in peaks.values():
        peak.times.clear()
    counts = {}
    for name, way in case.ways.items():
        way()  # compiles, and warms memory up
        started = time.perf_counter()
        way()
        counts[name] = max(1, round(seconds / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in case.ways}
    for _ in range(repetitions):
        for name, way in case.ways.items():
            started = time.perf_counter()
            for _ in range(counts[name]):
                way()
            took = time.perf_counter() - started
            times[name].append(took / counts[name] / case.num_steps)
        if case.flops is not None:
            for peak in peaks.values():
                peak()
    return times


def report(case: Case, times: dict[str, list[float]], peaks: dict[str, Roofline]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians.get(case.base)
    rows = {}
    print(f"\n{case.name}")
    limits = {}
    if case.flops is not None:
        limits = {dtype: peak.flops_per_s for dtype, peak in peaks.items()}
        told = ", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in limits.items())
        print(f"  bare convolution: {told}; a step: {case.flops / 1e9:.1f} GFLOP")
    for name, median in medians.items():
        row: dict[str, Any] = {"step_us": 1e6 * median, "all_us": [1e6 * t for t in times[name]]}
        text = f"  {name:18} {1e6 * median:10.1f} us"
        if base is not None:
            row[f"times_{case.base}"] = base / median
            text += f"   {base / median:5.2f} x {case.base}"
        if "plain loop" in medians:
            row["times_plain_loop"] = medians["plain loop"] / median
            text += f"   {medians['plain loop'] / median:5.2f} x plain loop"
        if case.flops is not None:
            dtype = "bf16" if "bf16" in name else "fp32"
            row["of_roofline"] = case.flops / median / limits[dtype]
            text += f"   {100 * row['of_roofline']:3.0f}% of a bare {dtype} convolution"
        print(text, flush=True)
        rows[name] = row
    return {
        "name": case.name,
        "num_steps": case.num_steps,
        "roofline_flops_per_s": limits,
        "ways": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and cases")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    repetitions, seconds = (5, 0.2) if args.quick else (7, 0.6)

    machine = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "allocator": allocator(),
        "versions": {name: version(name) for name in ("torch", "torchebm", "ebmkit")},
        "load": os.getloadavg(),
    }
    print(json.dumps(machine))
    peaks = {"fp32": Roofline(torch.float32), "bf16": Roofline(torch.bfloat16)}
    cases: list[Callable[[], Case]] = [
        lambda: small_network(64),
        lambda: small_network(4096),
        lambda: images((3, 32, 32)),
        lambda: images((1, 28, 28)),
        lambda: digits_network(64),
        lambda: rbm_gibbs(64),
        lambda: ising_gwg(64),
    ]
    if not args.quick:
        cases += [lambda: rbm_gibbs(1024), lambda: ising_gwg(1024)]
    results = []
    for make in cases:
        case = make()
        if args.only in case.name:
            results.append(report(case, measure(case, repetitions, seconds, peaks), peaks))
    if args.out is not None:
        data = {"machine": machine, "cases": results}
        args.out.write_text(json.dumps(data, indent=1))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def allocator() -> str:
    preload = os.environ.get("LD_PRELOAD", "")
    tuned = {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return f"{preload or platform.libc_ver()[0]} {tuned or '(defaults)'}"


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
