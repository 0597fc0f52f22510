"""Exact log Z and moments of the energies, against values computed another way."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from ebm_dist import energies
from ebm_dist.energies.closed_form.quadrature import log_integral

TEMPERATURES = [0.5, 1.0, 2.5]


def quad_log_z(
    energy: energies.AnalyticEnergy, low: float, high: float, temperature: float
) -> float:
    """log Z of a one-dimensional energy by scipy's adaptive quadrature."""

    def density(x: float) -> float:
        return math.exp(-energy.energy(torch.tensor([[x]]).double()).item() / temperature)

    value, _ = integrate.quad(density, low, high, limit=400, epsabs=0, epsrel=1e-9)
    return math.log(value)


@pytest.mark.parametrize(
    ("alpha", "temperature"), itertools.product([0.25, 1.0, 4.0], TEMPERATURES)
)
@pytest.mark.parametrize("num_dims", [1, 7])
def test_gaussian_log_z(alpha: float, temperature: float, num_dims: int):
    energy = energies.quadratic(alpha, event_shape=(num_dims,))
    expected = num_dims / 2 * math.log(2 * math.pi * temperature / alpha)
    assert abs(energy.log_z(temperature) - expected) < 1e-6
    diagonal = energies.quadratic([alpha] * num_dims, offset=1.5)
    assert abs(diagonal.log_z(temperature) - (expected - 1.5 / temperature)) < 1e-6


def test_gaussian_log_z_of_a_full_precision_matrix():
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    energy = energies.quadratic(precision, mean=[1.0, -2.0], offset=0.25)
    edges = [np.linspace(-25, 25, 201)] * 2
    for temperature in TEMPERATURES:
        expected = log_integral(energy.energy, edges, temperature, order=8)
        assert abs(energy.log_z(temperature) - expected) < 1e-9


def test_annealing_between_precisions_has_half_the_log_ratio_a_dimension():
    for k0, k1 in ((1.0, 4.0), (2.0, 0.5)):
        gap = energies.quadratic([k1] * 3).log_z() - energies.quadratic([k0] * 3).log_z()
        assert abs(gap - 1.5 * math.log(k0 / k1)) < 1e-9


def test_ring_log_z_of_the_example():
    assert abs(energies.ring(2.0, 0.2).log_z() - 1.840525) < 1e-6


@pytest.mark.parametrize(("radius", "width"), [(2.0, 0.2), (1.0, 0.5), (0.5, 1.0), (5.0, 0.1)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ring_log_z_against_quadrature(radius: float, width: float, temperature: float):
    energy = energies.ring(radius, width)

    def shell(rho: float) -> float:
        return 2 * math.pi * rho * math.exp(-((rho - radius) ** 2) / (2 * width**2 * temperature))

    reach = 12 * width * math.sqrt(temperature)
    value, _ = integrate.quad(
        shell, max(0.0, radius - reach), radius + reach, epsabs=0, epsrel=1e-11
    )
    assert abs(energy.log_z(temperature) - math.log(value)) < 1e-9


def test_double_well_log_z_and_second_moment_of_the_example():
    energy = energies.double_well(4.0)
    assert abs(energy.log_z() - -0.053572) < 1e-6
    assert abs(energy.moment(2) - 0.917671) < 1e-6


@pytest.mark.parametrize(("depth", "tilt"), [(4.0, 0.0), (1.0, 0.5), (10.0, -2.0), (0.1, 3.0)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_double_well_log_z_against_quadrature(depth: float, tilt: float, temperature: float):
    energy = energies.double_well(depth, tilt)
    expected = quad_log_z(energy, -12, 12, temperature)
    assert abs(energy.log_z(temperature) - expected) < 1e-8
    three = energies.double_well(depth, tilt, num_dims=3)
    assert abs(three.log_z(temperature) - 3 * expected) < 3e-8


@pytest.mark.parametrize("params", [{}, {"side": 0.5, "num_squares": 3, "barrier": 2.0}])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_checkerboard_log_z_against_a_fine_sum(params: dict[str, Any], temperature: float):
    energy = energies.checkerboard(**params)
    reach = energy.limit + 3
    # The trapezoid rule on another grid: second order at the walls' kink.
    grid = torch.linspace(-reach, reach, 3001, dtype=torch.float64)
    cell = (grid[1] - grid[0]).item()
    total = torch.stack(
        [
            (-energy.energy(torch.stack([x.expand(len(grid)), grid], 1)) / temperature).logsumexp(0)
            for x in grid
        ]
    ).logsumexp(0)
    assert abs(energy.log_z(temperature) - (total.item() + 2 * math.log(cell))) < 2e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gaussian_mixture_log_z_in_one_and_two_dimensions(temperature: float):
    line = energies.gaussian_mixture([[-2.0], [1.0]], [0.5, 1.5], [0.3, 0.7])
    expected = quad_log_z(line, -40, 40, temperature)
    assert abs(line.log_z(temperature) - expected) < 1e-7
    plane = energies.gaussian_mixture([[-2.0, 0.0], [1.0, 1.0]], [0.5, 1.0], [0.3, 0.7])
    edges = [np.linspace(-25, 25, 301)] * 2
    expected = log_integral(plane.energy, edges, temperature, order=8)
    assert abs(plane.log_z(temperature) - expected) < 1e-6


def test_two_quadratic_wells_rescale_or_distort_with_temperature():
    # exp(-dE/T) sqrt(k2/k1) is the ratio of the masses of the wells at -10 and 10.
    cases = {
        (0.0, 1.0, 4.0): {0.5: 2.0, 1.0: 2.0, 2.0: 2.0},
        (1.0, 1.0, 4.0): {0.5: 14.778, 1.0: 5.437, 2.0: 3.297},
        (-0.5, 2.0, 1.0): {},
    }
    for (gap, k1, k2), listed in cases.items():
        low = energies.quadratic(k1, mean=[-10.0])
        high = energies.quadratic(k2, mean=[10.0], offset=gap)
        wells = energies.Mixture([low, high], [1.0, 1.0], hard=True)
        for temperature in (0.5, 1.0, 2.0):
            left = quad_log_z(wells, -30, 0, temperature)
            right = quad_log_z(wells, 0, 30, temperature)
            ratio = math.exp(left - right)
            expected = math.exp(gap / temperature) * math.sqrt(k2 / k1)
            assert abs(ratio / expected - 1) < 1e-6
            if temperature in listed:
                assert abs(ratio - listed[temperature]) < 6e-4


# Spins


def brute_force(energy: energies.FiniteEnergy, temperature: float) -> float:
    return energies.FiniteEnergy.log_z(energy, temperature)


def test_ising_4x4_of_the_example():
    energy = energies.ising((4, 4), 1.0, 0.0)
    temperature = 1 / 0.4
    assert abs(energy.log_z(temperature) - 14.561093) < 1e-6
    states = torch.cat(list(energy.states()))
    probability = (-energy(states) / temperature - energy.log_z(temperature)).exp()
    assert abs(probability @ energy(states) / 16 - -1.379116) < 1e-6
    magnetisation = (2 * states - 1).flatten(1).mean(1)
    assert abs(probability @ magnetisation.abs() - 0.764712) < 1e-6


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.3])
@pytest.mark.parametrize("num", [3, 8, 16, 40])
def test_ising_ring_has_onsagers_two_eigenvalues(beta: float, num: int):
    expected = math.log((2 * math.cosh(beta)) ** num + (2 * math.sinh(beta)) ** num)
    assert abs(energies.ising(num).log_z(1 / beta) - expected) < 1e-9
    if (beta, num) == (0.5, 16):
        assert abs(expected - 13.012191) < 1e-6


@pytest.mark.parametrize(
    ("shape", "coupling", "field"),
    [((4, 4), 1.0, 0.0), ((3, 4), 0.7, 0.3), ((2, 5), -0.6, 0.2), ((2, 2, 3), 0.5, -0.1)],
)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ising_transfer_matrix_agrees_with_enumeration(
    shape: tuple[int, ...], coupling: float, field: float, temperature: float
):
    energy = energies.ising(shape, coupling, field)
    assert abs(energy.log_z(temperature) - brute_force(energy, temperature)) < 1e-9


def test_ising_energy_counts_each_bond_once():
    x = torch.randint(0, 2, (6, 3, 4), generator=torch.Generator().manual_seed(0)).float()
    s = (2 * x - 1).numpy()
    expected = np.zeros(6)
    for i, j in itertools.product(range(3), range(4)):
        here = s[:, i, j]
        expected -= 0.7 * here * (s[:, (i + 1) % 3, j] + s[:, i, (j + 1) % 4]) + 0.3 * here
    found = energies.ising((3, 4), 0.7, 0.3)(x).double()
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_values", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_potts_ring_has_the_known_eigenvalues(num_values: int, beta: float):
    num = 7
    top = math.exp(beta) + num_values - 1
    rest = math.exp(beta) - 1
    expected = math.log(top**num + (num_values - 1) * rest**num)
    assert abs(energies.potts(num, num_values).log_z(1 / beta) - expected) < 1e-9


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_potts_transfer_matrix_agrees_with_enumeration(temperature: float):
    energy = energies.potts((2, 4), 3, 0.8, [0.2, -0.1, 0.4])
    assert abs(energy.log_z(temperature) - brute_force(energy, temperature)) < 1e-9


def test_potts_with_two_values_is_ising_at_half_the_coupling():
    # delta(s, s') = (1 + s s')/2: E_potts(J) = E_ising(J/2) - J/2 a bond, two bonds a site.
    potts = energies.potts((3, 4), 2, 0.9).log_z(1.3)
    ising = energies.ising((3, 4), 0.45).log_z(1.3)
    assert abs(potts - (ising + 0.45 * 24 / 1.3)) < 1e-6


# Boltzmann machines


def random_rbm(num_visible: int, num_hidden: int, seed: int = 0) -> energies.Rbm:
    energy = energies.make("rbm", num_visible=num_visible, num_hidden=num_hidden, weight_std=0.8)
    assert isinstance(energy, energies.Rbm)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bias in (energy.visible_bias, energy.hidden_bias):
            bias.normal_(0, 0.7, generator=generator)
    return energy


@pytest.mark.parametrize(("num_visible", "num_hidden"), [(6, 4), (4, 7), (12, 10), (9, 1)])
def test_rbm_log_z_is_the_same_from_either_side(num_visible: int, num_hidden: int):
    energy = random_rbm(num_visible, num_hidden)
    visible, hidden = energy.log_z(side="visible"), energy.log_z(side="hidden")
    assert abs(visible - hidden) < 1e-9
    assert energy.log_z() in (visible, hidden)


def test_rbm_free_energy_sums_out_the_hidden_units():
    energy = random_rbm(5, 3).double()
    v = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5))).double()
    h = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).double()
    joint = -(v @ energy.visible_bias) - (h @ energy.hidden_bias)[:, None] - h @ energy.weight @ v.T
    torch.testing.assert_close(energy(v), -(-joint).logsumexp(0))


def test_rbm_free_energy_over_a_temperature_sums_the_visible_side():
    energy = random_rbm(6, 3)
    v = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))
    expected = (-energy(v).double() / 2.0).logsumexp(0).item()
    assert abs(energy.log_z(2.0) - expected) < 1e-5
    with pytest.raises(ValueError, match="side='visible'"):
        energy.log_z(2.0, side="hidden")


def test_too_many_states_are_refused_with_the_way_out():
    for energy in (random_rbm(40, 30), energies.ising((16, 16)), energies.potts((6, 6), 6)):
        with pytest.raises(ValueError, match=r"too many.*AIS"):
            energy.log_z()


# Lattice field


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_free_lattice_field_is_the_gaussian_of_its_hessian(
    shape: tuple[int, ...], temperature: float
):
    energy = energies.make("lattice_phi4", shape=shape, mass2=0.6, quartic=0.0)
    assert isinstance(energy, energies.AnalyticEnergy)
    size = math.prod(shape)
    hessian = torch.autograd.functional.hessian(
        lambda x: energy.energy(x.reshape(1, *shape)).sum(), torch.zeros(size).double()
    )
    assert isinstance(hessian, Tensor)
    expected = 0.5 * (size * math.log(2 * math.pi * temperature) - torch.logdet(hessian).item())
    assert abs(energy.log_z(temperature) - expected) < 1e-9


@pytest.mark.parametrize(("mass2", "quartic"), [(0.5, 0.1), (-1.0, 0.3), (2.0, 1.0)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_lattice_ring_transfer_matrix_agrees_with_quadrature(
    mass2: float, quartic: float, temperature: float
):
    # Two sites: a plain double integral.
    energy = energies.lattice_phi4(2, mass2, quartic)
    edges = [np.linspace(-9, 9, 121)] * 2
    expected = log_integral(energy.energy, edges, temperature, order=8)
    assert isinstance(energy, energies.AnalyticEnergy)
    assert abs(energy.log_z(temperature) - expected) < 1e-9


def test_lattice_ring_tends_to_the_free_field():
    free = energies.lattice_phi4(6, 0.8, 0.0)
    nearly = energies.lattice_phi4(6, 0.8, 1e-7)
    assert isinstance(free, energies.AnalyticEnergy)
    assert isinstance(nearly, energies.AnalyticEnergy)
    # First order in quartic: -sum E[x^4] = -6 * 3 Var^2.
    modes = 0.8 + 4 * np.sin(np.pi * np.arange(6) / 6) ** 2
    variance = np.mean(1 / modes)
    assert abs(nearly.log_z() - free.log_z() + 1e-7 * 18 * variance**2) < 1e-9


# Compositions


def test_tempered_energy_has_the_members_law_at_that_temperature():
    for energy in (energies.ring(2.0, 0.3), energies.double_well(3.0, 0.5)):
        for temperature in TEMPERATURES:
            assert energies.Tempered(energy, temperature).log_z() == energy.log_z(temperature)
    tempered = energies.Tempered(energies.double_well(3.0), 2.0)
    assert abs(tempered.log_z() - quad_log_z(tempered, -8, 8, 1.0)) < 1e-7


def test_mixture_log_z_adds_its_members_masses():
    left, right = energies.quadratic([1.0], mean=[-1.0]), energies.quadratic([9.0], mean=[2.0])
    plain = energies.Mixture([left, right], [0.3, 0.7])
    assert abs(plain.log_z() - quad_log_z(plain, -15, 15, 1.0)) < 1e-7
    weighted = energies.Mixture([left, right], [0.3, 0.7], normalised=True)
    assert abs(weighted.log_z()) < 1e-9
    density = energies.gaussian_mixture([[-1.0], [2.0]], [1.0, 1 / 3], [0.3, 0.7])
    x = torch.linspace(-4, 4, 50)[:, None]
    torch.testing.assert_close(weighted(x), density(x))


def test_sum_of_gaussians_is_the_gaussian_of_summed_precisions():
    parts = [energies.quadratic([1.0, 2.0]), energies.quadratic([3.0, 0.5])]
    both = energies.Sum(parts, [1.0, 2.0])
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(both(x), energies.quadratic([7.0, 3.0])(x))


def test_mixture_moments():
    mixture = energies.gaussian_mixture([[-3.0], [3.0]])
    torch.testing.assert_close(mixture.mean(), torch.zeros(1).double())
    torch.testing.assert_close(mixture.covariance(), torch.full((1, 1), 10.0).double())
