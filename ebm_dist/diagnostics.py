"""Chain health: autocorrelation, effective sample size, split R-hat, stagnation, basins.

Pure functions of traces. A trace is (R, B, *event): R records in time first, B chains second;
(R, B) is a trace of scalars, such as energies. Records need not be single steps: a trace over
the rounds of a run shows stagnation that a trace within one round is too short to show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.correlation_time import within_chain_time

LADDER = (
    "a ladder such as {name: parallel_tempering, kernel: {name: mala, step_size: 0.1}, "
    "temperatures: [1, 2, 4], num_steps: 20}"
)
"""Advice for chains that do not mix; a complete section, since other samplers have other keys."""


def autocorrelation(trace: Tensor, max_lag: int | None = None) -> Tensor:
    """Autocorrelation (max_lag + 1,) at lags 0, 1, ..., in [-1, 1]; entry 0 is 1.

    Variances are pooled over chains and coordinates, about the mean of all chains. So chains stuck
    in different modes give 1; about each chain's own mean they would give noise. A constant trace
    gives 1 at every lag, as a chain does that never moves.

    Args:
        trace: (R, B, *event) or (R, B).
        max_lag: the largest lag, below R; by default R - 1.
    """
    values = _flat(trace, "autocorrelation")
    num_records = values.shape[0]
    max_lag = num_records - 1 if max_lag is None else max_lag
    if not 0 <= max_lag < num_records:
        raise ValueError(f"autocorrelation: max_lag must be in 0..{num_records - 1}, got {max_lag}")
    covariance = _autocovariance(values - values.mean(dim=(0, 1), keepdim=True))
    pooled = covariance.mean(dim=1).sum(dim=-1)[: max_lag + 1]
    if pooled[0] <= 0:
        return torch.ones_like(pooled).float()
    # _autocovariance divides by R at each lag, which shrinks long lags towards zero; with many
    # chains the unbiased count is the better estimate.
    count = num_records - torch.arange(max_lag + 1, dtype=pooled.dtype)
    return (pooled / pooled[0] * num_records / count).float()


def autocorrelation_time(trace: Tensor) -> Tensor:
    """Integrated autocorrelation time of a chain about its own mean, in records, (*event).

    (1 + rho) / (1 - rho) for an AR(1) chain: 39 at rho = .95, 1 for independent draws, below 1
    for antithetic chains. A difference between the means of chains does not lengthen it, but
    shows in `effective_sample_size` and `split_rhat`. A trace that is shorter than the time still
    gives an estimate, with more noise: see `within_chain_time`. The result is at most 10 R, also
    for chains that never move.

    Args:
        trace: (R, B, *event) or (R, B), R >= 4.
    """
    values = _flat(trace, "autocorrelation_time", at_least=4)
    covariance = _autocovariance(values - values.mean(dim=0)).mean(dim=1)
    return within_chain_time(covariance).float().reshape(trace.shape[2:])


def effective_sample_size(trace: Tensor) -> Tensor:
    """Effective number of independent draws among the R * B of the trace, per coordinate.

    Vehtari et al. (2021), arXiv:1903.08008, eqs. 10 to 13, with every chain split in half. The
    autocorrelation is relative to the variance between and within half chains, and summed over
    Geyer's initial monotone positive sequence. So chains that disagree about the mean lower the
    result, and so does a chain that drifts. From 10 records on the numbers are those of
    `arviz.ess(method="mean")`. The result exceeds R * B for antithetic chains, up to
    R * B * log10(R * B). A trace that never moves counts as at most one draw per chain, and as one
    draw if all chains coincide. Traces of fewer than 8 records are not split.

    Args:
        trace: (R, B, *event) or (R, B), R >= 4.

    Returns:
        (*event), a scalar tensor for a trace of scalars.
    """
    whole = _flat(trace, "effective_sample_size", at_least=4)
    values = _halves(whole) if len(whole) >= 8 else whole
    num_records, num_chains, _ = values.shape
    means = values.mean(dim=0, keepdim=True)
    covariance = _autocovariance(values - means).mean(dim=1)  # (R, D), divided by R at every lag
    within = covariance[0] * num_records / (num_records - 1)
    variance = covariance[0].clone()
    if num_chains > 1:
        variance = variance + means[0].var(dim=0)
    constant = variance <= 0
    stuck = (within <= 0) & ~constant
    scale = torch.where(constant, torch.ones_like(variance), variance)
    rho = 1 - (within - covariance) / scale  # (R, D)
    rho[0] = 1.0
    # Geyer: sums of neighbouring pairs of a reversible chain are positive and decreasing. The
    # even lag after the last pair that counts is added once where it is positive (Stan).
    last = max((num_records - 3) // 2, 1)
    even, odd = rho[0 : 2 * last + 1 : 2], rho[1 : 2 * last + 2 : 2]
    pairs = even[: len(odd)] + odd
    positive = (pairs > 0).to(pairs.dtype).cumprod(dim=0)
    positive[last:] = 0
    kept = positive.sum(dim=0).long().clamp_max(len(even) - 1)
    tail = even.gather(0, kept[None]).squeeze(0).clamp_min(0)
    time = -1 + 2 * ((pairs * positive).cummin(dim=0).values * positive).sum(dim=0) + tail
    total = num_records * num_chains
    # An antithetic chain can beat independent draws; the bound is Stan's.
    time = time.clamp_min(1 / math.log10(total))
    ess = total / time
    ess = torch.where(stuck, torch.full_like(ess, float(whole.shape[1])), ess)
    ess = torch.where(constant, torch.ones_like(ess), ess)
    return ess.float().reshape(trace.shape[2:])


def split_rhat(trace: Tensor, *, rank_normalize: bool = False) -> Tensor:
    """Potential scale reduction of split chains, per coordinate; 1 where chains agree.

    Each chain is split in half, so one drifting chain disagrees with itself. Gelman et al. (2013).
    `rank_normalize` uses ranks in place of values (arXiv:1903.08008, eq. 14), which suits heavy
    tails. Infinite where chains are constant and differ; 1 where all are the same constant.

    Args:
        trace: (R, B, *event) or (R, B), R >= 4.

    Returns:
        (*event), a scalar tensor for a trace of scalars. Above about 1.01 to 1.05 the chains
        have not mixed.
    """
    values = _flat(trace, "split_rhat", at_least=4)
    half = values.shape[0] // 2
    values = _halves(values)
    if rank_normalize:
        values = _normal_scores(values)
    within = values.var(dim=0).mean(dim=0)
    between = values.mean(dim=0).var(dim=0)
    variance = within * (half - 1) / half + between
    rhat = (variance / within).sqrt()
    rhat = torch.where((within <= 0) & (between <= 0), torch.ones_like(rhat), rhat)
    return rhat.float().reshape(trace.shape[2:])


def self_transition_probability(trace: Tensor, *, per_chain: bool = False) -> Tensor:
    """Share of moves that leave the chain exactly where it was, in [0, 1].

    One minus the acceptance rate where the kernel has an accept step and the trace records
    every step. 0 for an unadjusted chain; use its displacement instead.

    Args:
        trace: (R, B, *event) or (R, B), R >= 2, one record a step.
        per_chain: (B,) instead of the mean over chains, a scalar tensor.
    """
    values = _flat(trace, "self_transition_probability", at_least=2)
    same = (values[1:] == values[:-1]).all(dim=-1).float()  # (R - 1, B)
    return same.mean(dim=0) if per_chain else same.mean()


def energy_gap(
    energy_pos: Tensor, energy_neg: Tensor, log_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """mean E(data) - mean E(negatives) and its standard error, in units of energy.

    Near zero for a good model, and also for chains that never left the data: read it together
    with displacement. If it is strongly negative, the sampler has not found the low energies of
    the model. If it is positive and grows, negatives lie in minima that hold no data.

    Args:
        energy_pos: (B,) energies of data.
        energy_neg: (M,) energies of negatives.
        log_weight: (M,) log-weights of the negatives; the mean is then self-normalised.
    """
    energy_pos, energy_neg = energy_pos.detach().double(), energy_neg.detach().double()
    weight = torch.full_like(energy_neg, 1 / energy_neg.numel())
    if log_weight is not None:
        weight = log_weight.detach().double().softmax(dim=0)
    mean_neg = (weight * energy_neg).sum()
    gap = energy_pos.mean() - mean_neg
    variance_pos = energy_pos.var(correction=0) / max(energy_pos.numel() - 1, 1)
    variance_neg = (weight**2 * (energy_neg - mean_neg) ** 2).sum()
    return gap.float(), (variance_pos + variance_neg).sqrt().float()


@dataclass(frozen=True, slots=True)
class Stagnation:
    """The result of `stagnation`; `alarm` is None while the chains are healthy."""

    stuck: Tensor
    """(B,) bool: chains to re-seed."""
    fraction: float
    """Share of chains that are stuck."""
    self_transition: float
    """Share of moves that leave a chain where it was, mean over chains."""
    autocorrelation: float
    """At the requested lag; 1 means that chains are fully correlated with their past."""
    rhat: float
    """Split R-hat, the largest over coordinates."""
    energy_rhat: float
    """Split R-hat of the energy; 1 where no energies were given."""
    alarm: str | None
    """One line: where, what is wrong, what to change."""


def stagnation(
    trace: Tensor,
    energies: Tensor | None = None,
    *,
    where: str = "chains",
    max_self_transition: float = 0.95,
    max_autocorrelation: float = 0.9,
    max_fraction: float = 0.25,
    max_rhat: float = 1.2,
    lag: int | None = None,
) -> Stagnation:
    """Find chains that no longer represent the model, and say what to change.

    A chain is stuck if it rejects more than `max_self_transition` of its moves, or if its variance
    over the trace is less than `1 - max_autocorrelation` of the variance of all chains together,
    which means that it is confined to one mode. There is an alarm if more than `max_fraction` of
    the chains are stuck, or if the split R-hat of any coordinate or of the energy exceeds
    `max_rhat`: chains that move freely in all coordinates but one are not stuck, but do not
    represent the model either.

    Args:
        trace: (R, B, *event) or (R, B), R >= 4. Take it over enough rounds for a healthy chain
            to cross between modes: within one short round every image chain looks confined.
        energies: (R, B), of the same records, all under one set of weights.
        where: the name of these chains in the alarm, e.g. "shard 3".
        max_rhat: 1.2, below which Brooks & Gelman (1998) call chains mixed. White noise of 20
            records exceeds it once in 10,000 times with 4 chains and never with 32.
        lag: lag of the reported autocorrelation; by default a quarter of the trace.
    """
    values = _flat(trace, "stagnation", at_least=4)
    num_records, num_chains, _ = values.shape
    rejects = self_transition_probability(trace, per_chain=True)
    within = values.var(dim=0).sum(dim=-1)  # (B,)
    # With one chain there is no other estimate of the variance: only rejection is judged.
    pooled = values.flatten(0, 1).var(dim=0).sum() if num_chains > 1 else within.max()
    # In a short trace the variance of a healthy chain can be small by chance. From R of about 20
    # on the limit is far enough below 1.
    confined = within < (1 - max_autocorrelation) * pooled
    rejecting = rejects > max_self_transition
    frozen = within <= 0
    stuck = confined | rejecting | frozen
    fraction = float(stuck.float().mean())
    lag = max(1, num_records // 4) if lag is None else lag
    rho = float(autocorrelation(trace, lag)[-1])
    of_each = split_rhat(trace).flatten()
    worst = int(of_each.argmax())
    rhat = float(of_each[worst])
    energy_rhat = 1.0 if energies is None else float(split_rhat(energies))
    alarm = None
    if fraction > max_fraction:
        count = f"{int(stuck.sum())} of {num_chains} chains"
        if float((rejecting | frozen).float().mean()) >= 0.5 * fraction:
            alarm = (
                f"{where}: {count} are stuck, they stay where they are in "
                f"{100 * float(rejects.mean()):.0f}% of their moves. Lower sampler.step_size "
                f"(or proposal_std), or re-seed them with buffer.reinit_prob."
            )
        else:
            alarm = (
                f"{where}: {count} are confined to one mode (autocorrelation {rho:.2f} at lag "
                f"{lag}, split R-hat {rhat:.2f}). Raise sampler.num_steps, the noise "
                f"(sampler.temperature or sampler.noise_std, whichever is set) or "
                f"buffer.reinit_prob, or replace the sampler by {LADDER}."
            )
    elif max(rhat, energy_rhat) > max_rhat:
        what = f"coordinate {worst}" if rhat >= energy_rhat else "the energy"
        alarm = (
            f"{where}: the chains move, but disagree about {what} (split R-hat "
            f"{max(rhat, energy_rhat):.2f} over {num_records} records, above {max_rhat:g}). Raise "
            f"sampler.num_steps, or replace the sampler by {LADDER}."
        )
    return Stagnation(stuck, fraction, float(rejects.mean()), rho, rhat, energy_rhat, alarm)


def basin_occupancy(x: Tensor, minima: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Share (M,) of the samples `x` (N, *event) that lie nearest to each of `minima` (M, *event).

    `log_weight` (N,) gives the share under another law, e.g. (1/T - 1/T') E for the law at T' from
    samples drawn at T.
    """
    if x.shape[1:] != minima.shape[1:]:
        raise ValueError(
            f"basin_occupancy: samples have event shape {tuple(x.shape[1:])}, minima "
            f"{tuple(minima.shape[1:])}; they must be equal"
        )
    nearest = torch.cdist(x.flatten(1).double(), minima.flatten(1).double()).argmin(dim=1)
    weight = torch.full((x.shape[0],), 1 / x.shape[0], dtype=torch.float64)
    if log_weight is not None:
        weight = log_weight.double().softmax(dim=0)
    return torch.zeros(minima.shape[0], dtype=torch.float64).index_add_(0, nearest, weight).float()


def basin_masses(energy: EnergyFn, minima: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Probability (len(temperatures), M) of the basin of each minimum, by its depth and width.

        mass_m(T)  proportional to  exp(-E(x_m) / T) * det(H_m)^(-1/2)

    Laplace's method: exact for separated quadratic wells, and as T -> 0 otherwise. Wells of one
    depth keep their masses at every T (temperature *rescales*); wells of different depth do not
    (it *distorts*): see `temperature_effect`.

    Args:
        energy: (B, *event) -> (B,), twice differentiable at the minima.
        minima: (M, *event) local minima.
        temperatures: each above 0.

    Raises:
        ValueError: where the Hessian is not positive definite, so that the point is no minimum.
    """
    if min(temperatures) <= 0:
        raise ValueError(f"basin_masses: temperatures must be above 0, got {list(temperatures)}")
    points = minima.detach().double()
    event = points.shape[1:]
    dtype = minima.dtype if minima.dtype.is_floating_point else torch.float32

    def scalar(flat: Tensor) -> Tensor:
        return energy(flat.reshape(1, *event).to(dtype)).sum()

    depths, half_log_dets = [], []
    for index, point in enumerate(points.flatten(1)):
        hessian = torch.autograd.functional.hessian(scalar, point)
        assert isinstance(hessian, Tensor)
        curvature = torch.linalg.eigvalsh((hessian + hessian.T).double() / 2)
        if not bool((curvature > 0).all()):
            raise ValueError(
                f"basin_masses: minima[{index}] has curvature {float(curvature.min()):.3g}; a "
                f"minimum needs all above 0. Descend the energy to a minimum first."
            )
        half_log_dets.append(0.5 * curvature.log().sum())
        with torch.no_grad():
            depths.append(scalar(point).double())
    depth, volume = torch.stack(depths), torch.stack(half_log_dets)
    inverse = 1 / torch.tensor(list(temperatures), dtype=torch.float64)
    return (-inverse[:, None] * depth - volume).softmax(dim=-1).float()


def temperature_effect(masses: Tensor, tolerance: float = 0.01) -> str:
    """`"rescale"` if the masses (num_temperatures, M) are the same at every T, else `"distort"`."""
    spread = masses.max(dim=0).values - masses.min(dim=0).values
    return "rescale" if float(spread.max()) <= tolerance else "distort"


def _flat(trace: Tensor, caller: str, at_least: int = 1) -> Tensor:
    """The trace as (R, B, D) float64."""
    if trace.ndim < 2:
        raise ValueError(
            f"{caller}: trace must be (R, B) or (R, B, *event), time first, got "
            f"{tuple(trace.shape)}; for one chain use trace[:, None]"
        )
    if trace.shape[0] < at_least or trace.shape[1] < 1:
        raise ValueError(
            f"{caller}: trace needs at least {at_least} records of at least 1 chain, got "
            f"{tuple(trace.shape)}; record more often"
        )
    # Squares of energies near 1e4 leave no digits in float32 for the variance.
    values = trace.detach().cpu().double().reshape(trace.shape[0], trace.shape[1], -1)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{caller}: trace holds values that are not finite; the chains diverged")
    return values


def _halves(values: Tensor) -> Tensor:
    """(R, B, D) -> (R // 2, 2B, D): chains split in half, without the middle record of odd R."""
    half = values.shape[0] // 2
    return torch.cat([values[:half], values[-half:]], dim=1)


def _autocovariance(centred: Tensor) -> Tensor:
    """(R, B, D) -> (R, B, D): sum over t of x_t x_{t + lag}, divided by R; by FFT."""
    num_records = centred.shape[0]
    spectrum = torch.fft.rfft(centred, n=2 * num_records, dim=0)
    product = torch.fft.irfft(spectrum * spectrum.conj(), n=2 * num_records, dim=0)
    return product[:num_records] / num_records


def _normal_scores(values: Tensor) -> Tensor:
    """Each coordinate's values replaced by the normal quantiles of their ranks over all chains."""
    flat = values.flatten(0, 1)  # (N, D)
    num = flat.shape[0]
    # Ties share their mean rank: a constant trace must stay constant.
    ordered = flat.sort(dim=0).values.T.contiguous()
    query = flat.T.contiguous()
    low = torch.searchsorted(ordered, query)
    high = torch.searchsorted(ordered, query, right=True)
    rank = (low + high + 1).double() / 2
    uniform = (rank - 0.375) / (num + 0.25)
    return torch.special.ndtri(uniform).T.reshape(values.shape)
