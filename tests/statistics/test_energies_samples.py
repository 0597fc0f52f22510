"""Exact samplers of the energies, against their moments: tolerances are 4 standard errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ebm_dist import energies

NUM = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_mean(values: Tensor, expected: float) -> None:
    """The mean of independent `values` (N,) is `expected` within 4 standard errors."""
    values = values.double()
    error = (values.std() / len(values) ** 0.5).item()
    assert abs(values.mean().item() - expected) < 4 * error, (values.mean().item(), expected, error)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_quadratic_sample_has_mean_and_covariance(temperature: float):
    precision = torch.tensor([[2.0, 0.8], [0.8, 1.0]])
    energy = energies.quadratic(precision, mean=[1.0, -2.0])
    x = energy.sample(NUM, generator(), temperature)
    covariance = temperature * torch.linalg.inv(precision)
    y = x - torch.tensor([1.0, -2.0])
    assert_mean(x[:, 0], 1.0)
    assert_mean(x[:, 1], -2.0)
    for i, j in ((0, 0), (0, 1), (1, 1)):
        assert_mean(y[:, i] * y[:, j], covariance[i, j].item())


MEAN_ENERGY: list[tuple[str, Callable[[], energies.AnalyticEnergy], float]] = [
    ("quadratic", lambda: energies.quadratic([1.0, 4.0], mean=[1.0, 0.0]), 0.5),
    ("quadratic", lambda: energies.quadratic(3.0, event_shape=(1, 2, 2)), 2.0),
    ("ring", lambda: energies.ring(2.0, 0.2), 1.0),
    ("ring", lambda: energies.ring(0.5, 1.0), 2.0),
    ("double_well", lambda: energies.double_well(4.0, 0.7), 1.0),
    ("double_well", lambda: energies.double_well(1.0, -1.0, num_dims=2), 0.5),
    ("checkerboard", lambda: energies.checkerboard(), 1.0),
    ("checkerboard", lambda: energies.checkerboard(barrier=2.0, num_squares=3), 2.0),
    ("ising", lambda: energies.ising((3, 4), 0.4, 0.2), 1.5),
    ("potts", lambda: energies.potts((2, 3), 3, 0.6, [0.3, 0.0, -0.2]), 1.0),
    ("hopfield", lambda: energies.hopfield(torch.eye(9)[:3], bias=0.1), 0.8),
    ("lattice_phi4", lambda: energies.LatticePhi4((3, 4), 0.5, 0.0), 1.5),
    ("tempered", lambda: energies.Tempered(energies.ring(1.0, 0.4), 2.0), 1.0),
    (
        "mixture",
        lambda: energies.Mixture(
            [energies.quadratic([1.0], mean=[-2.0]), energies.quadratic([4.0], mean=[1.0])]
        ),
        1.0,
    ),
    (
        "gaussian_mixture",
        lambda: energies.gaussian_mixture([[-2.0, 0.0], [1.0, 1.0]], [0.5, 1.0], [0.3, 0.7]),
        1.0,
    ),
    ("modern_hopfield", lambda: energies.modern_hopfield([[1.0, 0.0], [-0.5, 0.8]], 2.0), 0.5),
    ("rbm", lambda: energies.Rbm((8,), 4, weight_std=0.7), 1.0),
    ("rbm", lambda: energies.Rbm((2, 3), 7, weight_std=0.7), 1.7),
]


@pytest.mark.parametrize(("name", "make", "temperature"), MEAN_ENERGY)
def test_sample_has_the_mean_energy_that_log_z_implies(
    name: str, make: Callable[[], energies.AnalyticEnergy], temperature: float
):
    # E[E] = d log Z / d(-1/T): ties the sampler, the energy and log Z to each other.
    torch.manual_seed(0)
    energy = make()
    x = energy.sample(NUM, generator(1), temperature)
    assert energy.event_shape is not None
    assert x.shape == (NUM, *energy.event_shape)
    assert x.dtype == torch.float32
    if name in ("gaussian_mixture", "modern_hopfield", "mixture"):
        # No log Z at neighbouring temperatures: the normalised density itself instead.
        # E_p[q/p] = 1 for another normalised law q narrower than p.
        q = energies.quadratic([6.0] * x.shape[1], mean=[0.3] * x.shape[1])
        log_p = -energy(x) / temperature - energy.log_z(temperature)
        assert_mean((-q(x) - q.log_z() - log_p).exp(), 1.0)
        return
    beta, step = 1 / temperature, 1e-4
    slope = (energy.log_z(1 / (beta + step)) - energy.log_z(1 / (beta - step))) / (2 * step)
    assert_mean(energy(x).detach(), -slope)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_ising_sample_has_the_enumerated_frequencies(temperature: float):
    energy = energies.ising((2, 3), 0.3, 0.25)
    x = energy.sample(NUM, generator(), temperature)
    states = torch.cat(list(energy.states())).float()
    prob = (-energy(states).double() / temperature - energy.log_z(temperature)).exp()
    index = (x.flatten(1) * 2 ** torch.arange(6)).sum(1).long()
    frequency = torch.bincount(index, minlength=64) / NUM
    error = (prob * (1 - prob) / NUM).sqrt()
    assert ((frequency - prob).abs() < 4.5 * error).all()  # 64 comparisons


def test_rbm_block_conditionals_leave_the_law_in_place():
    torch.manual_seed(0)
    energy = energies.Rbm((3, 2), 4, weight_std=1.0)
    with torch.no_grad():
        energy.visible_bias.normal_(0, 0.7)
        energy.hidden_bias.normal_(0, 0.7)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))
    prob = (-energy(states.reshape(-1, 3, 2)).double() - energy.log_z()).exp().detach()
    draw = generator(2)
    # From a law far from the right one: 60 rounds forget it.
    v = torch.zeros(NUM, 3, 2)
    for _ in range(60):
        v = energy.sample_visible(energy.sample_hidden(v, draw), draw)
    index = (v.flatten(1) * 2 ** torch.arange(5, -1, -1)).sum(1).long()
    frequency = torch.bincount(index, minlength=64) / NUM
    error = (prob * (1 - prob) / NUM).sqrt()
    assert ((frequency - prob).abs() < 4.5 * error).all()  # 64 comparisons


def test_checkerboard_sample_lies_on_the_dark_squares():
    energy = energies.checkerboard(barrier=8.0, sharpness=30.0)
    x = energy.sample(NUM, generator())
    dark = (x.floor().sum(1) % 2 == 0) & (x.abs() <= 2).all(1)
    assert dark.float().mean() > 0.9
    # The four quadrants of the board are alike.
    for sign in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        inside = ((x * torch.tensor(sign)) > 0).all(1).float()
        assert_mean(inside, 0.25)


def test_double_well_sample_has_the_second_moment_and_the_asymmetry():
    for depth, tilt in ((4.0, 0.0), (2.0, 0.6)):
        energy = energies.double_well(depth, tilt)
        x = energy.sample(NUM, generator()).squeeze(1)
        assert_mean(x, energy.moment(1))
        assert_mean(x.square(), energy.moment(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_free_lattice_field_sample_has_the_propagator(temperature: float):
    energy = energies.LatticePhi4((4, 6), 0.3, 0.0)
    x = energy.sample(NUM, generator(), temperature)
    hessian = torch.autograd.functional.hessian(
        lambda y: energy.energy(y.reshape(1, 4, 6)).sum(), torch.zeros(24).double()
    )
    assert isinstance(hessian, Tensor)
    covariance = (temperature * torch.linalg.inv(hessian)).reshape(4, 6, 4, 6)
    for i, j in ((0, 0), (0, 1), (1, 0), (2, 3)):
        assert_mean(x[:, 0, 0] * x[:, i, j], covariance[0, 0, i, j].item())


def test_ring_sample_is_uniform_in_angle_and_shifted_outwards():
    radius, width = 1.0, 0.5
    x = energies.ring(radius, width).sample(NUM, generator())
    angle = torch.atan2(x[:, 1], x[:, 0])
    for k in (1, 2, 3):
        assert_mean((k * angle).cos(), 0.0)
        assert_mean((k * angle).sin(), 0.0)
    rho = torch.linspace(0, 6, 200_001, dtype=torch.float64)
    weight = rho * (-(rho - radius).square() / (2 * width**2)).exp()
    assert_mean(x.norm(dim=1), ((weight * rho).sum() / weight.sum()).item())


def test_same_generator_state_gives_the_same_sample():
    energy = energies.double_well(4.0)
    assert torch.equal(energy.sample(10, generator(3)), energy.sample(10, generator(3)))
    assert math.isfinite(energy.sample(1, generator(3)).item())
