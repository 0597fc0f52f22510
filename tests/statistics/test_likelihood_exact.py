"""Exact log Z: enumeration, quadrature and closed forms agree with the table and each other."""

import itertools
import math

import pytest
import torch

from ebm_dist import energies
from ebm_dist.core.types import EventSpec
from ebm_dist.energies.closed_form.finite import num_states, states
from ebm_dist.evaluation.exact import exact_log_partition, is_exact


@pytest.mark.parametrize(("precision", "temperature"), [(1.0, 1.0), (4.0, 0.5), (0.01, 3.0)])
@pytest.mark.parametrize("num_dims", [1, 2])
def test_quadrature_of_a_gaussian(precision, temperature, num_dims):
    def energy(x):
        return 0.5 * precision * (x - 1.5).square().sum(dim=1)

    got = exact_log_partition(energy, EventSpec((num_dims,), "real"), temperature=temperature)
    expected = num_dims / 2 * math.log(2 * math.pi * temperature / precision)
    assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("radius", "width"), [(2.0, 0.2), (1.0, 0.5), (3.0, 0.05)])
def test_quadrature_of_a_ring(radius, width):
    r, s = radius, width
    bulk = r * s * math.sqrt(math.pi / 2) * (1 + math.erf(r / (s * math.sqrt(2))))
    expected = math.log(2 * math.pi * (s**2 * math.exp(-(r**2) / (2 * s**2)) + bulk))
    got = exact_log_partition(energies.ring(radius=r, width=s), method="quadrature")
    assert got == pytest.approx(expected, abs=1e-6)
    if (radius, width) == (2.0, 0.2):
        assert got == pytest.approx(1.840525, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("depth", [1.0, 4.0, 12.0])
def test_quadrature_of_a_double_well(depth, temperature):
    energy = energies.double_well(depth=depth)
    got = exact_log_partition(energy, method="quadrature", temperature=temperature)
    closed = exact_log_partition(energy, method="closed_form", temperature=temperature)
    assert got == pytest.approx(closed, abs=1e-8)
    if (depth, temperature) == (4.0, 1.0):
        assert got == pytest.approx(-0.053572, abs=1e-6)


def test_quadrature_takes_a_float32_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def energy(x):
        return net(x).squeeze(1) + x.square().sum(dim=1) / 2

    got = exact_log_partition(energy, EventSpec((2,), "real"))
    axis = torch.linspace(-9, 9, 721)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        rule = float((-energy(grid).double()).logsumexp(dim=0)) + 2 * math.log(18 / 720)
    assert got == pytest.approx(rule, abs=1e-5)


def test_an_energy_that_does_not_confine_is_refused():
    with pytest.raises(ValueError, match="confinement"):
        exact_log_partition(lambda x: x.sum(dim=1) * 0, EventSpec((1,), "real"))


def test_given_bounds_are_kept():
    got = exact_log_partition(
        lambda x: 0 * x.sum(dim=1), EventSpec((2,), "real"), bounds=[(0, 2), (-1, 3)]
    )
    assert got == pytest.approx(math.log(8), abs=1e-9)


@pytest.mark.parametrize("num", [4, 9, 16])
@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0])
def test_ising_ring_is_the_transfer_matrix(num, beta):
    def energy(x):
        spin = 2 * x - 1
        return -(spin * spin.roll(1, dims=1)).sum(dim=1)

    got = exact_log_partition(energy, EventSpec((num,), "binary"), temperature=1 / beta)
    expected = math.log((2 * math.cosh(beta)) ** num + (2 * math.sinh(beta)) ** num)
    assert got == pytest.approx(expected, abs=1e-9)
    if (num, beta) == (16, 0.5):
        assert got == pytest.approx(13.012191, abs=1e-6)


def test_ising_4x4_of_the_table():
    energy = energies.ising(shape=(4, 4), coupling=1.0, field=0.0)
    got = exact_log_partition(energy, method="enumerate", temperature=1 / 0.4)
    assert got == pytest.approx(14.561093, abs=1e-6)


@pytest.mark.parametrize(("num_visible", "num_hidden"), [(12, 5), (6, 11), (8, 8)])
def test_rbm_sides_agree(num_visible, num_hidden):
    energy = energies.rbm(num_visible=num_visible, num_hidden=num_hidden, weight_std=1.0)
    visible = exact_log_partition(energy, method="enumerate")
    closed = exact_log_partition(energy, method="closed_form")
    # Sums of hundreds of float32 weights; the energy itself runs in float64.
    assert visible == pytest.approx(closed, abs=1e-9)
    assert visible == pytest.approx(energy.log_z(side="hidden"), abs=1e-9)


def test_states_are_all_states_once():
    binary = torch.cat(list(states(EventSpec((2, 3), "binary"), chunk=10)))
    assert sorted(map(tuple, binary.flatten(1).tolist())) == [
        tuple(map(float, bits)) for bits in itertools.product((0, 1), repeat=6)
    ]
    spec = EventSpec((3, 4), "categorical")
    one_hot = torch.cat(list(states(spec)))
    assert one_hot.shape == (64, 3, 4)
    assert len(set(map(tuple, one_hot.argmax(dim=-1).tolist()))) == num_states(spec) == 64
    assert bool((one_hot.sum(dim=-1) == 1).all())


def test_categorical_enumeration_of_independent_sites():
    logits = torch.tensor([[0.0, 1.0, -2.0], [0.5, 0.5, 3.0]])
    got = exact_log_partition(
        lambda x: -(x * logits.to(x)).sum(dim=(1, 2)), EventSpec((2, 3), "categorical")
    )
    assert got == pytest.approx(float(logits.logsumexp(dim=1).sum()), abs=1e-6)


def test_what_is_exact_is_known_in_advance():
    assert is_exact(energies.rbm(num_visible=784, num_hidden=10))
    assert not is_exact(energies.rbm(num_visible=784, num_hidden=100))
    assert is_exact(energies.double_well(depth=1.0))
    assert not is_exact(lambda x: x.sum(dim=1), EventSpec((784,), "real"))


@pytest.mark.parametrize(
    ("spec", "method", "message"),
    [
        (EventSpec((30,), "binary"), "enumerate", "cannot enumerate"),
        (EventSpec((3,), "real"), "auto", "Use log_partition"),
        (EventSpec((1, 8, 8), "image"), "auto", "Use log_partition"),
        (None, "auto", "pass spec"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_remedy(spec, method, message):
    with pytest.raises(ValueError, match=message):
        exact_log_partition(lambda x: x.flatten(1).square().sum(dim=1), spec, method=method)
