"""Claims on Hopfield networks: storage, retrieval, capacity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebm_dist import energies


def random_bits(num: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (num, size), generator=generator).float()


def flipped(bits: Tensor, share: float, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (bits + (torch.rand(bits.shape, generator=generator) < share)) % 2


def test_energy_is_the_quadratic_form_in_the_spins():
    patterns = random_bits(3, 7)
    net = energies.hopfield(patterns, bias=0.3)
    x = random_bits(5, 7, seed=2)
    s, p = 2 * x - 1, 2 * patterns - 1
    weight = (p.T @ p / 7).fill_diagonal_(0)
    expected = -0.5 * torch.einsum("bi,ij,bj->b", s, weight, s) - 0.3 * s.sum(1)
    torch.testing.assert_close(net(x), expected)


def test_patterns_may_be_bits_or_spins():
    bits = random_bits(3, 9)
    x = random_bits(4, 9, seed=2)
    assert torch.equal(energies.hopfield(bits)(x), energies.hopfield(2 * bits - 1)(x))


@pytest.mark.parametrize("load", [0.138, 0.2, 0.4, 0.8])
def test_hebbian_storage_makes_the_known_share_of_one_bit_errors(load: float):
    # 1/2 erfc(1 / sqrt(2 a)) at load a = (P - 1)/n: .00355 at .138.
    num_units = 1000
    num_patterns = round(load * num_units) + 1
    bits = random_bits(num_patterns, num_units)
    net = energies.hopfield(bits)
    wrong = ((2 * bits - 1) * net.local_field(bits) < 0).float().mean().item()
    expected = 0.5 * math.erfc(1 / math.sqrt(2 * load))
    standard_error = (expected * (1 - expected) / bits.numel()) ** 0.5
    # Finite n shifts the threshold by 1/n of a bit: at most phi(z) z / n.
    z = 1 / math.sqrt(load)
    bias = z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / num_units
    assert abs(wrong - expected) < 4 * standard_error + bias


def test_retrieval_works_below_the_critical_load_and_fails_above():
    num_units = 500
    overlap = {}
    for load in (0.05, 0.1, 0.25):
        bits = random_bits(round(load * num_units), num_units)
        found = energies.hopfield(bits).retrieve(
            flipped(bits, 0.1), torch.Generator().manual_seed(0)
        )
        overlap[load] = ((2 * found - 1) * (2 * bits - 1)).mean().item()
    assert overlap[0.05] > 0.99
    assert overlap[0.1] > 0.97
    assert overlap[0.25] < 0.6


@pytest.mark.parametrize("storage", ["hebbian", "pseudo_inverse"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_retrieve_never_raises_the_energy(storage: energies.associative.Storage, seed: int):
    net = energies.hopfield(random_bits(12, 40, seed), storage, bias=0.05).double()
    x = random_bits(64, 40, seed + 10).double()
    generator = torch.Generator().manual_seed(seed)
    energy = net(x)
    for _ in range(10):
        x = net.retrieve(x, generator, max_sweeps=1)
        lower = net(x)
        assert (lower <= energy + 1e-9).all()
        energy = lower
    assert set(x.unique().tolist()) <= {0.0, 1.0}


def test_retrieve_ends_where_no_single_flip_lowers_the_energy():
    net = energies.hopfield(random_bits(6, 24)).double()
    x = net.retrieve(random_bits(32, 24, 5).double(), torch.Generator().manual_seed(0))
    energy = net(x)
    for unit in range(24):
        y = x.clone()
        y[:, unit] = 1 - y[:, unit]
        assert (net(y) >= energy - 1e-9).all()


def test_pseudo_inverse_stores_correlated_patterns_that_hebbian_loses():
    base = random_bits(1, 60)
    bits = flipped(base.expand(20, 60), 0.2)
    assert len(bits.unique(dim=0)) == 20
    lost = (energies.hopfield(bits, "hebbian").retrieve(bits) != bits).any(1).float().mean()
    kept = (energies.hopfield(bits, "pseudo_inverse").retrieve(bits) == bits).all()
    assert lost > 0.9
    assert kept


def test_pseudo_inverse_and_hebbian_agree_on_orthogonal_patterns():
    hadamard = torch.tensor([[1.0]])
    for _ in range(4):
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    spins = hadamard[1:5]
    torch.testing.assert_close(
        energies.store(spins, "hebbian"), energies.store(spins, "pseudo_inverse")
    )


def test_hopfield_on_images_keeps_their_shape():
    bits = random_bits(2, 16).reshape(2, 1, 4, 4)
    net = energies.hopfield(bits)
    assert net.event_shape == (1, 4, 4)
    assert net.retrieve(bits).shape == bits.shape


@pytest.mark.parametrize("beta", [0.5, 2.0, 8.0])
def test_modern_hopfield_retrieval_never_raises_the_energy_and_finds_memories(beta: float):
    generator = torch.Generator().manual_seed(0)
    # Equal norms: a longer pattern wins more than its share of matches.
    patterns = torch.randn(20, 32, generator=generator).double().sign()
    net = energies.modern_hopfield(patterns, beta).double()
    x = patterns.repeat(3, 1) + 0.7 * torch.randn(60, 32, generator=generator).double()
    start = x
    energy = net(x)
    for _ in range(5):
        x = net.retrieve(x, max_steps=1)
        assert (net(x) <= energy + 1e-9).all()
        energy = net(x)
    if beta == 8.0:
        nearest = torch.cdist(net.retrieve(start), net.patterns).argmin(1)
        assert torch.equal(nearest, torch.arange(20).repeat(3))


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_modern_hopfield_log_z_at_its_own_temperature(beta: float):
    import numpy as np

    from ebm_dist.energies.closed_form.quadrature import log_integral

    patterns = [[1.0, 0.5], [-1.0, 0.2], [0.0, -1.5]]
    net = energies.modern_hopfield(patterns, beta)
    edges = np.linspace(-15, 15, 201)
    expected = log_integral(net.energy, [edges, edges], 1 / beta, order=8)
    assert abs(net.log_z(1 / beta) - expected) < 1e-9
    with pytest.raises(ValueError, match="not known exactly"):
        net.log_z(2 / beta)


def test_a_learnable_network_sees_only_symmetric_weights():
    net = energies.hopfield(random_bits(3, 6), learnable=True)
    x = random_bits(8, 6, 3)
    before = net(x)
    with torch.no_grad():
        skew = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
        net.weight += skew - skew.T + torch.eye(6)
    torch.testing.assert_close(net(x), before)
