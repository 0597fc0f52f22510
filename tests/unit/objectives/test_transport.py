"""The pairing of noise and data is the best one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ebm_dist.objectives.matching.transport import assignment, pair


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-3, 1e4]))
def test_assignment_costs_what_the_best_one_costs(num, seed, scale):
    rng = np.random.default_rng(seed)
    cost = scale * rng.normal(size=(num, num))
    if seed % 3 == 0:
        cost = np.round(cost / scale)  # ties
    column = assignment(cost)
    assert sorted(column.tolist()) == list(range(num))
    best = cost[linear_sum_assignment(cost)].sum()
    assert cost[np.arange(num), column].sum() == pytest.approx(best, abs=1e-9 * scale * num)


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 3, 3)])
def test_pairing_has_the_least_squared_distance(shape):
    g = torch.Generator().manual_seed(0)
    source, target = (torch.randn(60, *shape, generator=g) for _ in range(2))
    paired = pair(source, target)
    cost = torch.cdist(target.flatten(1).double(), source.flatten(1).double()).square().numpy()
    best = cost[linear_sum_assignment(cost)].sum()
    assert (paired - target).square().sum().item() == pytest.approx(best, rel=1e-5)
    # A permutation: every source is used once.
    assert torch.equal(paired.flatten(1).sum(1).sort()[0], source.flatten(1).sum(1).sort()[0])


def test_costs_without_a_best_pairing_are_refused():
    with pytest.raises(ValueError, match="cost: not finite"):
        assignment(np.array([[1.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="square"):
        assignment(np.zeros((2, 3)))
