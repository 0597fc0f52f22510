"""The pairing of noise and data is the best one."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from ebm_dist.objectives.matching.transport import pair


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 3, 3)])
def test_pairing_has_the_least_squared_distance(shape):
    g = torch.Generator().manual_seed(0)
    source, target = (torch.randn(6, *shape, generator=g) for _ in range(2))
    paired = pair(source, target)
    best = min(
        (source[list(order)] - target).square().sum().item() for order in permutations(range(6))
    )
    assert (paired - target).square().sum().item() == pytest.approx(best, rel=1e-6)
    # A permutation: every source is used once.
    assert torch.equal(paired.flatten(1).sum(1).sort()[0], source.flatten(1).sum(1).sort()[0])


def test_the_pairs_of_a_whole_batch_cross_nowhere():
    # No exchange of two partners shortens the total, and a shuffled target is told apart.
    g = torch.Generator().manual_seed(1)
    source = torch.randn(128, 2, generator=g)
    order = torch.randperm(128, generator=g)
    target = source[order] + 1e-3 * torch.randn(128, 2, generator=g)
    paired = pair(source, target)
    assert torch.equal(paired, source[order])
    cost = torch.cdist(target, paired).square()
    swapped = cost + cost.T  # of i and j, after their partners changed
    assert (swapped + 1e-6 >= cost.diagonal()[:, None] + cost.diagonal()).all()
