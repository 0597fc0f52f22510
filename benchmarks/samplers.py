"""Samplers against torchebm, ebmkit and a plain loop: time of one step, interleaved in one run.

    python benchmarks/samplers.py [--quick] [--out samplers.json] [--threads N] [--device cuda]

The peers are installed beside this package, in an environment of their own:

    python -m venv peers
    peers/bin/pip install torch torchebm==0.8.9 ebmkit==0.16.0 einops pydantic numpy
    PYTHONPATH=. peers/bin/python benchmarks/samplers.py

Every contender moves the same chains on the same network. A case's contenders take turns within
each repetition, so that a busy machine is busy for all of them; the figures are medians over the
repetitions. Ratios compare within one run; absolute times do not compare between machines.

Freed memory is kept for all of them, as in a worker of ours: how far glibc gives large blocks back
to the kernel depends on what the process did before, and is worth up to 1.3 times to any of them.

Where arithmetic is the limit, the floating-point operations of one forward and input gradient,
over what one bare direct convolution of the same type reaches in the same run (the roofline), say
how close a step is to it. Winograd's algorithm multiplies less and may go past it.

On a GPU everything lies there, peers and roofline too, and the clock is read when it is done.
Ours then has more ways: blocks without a CUDA graph, blocks with noise drawn beforehand, and bf16.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import interleaved, keep, keep_memory, machine, medians, seconds, spread
from torch import Tensor, nn

from ebm_dist import energies, samplers
from ebm_dist.samplers import Engine, run_chain
from ebm_dist.samplers.compile import compiler

Round = Callable[[], object]

STEP_SIZE, NUM_STEPS = 0.01, 40

DEVICE = "cpu"
"""Of chains and networks; `--device` sets it."""


@dataclass(frozen=True)
class Case:
    """One task: `ways` move the same chains `num_steps` times."""

    name: str
    num_steps: int
    ways: dict[str, Round]
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

    sampler = LangevinDynamics(Wrapped(), step_size=STEP_SIZE, noise_scale=1.0, device=x.device)
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
    generator = torch.Generator(x.device).manual_seed(0)
    return lambda: run_chain(kernel, x, energy, num_steps, generator, **options)


def compiled(
    kernel: Any,
    energy: nn.Module,
    x: Tensor,
    num_steps: int,
    *,
    captured: bool | None = None,
    fused_noise: bool | None = None,
    **options: Any,
) -> Round:
    """Ours with the engine's blocks, compiled before the first measurement."""
    engine = Engine(
        "compiled",
        background=False,
        captured=captured,
        fused_noise=fused_noise,
        say=lambda line: print(f"  {line}", flush=True),
    )
    return ours(kernel, energy, x, num_steps, engine=engine, **options)


def compiled_on_a_gpu(
    kernel: Any, energy: nn.Module, x: Tensor, num_steps: int
) -> dict[str, Round | None]:
    """Blocks as a run has them there, with each part left out, and in bf16."""
    args = (kernel, energy, x, num_steps)
    return {
        "ours, compiled": compiled(*args),
        "ours, not captured": compiled(*args, captured=False),
        "ours, noise beforehand": compiled(*args, fused_noise=False),
        "ours, compiled, bf16": compiled(*args, precision="bf16"),
    }


# --- the tasks -----------------------------------------------------------------------------


def small_network(num_chains: int) -> Case:
    energy = seeded(
        lambda: nn.Sequential(
            nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1), Squeeze()
        )
    )
    x = torch.randn(num_chains, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return langevin_case(f"MLP 2-64-64-1, {num_chains} chains", energy, x)


def images(shape: tuple[int, int, int], num_chains: int = 64) -> Case:
    energy, x = image_network(num_chains, shape)
    name = "conv " + "x".join(map(str, shape)) + f", {num_chains} chains"
    return langevin_case(name, energy, x, convolutions=True)


def image_network(
    num_chains: int, shape: tuple[int, int, int] = (1, 28, 28)
) -> tuple[nn.Module, Tensor]:
    """A plain convolutional network of some 1.26 million parameters, and chains for it."""
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
    x = torch.rand(num_chains, *shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return energy, x


def langevin_case(name: str, energy: nn.Module, x: Tensor, *, convolutions: bool = False) -> Case:
    # Ours knows the energy where the chains end, one forward pass more than the steps: a training
    # run's 20 to 60 steps hide most of it, and fewer than these would not.
    num_steps = 20 if convolutions else NUM_STEPS
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
    if x.is_cuda:
        ways |= compiled_on_a_gpu(kernel, energy, x, num_steps)
    elif compiler.missing() is None:
        ways["ours, compiled"] = compiled(kernel, energy, x, num_steps)
        if convolutions:
            ways["ours, compiled, bf16"] = compiled(kernel, energy, x, num_steps, precision="bf16")
    flops = count_flops(energy, x) if convolutions else None
    return Case(name, num_steps, present(ways), flops)


def digits_network(num_chains: int) -> Case:
    """The residual network of `configs/digits.yaml`: between dispatch and arithmetic."""
    energy = energies.make("resnet", event_shape=(1, 8, 8), width=24).eval()
    energy.requires_grad_(False).to(DEVICE)
    x = torch.rand(num_chains, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return langevin_case(f"resnet 1x8x8, {num_chains} chains", energy, x, convolutions=True)


def rbm_gibbs(num_chains: int) -> Case:
    energy = energies.rbm(784, 256, weight_std=0.05).to(DEVICE)
    x = torch.randint(0, 2, (num_chains, 784), generator=torch.Generator().manual_seed(1))
    x = x.float().to(DEVICE)
    kernel = samplers.make("gibbs")
    ways: dict[str, Round | None] = {"ours, eager": ours(kernel, energy, x, NUM_STEPS)}
    try:
        from ebm.nets import RBM  # type: ignore[import-not-found]
    except ImportError:
        pass
    else:
        theirs = RBM(784, 256).to(DEVICE)
        with torch.no_grad():
            theirs.W.copy_(energy.weight)  # type: ignore[arg-type]
        ways = {"ebmkit": ebmkit_sampler("GibbsSampler", theirs, x, NUM_STEPS), **ways}
    if compiler.missing() is None:
        ways["ours, compiled"] = compiled(kernel, energy, x, NUM_STEPS)
    return Case(f"RBM 784-256 block Gibbs, {num_chains} chains", NUM_STEPS, present(ways))


def ising_gwg(num_chains: int) -> Case:
    energy = energies.ising((16, 16), 0.4).to(DEVICE)
    x = torch.randint(0, 2, (num_chains, 16, 16), generator=torch.Generator().manual_seed(1))
    x = x.float().to(DEVICE)
    kernel = samplers.make("gibbs_with_gradients")
    ways: dict[str, Round | None] = {
        # The same energy for both: ours, on a periodic lattice.
        "ebmkit": ebmkit_sampler("GibbsWithGradients", energy, x, NUM_STEPS),
        "ours, eager": ours(kernel, energy, x, NUM_STEPS),
    }
    if compiler.missing() is None:
        ways["ours, compiled"] = compiled(kernel, energy, x, NUM_STEPS)
    name = f"Ising 16x16 Gibbs with gradients, {num_chains} chains"
    return Case(name, NUM_STEPS, present(ways))


class Squeeze(nn.Module):
    """(B, 1) -> (B,)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().eval().requires_grad_(False).to(DEVICE)


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
    """One bare convolution of 256 channels on 64 images of 16x16."""

    flops = 2 * 64 * 256 * 256 * 9 * 16 * 16

    def __init__(self, dtype: torch.dtype) -> None:
        last = torch.channels_last
        self._x = torch.randn(64, 256, 16, 16).to(DEVICE, dtype).contiguous(memory_format=last)
        weight = torch.randn(256, 256, 3, 3).to(DEVICE, dtype)
        self._weight = weight.contiguous(memory_format=last)

    def __call__(self) -> object:
        return torch.conv2d(self._x, self._weight, padding=1)


# --- the run -------------------------------------------------------------------------------

BASES = {"torchebm": "times_torchebm", "ebmkit": "times_ebmkit", "plain loop": "times_plain_loop"}
"""What each way's speed is a multiple of, where it takes part."""


def measure(
    case: Case, repetitions: int, about: float, peaks: dict[str, Roofline]
) -> list[dict[str, Any]]:
    """A row for every way: each runs for `about` seconds in each repetition, and so do the
    rooflines where arithmetic is the limit."""
    arms = {name: timed(way, about, case.num_steps) for name, way in case.ways.items()}
    if case.flops is not None:
        # As long as the step would take if all of it ran at that rate.
        for dtype, peak in peaks.items():
            arms[f"bare {dtype} convolution"] = timed(peak, 0.05, peak.flops / case.flops)
    results = interleaved(arms, repetitions)
    step_s = medians(results)
    rows = []
    for name, times in results.items():
        own = step_s[name]
        dtype = "bf16" if "bf16" in name else "fp32"
        limit = step_s.get(f"bare {dtype} convolution")
        rows.append(
            {
                "case": case.name,
                "way": name,
                "step_us": 1e6 * own,
                "spread": spread(times),
                **{
                    ratio: step_s[base] / own if base in step_s else None
                    for base, ratio in BASES.items()
                },
                "of_roofline": None if limit is None else limit / own,
            }
        )
    return rows


def timed(way: Round, about: float, num_steps: float) -> Callable[[], float]:
    """Seconds of one of the `num_steps` steps of `way`, over calls that take `about` seconds."""
    way()  # compiles, and warms memory up
    number = max(1, round(about / seconds(way, 1)))
    return lambda: seconds(way, number) / num_steps


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['case']}")
    for row in rows:
        text = f"  {row['way']:22} {row['step_us']:10.1f} us"
        for base, ratio in BASES.items():
            if row[ratio] is not None:
                text += f"   {row[ratio]:5.2f} x {base}"
        if row["of_roofline"] is not None:
            text += f"   {100 * row['of_roofline']:3.0f}% of a bare convolution"
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and cases")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    global DEVICE
    DEVICE = options.device
    torch.set_num_threads(options.threads)
    keep_memory()
    repetitions, about = (5, 0.2) if options.quick else (7, 0.6)
    print(machine())
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
    if not options.quick:
        cases += [lambda: rbm_gibbs(1024), lambda: ising_gwg(1024)]
    rows: list[dict[str, Any]] = []
    for make in cases:
        case = make()
        if options.only in case.name:
            rows += measure(case, repetitions, about, peaks)
            show([row for row in rows if row["case"] == case.name])
    keep("samplers", rows, options.out, repetitions=repetitions, device=DEVICE)


if __name__ == "__main__":
    main()
