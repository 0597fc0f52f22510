"""Objectives on bits and classes are stationary at the law, by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ebm_dist import objectives

F64 = torch.float64


def bits(num: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=num)), dtype=F64)


def expected_gradient(objective, states: Tensor, energy, parameter: Tensor) -> Tensor:
    """Gradient of the loss in mean over exp(-E)/Z, state by state; the loss is a data mean."""
    probability = torch.softmax(-energy(states), 0).detach()
    total = torch.zeros_like(parameter)
    for x, p in zip(states, probability):
        loss, _ = objective(energy, x[None])
        total += p * torch.autograd.grad(loss, parameter)[0]
    return total


@pytest.mark.parametrize("name", ["pseudo_likelihood", "ratio_matching"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_stationary_at_the_coupled_law_of_bits(name, temperature):
    g = torch.Generator().manual_seed(0)
    coupling = torch.randn(5, 5, generator=g, dtype=F64).requires_grad_(True)
    params = {"one_hot": False} if name == "pseudo_likelihood" else {}
    objective = objectives.make(name, temperature=temperature, **params)

    def energy(x: Tensor) -> Tensor:
        # Diagonal entries are biases, since bits are their own squares.
        return -temperature * torch.einsum("bi,ij,bj->b", x, coupling, x)

    states = bits(5)
    probability = torch.softmax(-energy(states) / temperature, 0).detach()
    total, size = torch.zeros_like(coupling), 0.0
    for x, p in zip(states, probability):
        grad = torch.autograd.grad(objective(energy, x[None])[0], coupling)[0]
        total += p * grad
        size += float(p * grad.abs().max())
    # Each state has a gradient; it is their mean that vanishes.
    assert total.abs().max().item() < 1e-9
    assert size > 0.05


def test_pseudo_likelihood_is_stationary_at_a_coupled_law_of_classes():
    g = torch.Generator().manual_seed(1)
    states = torch.nn.functional.one_hot(
        torch.tensor(list(itertools.product(range(3), repeat=3))), 3
    ).to(F64)
    table = torch.randn(3, 3, 3, 3, generator=g, dtype=F64).requires_grad_(True)

    def energy(x: Tensor) -> Tensor:
        return torch.einsum("bik,ijkl,bjl->b", x, table, x)

    objective = objectives.make("pseudo_likelihood", one_hot=True)
    assert expected_gradient(objective, states, energy, table).abs().max().item() < 1e-9


def test_pseudo_likelihood_of_independent_bits_is_their_entropy():
    bias = torch.tensor([0.8, -1.5, 0.1], dtype=F64)
    states = bits(3)
    probability = torch.softmax(states @ bias, 0)
    objective = objectives.make("pseudo_likelihood", one_hot=False)
    loss = sum(p * objective(lambda x: -x @ bias, x[None])[0] for x, p in zip(states, probability))
    entropy = torch.distributions.Bernoulli(logits=bias).entropy().sum()
    assert loss.item() == pytest.approx(entropy.item(), abs=1e-12)


@pytest.mark.parametrize("odds", [0.9, -2.0])
def test_ratio_matching_of_a_bit_has_the_closed_loss(odds):
    # p s(-b)^2 + (1-p) s(b)^2, least at s(b) = p.
    objective = objectives.make("ratio_matching")
    p = torch.sigmoid(torch.tensor(odds, dtype=F64))
    for b in (odds, odds + 0.5):
        s = torch.sigmoid(torch.tensor(b, dtype=F64))
        loss = sum(
            w * objective(lambda x, b=b: -b * x.flatten(), torch.tensor([[v]], dtype=F64))[0]
            for v, w in ((1.0, p), (0.0, 1 - p))
        )
        assert loss.item() == pytest.approx((p * (1 - s) ** 2 + (1 - p) * s**2).item())


@pytest.mark.parametrize("name", ["pseudo_likelihood", "ratio_matching"])
def test_some_sites_are_worth_all_of_them_in_mean(name):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=g, dtype=F64)
    x = torch.randint(0, 2, (4, 6), generator=g).to(F64)

    def energy(x: Tensor) -> Tensor:
        return torch.einsum("bi,ij,bj->b", x, matrix, x)

    params = {"one_hot": False} if name == "pseudo_likelihood" else {}
    full = objectives.make(name, **params)(energy, x)[0].item()
    some = objectives.make(name, num_sites=2, **params)
    values = torch.tensor(
        [some(energy, x, None, torch.Generator().manual_seed(s))[0].item() for s in range(600)]
    )
    error = values.std().item() / 600**0.5
    assert abs(values.mean().item() - full) < 4 * error
    assert 4 * error < 0.15 * full
    with pytest.raises(ValueError, match="num_sites: 9"):
        objectives.make(name, num_sites=9, **params)(energy, x, None, g)
