"""The long-run audit: runs chains much longer than training does, and compares them with data.

Training raises the energy only where its short chains go. So a model can have minima that short
chains never reach, or a distribution to which they have not converged: its samples look right, but
its density is wrong. The audit runs the chains longer, reports which of the two it finds, and
returns the chains so that training can use them as negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_dist.core.errors import NonFinite
from ebm_dist.core.events import energy_at, per_chain
from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.chain import run_chain
from ebm_dist.samplers.frozen import for_rows
from ebm_dist.samplers.kernel import Kernel

MAX_HIGH = 0.05
"""Fraction of long chains far above the data's energies that raises the alarm."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Result of `long_run_audit`. Chains are (B, *event), energies in the model's units."""

    long: Tensor
    """Chains after `num_steps` in total."""
    num_steps: int
    """Number of steps of the long chains."""
    energy_data: float
    """Mean energy of the data."""
    energy_long: float
    variance_short: float
    """Mean over coordinates of the variance over chains."""
    variance_long: float
    spurious: Tensor
    """(B,) bool: long chains with lower energy than the data, and far from it."""
    spurious_fraction: float
    high_fraction: float
    """Fraction of long chains with outlying high energies, minus that fraction of the data."""
    diverged: Tensor
    """(B,) bool: chains with a non-finite energy or position; `long` holds their start."""
    shift: float
    """Largest Kolmogorov-Smirnov distance between short and long chains, in [0, 1]."""
    law_differs: bool
    """Whether short and long chains have significantly different distributions."""
    alarm: str | None
    """One line with the problem and its remedy; None if there is no problem."""

    @property
    def kept(self) -> Tensor:
        """Which chains (B,) to use as negatives: the spurious ones, or all if `law_differs`.

        Long chains are closer to the model's distribution than short ones, and likelihood training
        needs negatives from that distribution.
        """
        return ~self.diverged if self.law_differs else self.spurious & ~self.diverged

    @property
    def negatives(self) -> Tensor:
        """The chains `kept`, (M, *event)."""
        return self.long[self.kept]

    def metrics(self) -> dict[str, float]:
        """The numbers of the audit, by metric name."""
        return {
            "audit/energy": self.energy_long,
            "audit/energy_gap": self.energy_data - self.energy_long,
            "audit/spurious": self.spurious_fraction,
            "audit/law_distance": self.shift,
            "audit/variance": self.variance_long,
            "audit/variance_short": self.variance_short,
            "audit/steps": float(self.num_steps),
        }


def long_run_audit(
    energy: EnergyFn,
    kernel: Kernel[Any],
    x: Tensor,
    data: Tensor,
    *,
    short_steps: int,
    num_steps: int,
    generator: torch.Generator,
    energy_quantile: float = 0.05,
    distance_factor: float = 1.5,
    significance: float = 1e-3,
    min_shift: float = 0.05,
    chunk: int = 500,
    persistent: bool = False,
    energy_of_data: Tensor | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Run chains for `num_steps`; compare them with the data and with their `short_steps` state.

    A chain is high if its energy exceeds the third quartile of the data's by more than three times
    the interquartile range (Tukey's outer fence; one normal energy in 850,000 exceeds it).
    A chain is spurious if its energy is below the `energy_quantile` of the data's and its
    distance to the nearest datum exceeds `distance_factor` times the 99% quantile of such
    distances within the data. Long and short chains differ if a two-sample Kolmogorov-Smirnov
    test of energy, radius or 16 random projections rejects at `significance` (Bonferroni), with a
    distance of at least `min_shift`.

    Args:
        kernel: the kernel of training, to audit training.
        x: (B, *event) starts, drawn as in training; use 50 or more for the tests to have power.
        data: (N, *event) held-out or training events; a few hundred are enough.
        short_steps: steps of training's chains.
        num_steps: steps in total, at least ten times as many.
        generator: for the noise of the chains and the directions of the projections.
        persistent: whether `x` are training's persistent chains; changes the alarm's text only.
        on_step: called with the number of steps that are done and of all, after each `chunk`.
        energy_of_data: (N,) energies of `data`, where `energy` is that of chains with labels, and
            so cannot take other events.

    Raises:
        ValueError: shapes differ, or the long run is not longer than the short one.
    """
    if tuple(x.shape[1:]) != tuple(data.shape[1:]):
        raise ValueError(
            f"long_run_audit: chains have event shape {tuple(x.shape[1:])}, data "
            f"{tuple(data.shape[1:])}; they must be equal"
        )
    if not 0 < short_steps < num_steps:
        raise ValueError(
            f"long_run_audit: needs 0 < short_steps < num_steps, got {short_steps} and {num_steps}"
        )
    if x.shape[0] < 2 or data.shape[0] < 3:
        raise ValueError(
            f"long_run_audit: needs at least 2 chains and 3 data, got {x.shape[0]} and "
            f"{data.shape[0]}"
        )
    short, diverged = _run(kernel, x, energy, short_steps, generator)
    long = short
    remaining = num_steps - short_steps
    while remaining > 0:
        # In pieces, so that a diverged chain is detected within one of them.
        piece = min(chunk, remaining)
        long, fell = _run(kernel, long, energy, piece, generator)
        diverged = diverged | fell
        remaining -= piece
        on_step(num_steps - remaining, num_steps)

    e_short, e_long = _energies(energy, short), _energies(energy, long)
    e_data = _energies(energy, data) if energy_of_data is None else energy_of_data.double().cpu()
    healthy = ~diverged.cpu()
    spacing = _nearest(data, data, exclude_self=True).quantile(0.99)
    far = _nearest(long, data) > distance_factor * spacing
    spurious = (e_long < e_data.quantile(energy_quantile)) & far & healthy
    fraction = float(spurious.double().mean())
    first, third = e_data.quantile(0.25), e_data.quantile(0.75)
    fence = third + 3 * (third - first)
    # If energies have a heavy tail, some data are above the fence as well.
    high = float(((e_long > fence) & healthy).double().mean() - (e_data > fence).double().mean())

    shift, shifted_in, p_value = 0.0, "energy", 1.0
    if int(healthy.sum()) >= 2:
        shift, shifted_in, p_value = _compare(
            short[diverged.logical_not()],
            long[diverged.logical_not()],
            e_short[healthy],
            e_long[healthy],
            data,
            generator,
        )
    differs = p_value < significance and shift > min_shift
    return Audit(
        long=long,
        num_steps=num_steps,
        energy_data=float(e_data.mean()),
        energy_long=float(e_long.mean()),
        variance_short=_variance(short),
        variance_long=_variance(long),
        spurious=spurious,
        spurious_fraction=fraction,
        high_fraction=high,
        diverged=diverged.cpu(),
        shift=shift,
        law_differs=differs,
        alarm=_alarm(
            int(spurious.sum()),
            int(diverged.sum()),
            len(x),
            high,
            differs,
            shift,
            shifted_in,
            persistent,
        ),
    )


def _energies(energy: EnergyFn, x: Tensor) -> Tensor:
    """(N,) float64 on the CPU, computed in pieces."""
    found = []
    with torch.no_grad():
        for index in torch.arange(len(x), device=x.device).split(500):
            part = for_rows(energy, lambda rows, index=index: rows[index])
            found.append(energy_at(part, x[index]).double().cpu())
    return torch.cat(found)


def _run(
    kernel: Kernel[Any],
    x: Tensor,
    energy: EnergyFn,
    num_steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Chains after `num_steps`, and which diverged; those keep their start."""
    lost = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    try:
        return run_chain(kernel, x, energy, num_steps, generator).position, lost
    except NonFinite:
        pass
    # Repeats the steps one by one, so that the other chains can continue.
    state = kernel.init(x, energy)
    for _ in range(num_steps):
        new, _ = kernel.step(state, energy, generator)
        finite = torch.isfinite(new.energy) & torch.isfinite(new.position).flatten(1).all(dim=1)
        lost = lost | ~finite
        if bool(finite.all()):
            state = new
        else:
            # A diverged chain returns to its start, where the energy is finite; it is excluded.
            state = kernel.init(torch.where(per_chain(finite, x), new.position, x), energy)
    return state.position, lost


def _compare(
    short: Tensor,
    long: Tensor,
    e_short: Tensor,
    e_long: Tensor,
    data: Tensor,
    generator: torch.Generator,
    num_projections: int = 16,
) -> tuple[float, str, float]:
    """The most significant KS distance over all quantities, its quantity and corrected p-value."""
    # Imported here because it takes half a second, in every process that imports this module.
    from scipy import stats

    a, b = short.flatten(1).double(), long.flatten(1).double()
    centre = data.flatten(1).double().mean(dim=0).to(a.device)
    num_dims = a.shape[1]
    quantities = [
        ("energy", e_short.numpy(), e_long.numpy()),
        ("radius", _norm(a - centre), _norm(b - centre)),
    ]
    directions = (
        torch.eye(num_dims, dtype=a.dtype, device=a.device)
        if num_dims <= num_projections
        else torch.empty(num_dims, num_projections, dtype=a.dtype, device=a.device).normal_(
            generator=generator
        )
    )
    for column in directions.T:
        quantities.append(("projection", (a @ column).cpu().numpy(), (b @ column).cpu().numpy()))
    found: list[tuple[float, float, str]] = []
    for name, first, second in quantities:
        test: Any = stats.ks_2samp(first, second, method="asymp")
        found.append((float(test.pvalue), -float(test.statistic), name))
    # Sample sizes are equal, so the smallest p-value belongs to the largest distance.
    p_value, negative, name = min(found)
    return -negative, name, min(1.0, p_value * len(found))


def _nearest(x: Tensor, data: Tensor, *, exclude_self: bool = False) -> Tensor:
    """Distance (B,) of each event to the nearest datum."""
    flat = data.flatten(1).double()
    parts = []
    for start in range(0, x.shape[0], 250):
        distance = torch.cdist(x[start : start + 250].flatten(1).double(), flat)
        if exclude_self:
            row = torch.arange(distance.shape[0], device=distance.device)
            distance[row, row + start] = math.inf
        parts.append(distance.min(dim=1).values.cpu())
    return torch.cat(parts)


def _norm(value: Tensor) -> np.ndarray:
    return value.norm(dim=1).cpu().numpy()


def _variance(x: Tensor) -> float:
    return float(x.flatten(1).double().var(dim=0).mean())


def _alarm(
    num_spurious: int,
    num_diverged: int,
    num: int,
    high: float,
    differs: bool,
    shift: float,
    name: str,
    persistent: bool,
) -> str | None:
    """The most serious finding, in one line."""
    if num_diverged:
        return (
            f"audit: {num_diverged} of {num} chains diverged on a long run. Lower "
            f"sampler.step_size, clamp the chains, or raise objective.gradient_penalty."
        )
    if num_spurious:
        return (
            f"audit: {num_spurious} of {num} chains fell into spurious minima, below the data's "
            f"energy and far from data. Set evaluation.audit_feedback: true, or raise "
            f"sampler.num_steps or buffer.reinit_prob."
        )
    if high > MAX_HIGH:
        return (
            f"audit: {high:.0%} of long chains lie far above the data's energies, beyond the third "
            "quartile by three interquartile ranges: the model's mass does not lie where the data "
            "are likely, the chains are hotter than T, or they have not converged. Lower "
            "sampler.step_size, raise sampler.num_steps, or train longer."
        )
    if differs and persistent:
        return (
            f"audit: the persistent chains have not converged to the model's law (shift "
            f"{shift:.2f} in {name} when they run longer), so its density is not reliable yet. Set "
            f"evaluation.audit_feedback: true, raise sampler.num_steps, or lower learner.lr."
        )
    if differs:
        return (
            f"audit: long chains have another law than training's short ones (shift {shift:.2f} "
            f"in {name}): the model is a short-run generator, and its density is not reliable. "
            f"Set evaluation.audit_feedback: true, raise sampler.num_steps, or lower "
            f"buffer.reinit_prob, so that chains persist."
        )
    return None
