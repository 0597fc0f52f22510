"""What the kernels with an accept step share: their state, their info, their decision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_dist.samplers.kernel import uniform


@dataclass(frozen=True, slots=True)
class MetropolisInfo:
    """What one proposal reports; the self-transition probability is 1 - mean(accepted)."""

    acceptance: Tensor  # (B,), probability in [0, 1] that the proposal was accepted with
    accepted: Tensor  # (B,), 1 where it was, else 0


def decide(log_ratio: Tensor, generator: torch.Generator) -> tuple[Tensor, MetropolisInfo]:
    """The Metropolis-Hastings decision of each chain by itself.

    A proposal whose energy is NaN or +inf is refused, so a wall of infinite energy is a
    legal way to bound the events.

    Args:
        log_ratio: (B,), log of pi(x') q(x | x') / (pi(x) q(x' | x)).

    Returns:
        accepted (B,), bool; and the info.
    """
    log_ratio = torch.nan_to_num(log_ratio, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    probability = log_ratio.clamp(max=0.0).exp()
    # One number a chain at every step, so that no chain's noise depends on another chain.
    accepted = uniform(probability, generator) < probability
    return accepted, MetropolisInfo(probability, accepted.to(probability.dtype))
