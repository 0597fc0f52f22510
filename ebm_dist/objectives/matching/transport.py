"""Optimal pairing of two batches: the exact assignment of least total cost."""

from __future__ import annotations

import torch
from torch import Tensor


def pair(source: Tensor, target: Tensor) -> Tensor:
    """`source` (B, *event) in the order that pairs it with `target` at least squared distance.

    Minibatch optimal transport, Tong et al. (2024), arXiv:2302.00482. Waits for the device:
    the assignment runs on the CPU.
    """
    if source[0].numel() == 1:
        # In one dimension the optimal pairing is that of the sorted values.
        rank = target.flatten().argsort().argsort()
        return source[source.flatten().argsort()[rank]]
    # Imported here: nothing else in the mathematics needs more than torch, einops and pydantic.
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        cost = torch.cdist(target.flatten(1).double(), source.flatten(1).double()).square()
        _, order = linear_sum_assignment(cost.cpu().numpy())
    return source[torch.from_numpy(order).to(source.device)]
