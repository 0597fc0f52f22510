"""The Metropolis-Hastings decision that all kernels with an accept step share, and its info."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_dist.samplers.kernel import uniform


@dataclass(frozen=True, slots=True)
class MetropolisInfo:
    """Reported for each proposal; the self-transition probability is 1 - mean(accepted)."""

    acceptance: Tensor  # (B,), acceptance probability of the proposal, in [0, 1]
    accepted: Tensor  # (B,), 1 where the proposal was accepted, else 0


def decide(log_ratio: Tensor, generator: torch.Generator) -> tuple[Tensor, MetropolisInfo]:
    """Accept or reject the proposal of each chain.

    A proposal whose energy is NaN or +inf is rejected, so an infinite energy is a valid way to
    restrict events to a region.

    Args:
        log_ratio: (B,), log of pi(x') q(x | x') / (pi(x) q(x' | x)).

    Returns:
        Whether each proposal is accepted, (B,) bool, and the info.
    """
    log_ratio = torch.nan_to_num(log_ratio, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    probability = log_ratio.clamp(max=0.0).exp()
    # One number per chain at every step, so that no chain's noise depends on another chain.
    accepted = uniform(probability, generator) < probability
    return accepted, MetropolisInfo(probability, accepted.to(probability.dtype))
