"""Gibbs sweeps of an RBM: two products instead of three, and the bits of three."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ebm_dist import energies, samplers
from ebm_dist.samplers import run_chain


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Unshared:
    """The same energy and conditionals, each of which begins with the position."""

    def __init__(self, rbm: energies.Rbm) -> None:
        self.event = rbm.event
        self.energy, self.sample_hidden, self.sample_visible = (
            rbm,
            rbm.sample_hidden,
            rbm.sample_visible,
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self.energy(x)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_and_energies_are_those_of_a_sweep_that_shares_nothing(dtype):
    rbm = energies.Rbm((4, 5), 7, weight_std=0.7)
    x = rbm.event.noise(33, generator(1)).to(dtype)
    kernel = samplers.make("gibbs")
    shared = run_chain(kernel, x, rbm, 6, generator(2), record_every=1)
    plain = run_chain(kernel, x, Unshared(rbm), 6, generator(2), record_every=1)
    assert kernel.init(x, Unshared(rbm)).latent_input is None
    assert shared.trace is not None
    assert plain.trace is not None
    assert torch.equal(shared.trace, plain.trace)
    assert torch.equal(shared.energies, plain.energies)
    assert torch.equal(shared.energy, rbm(shared.position).detach())
    assert not torch.equal(shared.trace[-1], shared.trace[-2])


def test_a_sweep_takes_two_products():
    rbm, kernel = energies.rbm(20, 10, weight_std=0.5), samplers.make("gibbs")
    x = torch.zeros(5, 20)
    counts = []
    for num_steps in (3, 8):
        with Products() as products:
            run_chain(kernel, x, rbm, num_steps, generator())
        counts.append(products.count)
    assert counts[1] - counts[0] == 5 * 2


@pytest.mark.parametrize("logit", [-9.0, -4.0, -0.3, 0.0, 1.5, 6.0])
def test_a_unit_is_on_as_often_as_its_log_odds_say(logit):
    rbm = energies.rbm(1, 999, weight_std=0.0)
    with torch.no_grad():
        rbm.hidden_bias.fill_(logit)
    num = 401  # an odd number of units in all, though bits come in pairs
    h = rbm.sample_hidden(torch.zeros(num, 1), generator(3))
    p = torch.tensor(logit).double().sigmoid().item()
    error = (p * (1 - p) / h.numel()) ** 0.5
    assert set(h.unique().tolist()) <= {0.0, 1.0}
    assert abs(h.double().mean().item() - p) < 4 * error
    # Two units are drawn from one number of 64 bits, and know nothing of each other.
    h = h.double().flatten() - p
    for apart in (1, 2, 999):
        product = h[apart:] * h[:-apart]
        assert abs(product.mean().item()) < 4 * p * (1 - p) / product.numel() ** 0.5


def test_units_without_a_doubt_are_never_drawn_the_other_way():
    rbm = energies.rbm(1, 2000, weight_std=0.0)
    for logit in (-60.0, 60.0):
        with torch.no_grad():
            rbm.hidden_bias.fill_(logit)
        h = rbm.sample_hidden(torch.zeros(500, 1), generator(4))
        assert (h == (logit > 0)).all()
