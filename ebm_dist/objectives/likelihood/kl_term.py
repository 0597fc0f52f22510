"""The KL term that contrastive divergence drops: the law of the chains depends on the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebm_dist.core.events import sum_event
from ebm_dist.core.types import EnergyFn
from ebm_dist.objectives.objective import energy_and_grad, normal_like


def kl_term(
    energy: nn.Module | EnergyFn,
    negatives: Tensor,
    *,
    step_size: float,
    temperature: float,
    repel_weight: float,
    generator: torch.Generator | None,
    weight: Tensor | None = None,
) -> Tensor:
    """E_q[E_stop(x')] - repel_weight * H[q], differentiable in the weights through x' alone; 0-d.

        x' = x - h dE/dx + sqrt(2 T h) xi        one Langevin step from each negative

    Contrastive divergence is KL(p_data | p) - KL(q | p). Its gradient has a third part: that of
    KL(q | p) through q, the law of the chains. Here only the last step contributes to it. E_stop
    is the energy with fixed weights. H is the nearest-neighbour estimate of the entropy: the mean
    log distance to the nearest other negative, up to a constant. Du et al. (2021),
    arXiv:2012.01316, eq. 5 to 8.

    Args:
        negatives: (M, *event); M >= 2 where `repel_weight` > 0.
        weight: (M,) that sums to 1; equal when None.
    """
    if repel_weight > 0 and negatives.shape[0] < 2:
        raise ValueError(
            "negatives: the entropy of the KL term compares negatives with each other and needs "
            "2 or more, got 1; set objective.repel_weight: 0"
        )
    with torch.enable_grad():
        start, _, grad = energy_and_grad(energy, negatives)
        noise = (2 * temperature * step_size) ** 0.5 * normal_like(start, generator)
        moved = start.detach() - step_size * grad + noise
        # With the weights of E fixed the gradient of E(x'(weights)) is dE/dx' . dx'. It is written
        # out here: the usual way is a copy of the energy with detached weights, but weights that
        # an engine has partitioned cannot be copied.
        _, end, slope = energy_and_grad(energy, moved, create_graph=False)
        along = sum_event(slope * (moved - moved.detach()))
        energy_end = end.detach() + along
        loss = energy_end.mean() if weight is None else (weight * energy_end).sum()
        if repel_weight > 0:
            nearest = _nearest_distance(moved, negatives)
            spread = nearest.log().mean() if weight is None else (weight * nearest.log()).sum()
            loss = loss - repel_weight * spread
    return loss


def _nearest_distance(moved: Tensor, negatives: Tensor) -> Tensor:
    """Distance (M,) from each moved event to the nearest of the other negatives."""
    flat, others = moved.flatten(1), negatives.detach().flatten(1)
    with torch.no_grad():
        distance = torch.cdist(flat, others)
        distance.fill_diagonal_(float("inf"))
        nearest = distance.argmin(1)
    # Clamped: the gradient would be infinite for two chains at the same position.
    return (flat - others[nearest]).square().sum(1).clamp_min(1e-12).sqrt()
