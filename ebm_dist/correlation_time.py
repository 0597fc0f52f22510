"""The integrated autocorrelation time of chains, also from traces that are shorter than it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LONGEST = 10
"""Upper limit of a time, in lengths of the trace: slower chains look like drifting ones."""


def within_chain_time(autocovariance: Tensor) -> Tensor:
    """Integrated autocorrelation time (D,) in records, of (R, D) autocovariances.

    Args:
        autocovariance: sums over t of products at each lag, divided by R, of chains centred each
            on its own mean; averaged over chains.

    With this centring a difference between the means of chains adds nothing, but a short trace
    loses correlations that are longer than itself. So Geyer's sum is compared with its expectation
    for AR(1) chains in a trace of this length, and the result is the time of the AR(1) chain with
    the same sum. This is exact for AR(1), and for any chain as R grows.
    """
    num_records = autocovariance.shape[0]
    time, expected = (value.to(autocovariance) for value in _ar1_sums(num_records))
    measured = geyer_sum(autocovariance / autocovariance[0].clamp_min(1e-300))
    above = torch.searchsorted(expected, measured.contiguous()).clamp(1, len(expected) - 1)
    low, high = expected[above - 1], expected[above]
    part = ((measured - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    answer = time[above - 1] * (time[above] / time[above - 1]) ** part
    # The autocovariance of a chain that never moves is 0.
    return torch.where(autocovariance[0] > 0, answer, time[-1])


def geyer_sum(rho: Tensor) -> Tensor:
    """-1 + 2 * (sum of rho over lags) (D,), of rho (R, D), by Geyer's initial monotone sequence."""
    # Sums of neighbouring pairs of a reversible chain are positive and decreasing.
    num_pairs = rho.shape[0] // 2
    pairs = rho[0 : 2 * num_pairs : 2] + rho[1 : 2 * num_pairs : 2]
    positive = (pairs > 0).to(pairs.dtype).cumprod(dim=0)
    return -1 + 2 * ((pairs * positive).cummin(dim=0).values * positive).sum(dim=0)


@lru_cache(maxsize=8)
def _ar1_sums(num_records: int, num_times: int = 256) -> tuple[Tensor, Tensor]:
    """Times (num_times,) of AR(1) chains, and the expected `geyer_sum` of each in R records."""
    longest = float(LONGEST * num_records)
    time = torch.logspace(-1, torch.tensor(longest).log10().item(), num_times, dtype=torch.float64)
    phi = (time - 1) / (time + 1)
    lag = torch.arange(num_records)
    rho = phi ** lag[:, None]  # (R, num_times)
    # Cov(x_t - m, x_s - m) = rho_|t-s| - Cov(x_t, m) - Cov(x_s, m) + Var m, summed over t.
    ahead = rho.cumsum(dim=0)
    with_mean = (ahead + ahead.flip(0) - 1) / num_records
    sums = torch.cat([torch.zeros_like(rho[:1]), with_mean.cumsum(dim=0)])
    count = (num_records - lag)[:, None]
    both_ends = sums[num_records - lag] + sums[-1] - sums[lag]
    covariance = (count * (rho + with_mean.mean(dim=0)) - both_ends) / num_records
    expected = geyer_sum(covariance / covariance[0])
    return time, expected.cummax(dim=0).values
