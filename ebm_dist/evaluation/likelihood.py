"""log Z by annealed importance sampling in both directions, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_dist import samplers
from ebm_dist.core.events import energy_at
from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.energies.closed_form.finite import sites_of
from ebm_dist.evaluation.annealing_path import AnnealingPath, BoxedPath
from ebm_dist.evaluation.bases import Base, base_law
from ebm_dist.evaluation.exact import event_of
from ebm_dist.samplers.kernel import Kernel

LONGER = 50
"""How much longer than at each b the chains run at the model, before they go back from there."""


@dataclass(frozen=True, slots=True)
class LogPartition:
    """Estimates of log Z in nats. In expectation forward <= log Z <= reverse."""

    forward: float
    forward_se: float
    reverse: float
    reverse_se: float
    combined: float
    """Both directions combined by Bennett's acceptance ratio; better than either alone."""
    combined_se: float
    forward_ess: float
    """Effective fraction of the forward chains, in (0, 1]. Near 1/num_chains no estimate is
    reliable."""
    reverse_ess: float
    acceptance: float
    """Mean acceptance of the moves along the path."""
    exact_start: bool
    """Whether the reverse chains started from exact draws. If not, `reverse` is an upper bound only
    if the chains at its start have mixed."""


def log_probs(energy: EnergyFn, x: Tensor, log_z: float, *, temperature: float = 1.0) -> Tensor:
    """log p(x) (N,) of events (N, *event), in nats, float64 on the CPU."""
    with torch.no_grad():
        value = torch.cat([energy_at(energy, part).double().cpu() for part in x.split(500)])
    return -value / temperature - log_z


def bits_per_dim(log_prob: float, spec: EventSpec) -> float:
    """-log2 p(x) of log p(x) in nats, over the number of coordinates or sites of an event.

    Of images in [-1, 1] it is that of pixels in [0, 256), as in papers, which needs data with the
    noise of `data.dequantize`. Otherwise it is in the data's own units.
    """
    num = math.prod(spec.shape[:-1] if spec.kind == "categorical" else spec.shape)
    return -log_prob / (num * math.log(2)) + (7.0 if spec.kind == "image" else 0.0)


def log_likelihood(
    energy: EnergyFn, x: Tensor, log_z: float, *, temperature: float = 1.0
) -> tuple[float, float]:
    """Mean log p(x) over events (N, *event), in nats per event, and its standard error.

    The error covers the finite N, not the error of log_z.
    """
    log_p = log_probs(energy, x, log_z, temperature=temperature)
    return float(log_p.mean()), float(log_p.std() / math.sqrt(max(len(log_p), 1)))


def log_partition(
    energy: EnergyFn,
    spec: EventSpec | None = None,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    num_chains: int = 256,
    num_temperatures: int = 200,
    num_steps: int | None = None,
    base: Base | None = None,
    kernel: Kernel[Any] | None = None,
    samples: Tensor | None = None,
    box: tuple[float, float] | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> LogPartition:
    """Annealed importance sampling of log Z = log sum exp(-E/T), forward and reverse.

    Forward chains move along E_b(x) = (1 - b) E_0(x) + b E(x)/T from the base distribution at
    b = 0 to the model at b = 1; the mean of their weights estimates Z/Z_0 (Neal 2001,
    arXiv:physics/9803008). Reverse chains move from exact draws of the model back to the base; the
    mean of their weights estimates Z_0/Z, which bounds log Z from above (Grosse et al. 2015,
    arXiv:1511.02543). A short pilot run places more values of b where the distribution changes
    fast, and tunes the step sizes; both are then fixed, so that the estimates stay unbiased.

    Args:
        spec: shape and kind of an event; by default the energy's `event`.
        generator: on the device of the chains.
        num_chains: number of chains per direction.
        num_temperatures: number of values of b after 0.
        num_steps: kernel steps at each b; by default 1 for real events, and enough to visit an
            eighth of the sites for discrete ones.
        base: an energy with `log_z()` and `sample(num, generator)`; by default N(0, I) for
            real events and images, fair coins or uniform classes for discrete ones. `base_law`
            fits one to data, which is much better for images.
        kernel: must leave exp(-E_b) invariant at temperature 1; by default HMC or Gibbs with
            gradients. The pilot tunes its step size if it is tunable.
        samples: exact draws (N, *event) of the model at T, as starts of the reverse chains; by
            default from the energy's own `sample`, else the forward chains, resampled and run
            longer.
        box: integrate over low <= x <= high in every coordinate, for chains that are clamped;
            `base` and `samples` must then be confined too. Chains move in
            u = logit((x - low) / (high - low)), which is unbounded.
        say: called with the name of each stage: the pilot, then the annealing in both directions.
        on_step: called with the number of steps of the stage that are done and of all. Those of
            the pilot are percents, estimated from the stages so far.

    Raises:
        ValueError: an argument does not fit the events.
    """
    spec = event_of(energy, spec)
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if num_chains < 2 or num_temperatures < 1:
        raise ValueError(
            f"log_partition: needs num_chains >= 2 and num_temperatures >= 1, got {num_chains} "
            f"and {num_temperatures}"
        )
    if box is not None and spec.discrete:
        raise ValueError(f"box: only real events and images can be confined, got {spec.kind} ones")
    base = base_law(spec, box=box).to(generator.device) if base is None else base
    if kernel is None:
        kernel = (
            samplers.make("gibbs_with_gradients")
            if spec.discrete
            else samplers.make("hmc", step_size=0.1, num_leapfrog_steps=5)
        )
    if kernel.temperature != 1.0:
        raise ValueError(
            f"kernel: its temperature is {kernel.temperature}, but the path carries the "
            f"temperature; build the kernel with temperature 1 and pass temperature="
        )
    if num_steps is None:
        num_steps = math.ceil(sites_of(spec)[0] / 8) if spec.discrete else 1
    path = AnnealingPath(base, energy, temperature, spec)
    if box is not None:
        path = BoxedPath(base, energy, temperature, spec, box=box)
    with samplers.frozen(energy):
        say("log Z: a pilot run chooses temperatures and step sizes")
        schedule = _pilot(path, kernel, num_temperatures, num_steps, generator, on_step)
        say("log Z by annealed importance sampling, forward and reverse")
        x = path.start(num_chains, generator)
        back = num_temperatures + LONGER

        def after(first: int) -> Callable[[int], None]:
            return lambda done: on_step(first + done, back + num_temperatures)

        log_w, x, acceptance = _anneal(path, schedule, x, num_steps, generator, on_step=after(0))
        count = after(num_temperatures)
        start, exact = _reverse_start(
            path, schedule, log_w, x, num_chains, num_steps, generator, samples, count
        )
        log_v, _, _ = _anneal(
            path, schedule, start, num_steps, generator, reverse=True, on_step=after(back)
        )
    log_z0 = float(base.log_z())
    up, up_se, up_ess = _log_mean(log_w)
    down, down_se, down_ess = _log_mean(log_v)
    ratio, ratio_se = _bennett(log_w, log_v)
    return LogPartition(
        forward=log_z0 + up,
        forward_se=up_se,
        reverse=log_z0 - down,
        reverse_se=down_se,
        combined=log_z0 + ratio,
        combined_se=ratio_se,
        forward_ess=up_ess,
        reverse_ess=down_ess,
        acceptance=acceptance,
        exact_start=exact,
    )


@dataclass(frozen=True, slots=True)
class _Schedule:
    b: list[float]  # from 0 to 1
    kernels: list[Kernel[Any]]  # one for each b


def _pilot(
    path: AnnealingPath,
    kernel: Kernel[Any],
    num_temperatures: int,
    num_steps: int,
    generator: torch.Generator,
    on_step: Callable[[int, int], None],
    num_chains: int = 64,
    max_stages: int = 400,
) -> _Schedule:
    """Choose the values of b, so that each step halves the pilot's ESS, and tune step sizes."""
    name = getattr(kernel, "tunable", None)
    target = getattr(kernel, "target_acceptance", None)
    tuned = name is not None and target is not None
    x = path.start(num_chains, generator)
    stages, steps = [0.0], []

    def tune(x: Tensor, b: float, num: int) -> Tensor:
        nonlocal kernel
        energy = path.at(b)
        state = kernel.init(x, energy)
        for _ in range(num):
            state, info = kernel.step(state, energy, generator)
            if tuned:
                assert target is not None
                change = math.exp(1.5 * (float(info.acceptance.mean()) - target))
                kernel = replace(kernel, **{name: getattr(kernel, name) * change})  # type: ignore[arg-type]
        if tuned:
            steps.append(math.log(getattr(kernel, name)))  # type: ignore[arg-type]
        return state.position

    percent = 0
    on_step(percent, 100)
    x = tune(x, 0.0, 20)
    while stages[-1] < 1 and len(stages) < max_stages:
        slope = path.slope(x)
        b = min(1.0, stages[-1] + _half_ess_step(slope, 1 - stages[-1]))
        weight = (-(b - stages[-1]) * slope).softmax(dim=0)
        x = x[_systematic(weight, num_chains, generator)]
        stages.append(b)
        x = tune(x, b, max(4, num_steps))
        done = len(stages) - 1
        if (now := int(100 * done / (done + _stages_left(stages)))) > percent:
            percent = now
            on_step(percent, 100)
    if percent < 100:  # the stages ended before b = 1
        on_step(100, 100)
    stages[-1] = 1.0
    position = np.linspace(0, len(stages) - 1, num_temperatures + 1)
    b = np.interp(position, np.arange(len(stages)), stages)
    kernels: list[Kernel[Any]] = [kernel] * len(b)
    if tuned:
        size = np.exp(np.interp(position, np.arange(len(stages)), steps))
        kernels = [replace(kernel, **{name: float(h)}) for h in size]  # type: ignore[type-var]
    return _Schedule([float(value) for value in b], kernels)


def _stages_left(b: list[float]) -> float:
    """How many values of b are to follow `b`, if the steps go on growing in proportion to b + a.

    Steps are equal while the variance of the slope is the same, and grow in proportion to b where
    a model is much narrower than its base; the constant a covers both.
    """
    step = b[-1] - b[-2]
    growth = max(1e-9, (step - b[1]) / b[-2]) if b[-2] > 0 else 1e-9
    return math.log1p(growth * (1 - b[-1]) / (step * (1 + growth))) / math.log1p(growth)


def _anneal(
    path: AnnealingPath,
    schedule: _Schedule,
    x: Tensor,
    num_steps: int,
    generator: torch.Generator,
    reverse: bool = False,
    *,
    on_step: Callable[[int], None],
) -> tuple[Tensor, Tensor, float]:
    """Anneal forward or in reverse; returns log-weights (B,), positions and mean acceptance."""
    last = len(schedule.b) - 1
    log_weight = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    accepted: list[float] = []
    order = range(last, 0, -1) if reverse else range(1, last + 1)
    for done, k in enumerate(order):
        on_step(done)
        gain = (schedule.b[k] - schedule.b[k - 1]) * path.slope(x)
        log_weight = log_weight + gain if reverse else log_weight - gain
        # Forward, the chain then moves under the larger b; in reverse, under the smaller. So the
        # two processes are time reversals of each other, as Bennett's ratio requires.
        here = k - 1 if reverse else k
        if here in (0, last):
            continue
        energy, kernel = path.at(schedule.b[here]), schedule.kernels[here]
        state = kernel.init(x, energy)
        for _ in range(num_steps):
            state, info = kernel.step(state, energy, generator)
            if hasattr(info, "acceptance"):
                accepted.append(float(info.acceptance.mean()))
        x = state.position
    return log_weight, x, sum(accepted) / len(accepted) if accepted else 1.0


def _reverse_start(
    path: AnnealingPath,
    schedule: _Schedule,
    log_weight: Tensor,
    x: Tensor,
    num_chains: int,
    num_steps: int,
    generator: torch.Generator,
    samples: Tensor | None,
    on_step: Callable[[int], None],
) -> tuple[Tensor, bool]:
    if samples is not None:
        if tuple(samples.shape[1:]) != path.event.shape or len(samples) < 2:
            raise ValueError(
                f"samples: expected (N, {', '.join(map(str, path.event.shape))}) with N >= 2, got "
                f"{tuple(samples.shape)}"
            )
        return path.enter(samples[:num_chains].float()), True
    draw = path.draw()
    if callable(draw):
        try:
            exact = draw(num_chains, generator, path.temperature)
            assert isinstance(exact, Tensor)
            return exact.float(), True
        except (ValueError, TypeError):
            pass  # no exact draws for these parameters
    x = x[_systematic(log_weight.softmax(dim=0), num_chains, generator)]
    energy, kernel = path.at(1.0), schedule.kernels[-1]
    state = kernel.init(x, energy)
    for done in range(LONGER):
        on_step(done)
        for _ in range(num_steps):
            state, _ = kernel.step(state, energy, generator)
    return state.position, False


def _half_ess_step(slope: Tensor, rest: float) -> float:
    """The step in b, at most `rest`, at which weights exp(-step * slope) halve the ESS."""

    def share(step: float) -> float:
        weight = (-step * slope).softmax(dim=0)
        return float(1 / weight.square().sum() / len(slope))

    if share(rest) >= 0.5:
        return rest
    low, high = 0.0, rest
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= 0.5 else (low, middle)
    return max(low, 1e-12)


def _systematic(weight: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Indices (num,) by systematic resampling, which has the least variance."""
    offset = torch.rand(1, generator=generator, device=generator.device).to(weight)
    position = (torch.arange(num, device=weight.device).to(weight) + offset) / num
    return torch.searchsorted(weight.cumsum(dim=0), position).clamp_max(len(weight) - 1)


def _log_mean(log_weight: Tensor) -> tuple[float, float, float]:
    """log of the mean weight, its standard error by the delta method, and ESS / num."""
    num = len(log_weight)
    value = float(log_weight.logsumexp(dim=0)) - math.log(num)
    relative = (log_weight - value).exp()
    error = float(relative.std()) / math.sqrt(num)
    return value, error, float(relative.sum() ** 2 / relative.square().sum() / num)


def _bennett(log_w: Tensor, log_v: Tensor) -> tuple[float, float]:
    """log(Z/Z_0) from forward log-weights (N,) and reverse ones (M,), and its standard error.

    Bennett (1976); for annealed weights Crooks (2000), Shirts et al. (2003): the root of
    sum sigmoid(C - w) = sum sigmoid(-v - C') with log(N/M) in both.
    """
    shift = math.log(len(log_w) / len(log_v))
    centre = 0.5 * (float(log_w.median()) - float(log_v.median()))
    low, high = centre - 1e4, centre + 1e4

    def excess(c: float) -> float:
        up = torch.sigmoid(log_w - c + shift).sum()
        down = torch.sigmoid(log_v + c - shift).sum()
        return float(up - down)

    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    ratio = 0.5 * (low + high)
    up = torch.sigmoid(-(ratio - shift) + log_w)
    down = torch.sigmoid(log_v + ratio - shift)

    def part(value: Tensor) -> float:
        mean = float(value.mean())
        return float(value.var()) / (len(value) * mean**2) if mean > 0 else math.inf

    return ratio, math.sqrt(part(up) + part(down))
