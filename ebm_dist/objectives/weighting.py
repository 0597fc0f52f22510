"""Self-normalised importance weights of the negatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

Gather = Callable[[Tensor], Tensor]

Truncation = Annotated[
    Annotated[float, Field(ge=1.0)] | Literal["inf"] | None,
    # YAML's .inf is accepted too, and stored as a word, since JSON has no infinity.
    BeforeValidator(lambda value: "inf" if value == math.inf else value),
]
"""The type of a section's `truncation`; see `staleness_log_weight`."""


def normalised_weights(log_weight: Tensor, gather: Gather | None = None) -> Tensor:
    """Weights (M,) for a weighted sum that is this rank's share of the global weighted mean.

    One rank: softmax, so they sum to 1. R ranks: R * exp(A_i) / (sum of exp A over all ranks), so
    that the mean over ranks of the weighted sums is the global weighted mean. If each rank
    normalised its weights alone, the gradient would depend on which rank got which chains.
    """
    if gather is None:
        return torch.softmax(log_weight, 0)
    # In float64: float32 log-weights near -1000 are 6e-5 apart, and these are differences.
    wide = log_weight.double()
    parts = gather(wide.logsumexp(0).reshape(1))
    return (parts.shape[0] * torch.exp(wide - parts.logsumexp(0))).to(log_weight.dtype)


def ess_ratio(log_weight: Tensor, gather: Gather | None = None) -> Tensor:
    """Effective sample size over sample size, (sum w)^2 / (M sum w^2): in [1/M, 1], 0-d.

    With `gather` it is over the chains of all ranks. Kong (1992).
    """
    wide = log_weight.double()
    first, second = wide.logsumexp(0), (2 * wide).logsumexp(0)
    count = log_weight.shape[0]
    if gather is not None:
        parts = gather(torch.stack([first, second]))
        first, second = parts[:, 0].logsumexp(0), parts[:, 1].logsumexp(0)
        count *= parts.shape[0]
    return (torch.exp(2 * first - second) / count).to(log_weight.dtype)


def staleness_log_weight(
    energy_now: Tensor,
    energy_recorded: Tensor,
    temperature: float = 1.0,
    truncation: float | Literal["inf"] | None = None,
    gather: Gather | None = None,
) -> Tensor:
    """Log-weights (M,) of chains that moved under older weights, detached.

        log w = -(E_now - E_recorded) / T,   cut at log(truncation * mean w)

    Truncated importance sampling (Ionides 2008): the cut bounds the variance, and its bias
    vanishes as M grows. Log-weights are defined up to a constant; normalise them with
    `normalised_weights`.

    Args:
        energy_now: (M,) under the current weights.
        energy_recorded: (M,) under the weights that moved the chains.
        temperature: of the sampler, T.
        truncation: largest weight in units of the mean weight; None is sqrt(M), Ionides' choice;
            inf cuts nothing.
        gather: if given, the mean and M are those of all ranks.
    """
    log_weight = (energy_recorded - energy_now).detach() / temperature
    count = log_weight.shape[0]
    total = log_weight.logsumexp(0)
    if gather is not None:
        parts = gather(total.reshape(1))
        total, count = parts.logsumexp(0), count * parts.shape[0]
    limit = math.sqrt(count) if truncation is None else float(truncation)
    if math.isinf(limit):
        return log_weight
    return torch.minimum(log_weight, total - math.log(count) + math.log(limit))
