"""Weights of negatives, checked on cases that can be done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ebm_dist.objectives.weighting import ess_ratio, normalised_weights, staleness_log_weight


def test_equal_log_weights_give_equal_weights_whatever_their_size():
    for level in (0.0, -3000.0, 5000.0):
        weight = normalised_weights(torch.full((5,), level))
        torch.testing.assert_close(weight, torch.full((5,), 0.2))


def test_ess_is_one_for_equal_weights_and_one_over_m_for_a_single_one():
    assert ess_ratio(torch.full((8,), -700.0)).item() == pytest.approx(1.0)
    assert ess_ratio(torch.tensor([0.0] + [-1e4] * 7)).item() == pytest.approx(1 / 8)
    # Weights 1, 1, 2: (1 + 1 + 2)^2 / (3 * 6).
    assert ess_ratio(torch.tensor([1.0, 1.0, 2.0]).log()).item() == pytest.approx(16 / 18)


def test_staleness_weight_is_the_ratio_of_boltzmann_factors():
    now, recorded = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 2.0, 1.0])
    weight = staleness_log_weight(now, recorded, temperature=0.5, truncation=math.inf)
    torch.testing.assert_close(weight, torch.tensor([-2.0, 0.0, 1.0]))


def test_truncation_cuts_at_the_given_multiple_of_the_mean_weight():
    recorded = torch.tensor([0.0, 0.0, 0.0, 97.0]).log1p()  # weights 1, 1, 1, 98; mean 25.25
    cut = staleness_log_weight(torch.zeros(4), recorded, truncation=2.0).exp()
    torch.testing.assert_close(cut, torch.tensor([1.0, 1.0, 1.0, 50.5]))
    # By default at sqrt(M) = 2 times the mean.
    default = staleness_log_weight(torch.zeros(4), recorded).exp()
    torch.testing.assert_close(default, cut)


def test_staleness_weight_carries_no_gradient():
    now = torch.zeros(3, requires_grad=True)
    assert not staleness_log_weight(now, torch.ones(3)).requires_grad
