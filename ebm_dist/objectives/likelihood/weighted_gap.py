"""The contrast of data and weighted negatives, which every contrastive likelihood begins with."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ebm_dist.core.types import Negatives
from ebm_dist.objectives.likelihood.penalties import energy_l2
from ebm_dist.objectives.objective import Metrics, Objective


def weighted_gap(
    objective: Objective,
    negatives: Negatives,
    energy_pos: Tensor,
    energy_neg: Tensor,
    *,
    temperature: float,
    truncation: float | Literal["inf"] | None,
    l2: float,
) -> tuple[Tensor, Tensor, Metrics]:
    """mean E(x+) - sum_i w_i E(x-_i) + l2 * (mean E(x+)^2 + mean E(x-)^2).

    Args:
        objective: weights the negatives.
        energy_pos, energy_neg: energies (B,) of the data and (M,) of the negatives.
        l2: weight of the squared energies.

    Returns:
        The loss, 0-d; the weights w (M,), detached; and the metrics of both.
    """
    weight, metrics = objective.negative_weight(
        negatives, energy_neg, temperature=temperature, truncation=truncation
    )
    mean_neg = (weight * energy_neg).sum()
    gap = energy_pos.mean() - mean_neg
    loss = gap
    if l2 > 0:
        magnitude = energy_l2(energy_pos, energy_neg)
        loss = loss + l2 * magnitude
        metrics["loss/energy_l2"] = l2 * magnitude.detach()
    # The gap is not a likelihood: it is near zero for a good model, and also for chains that never
    # left the data.
    metrics |= {
        "loss/contrastive": gap.detach(),
        "energy/positive": energy_pos.mean().detach(),
        "energy/negative": mean_neg.detach(),
        "energy/gap": gap.detach(),
    }
    return loss, weight, metrics
