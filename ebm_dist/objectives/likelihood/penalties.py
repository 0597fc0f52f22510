"""Penalties on an energy: its magnitude, its gradient at chosen points, its spectral norms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ebm_dist.core.events import per_chain, sum_event
from ebm_dist.core.types import EnergyFn
from ebm_dist.objectives.objective import given, normal_like, uniform

PenaltyPoints = Literal["data", "gaussian", "negatives", "interpolation"]


def energy_l2(energy_pos: Tensor, energy_neg: Tensor) -> Tensor:
    """mean E(x+)^2 + mean E(x-)^2, for energies (B,) and (M,); 0-d.

    Bounds the additive constant that the likelihood leaves free. Du & Mordatch (2019),
    arXiv:1903.08689, section 3.3.
    """
    return energy_pos.square().mean() + energy_neg.square().mean()


def gradient_norm(grad: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean of |dE/dx|^2 over events, for gradients (N, *event); 0-d.

    `weight` (N,) that sums to 1 replaces the equal weights.
    """
    norm = sum_event(grad.square())
    return norm.mean() if weight is None else (weight * norm).sum()


def penalty_points(
    at: PenaltyPoints,
    data: Tensor,
    negatives: Tensor | None,
    generator: torch.Generator | None,
    *,
    std: float = 1.0,
) -> Tensor:
    """The points of the gradient penalty, (N, *event), detached.

    data: the batch; negatives: the chains; gaussian: N(0, std^2), one for each datum;
    interpolation: u x+ + (1-u) x- with u uniform and x+, x- paired in their order, as many as
    the fewer of the two (Gulrajani et al. 2017, arXiv:1704.00028).
    """
    if at == "data":
        return data.detach()
    if at == "gaussian":
        return std * normal_like(data, generator)
    if negatives is None:
        raise ValueError(
            f"negatives: objective.gradient_penalty_at is {at}, which needs them, got None"
        )
    if at == "negatives":
        return negatives.detach()
    num = min(data.shape[0], negatives.shape[0])
    mix = per_chain(uniform((num,), data, given(generator)), data)
    return (mix * data[:num] + (1 - mix) * negatives[:num]).detach()


def spectral_norms(energy: nn.Module | EnergyFn, num_iterations: int = 8) -> Tensor:
    """Sum of the largest singular values of all weight matrices, 0-d.

    A parameter with two or more dims counts as the matrix (dim 0, all others), as in Vahdat &
    Kautz (2020), arXiv:2007.03898. Power iteration starts from the matrix's column of largest
    norm, so it keeps no state between updates. The value is a lower bound and its gradient u v^T
    has unit norm.

    Raises:
        ValueError: the energy is no module, has no matrix, or its weights are partitioned.
    """
    if not isinstance(energy, nn.Module):
        raise ValueError(
            f"energy: {type(energy).__name__} is no nn.Module, so objective.spectral_penalty finds "
            "no weights; set it to 0"
        )
    norms = []
    for parameter in energy.parameters():
        if hasattr(parameter, "ds_status"):
            raise ValueError(
                "objective.spectral_penalty: learner.zero_stage 3 takes weight matrices apart; use "
                "zero_stage 0 to 2, or energy.spectral_norm: true in place of the penalty"
            )
        if parameter.ndim < 2 or not parameter.requires_grad:
            continue
        matrix = parameter.flatten(1).float()
        with torch.no_grad():
            v = matrix.T @ matrix[:, matrix.norm(dim=0).argmax()]
            for _ in range(num_iterations):
                u = nn.functional.normalize(matrix @ v, dim=0)
                v = nn.functional.normalize(matrix.T @ u, dim=0)
            u = nn.functional.normalize(matrix @ v, dim=0)
        norms.append(u @ (matrix @ v))
    if not norms:
        raise ValueError(
            "energy: no weight matrix to train, so objective.spectral_penalty has nothing to hold "
            "down; set it to 0"
        )
    return torch.stack(norms).sum()
