"""Annealed importance sampling against exact log Z, in standard errors."""

import math

import pytest
import torch

from ebm_dist import energies, samplers
from ebm_dist.core.types import EventSpec
from ebm_dist.evaluation.bases import GaussianBase, base_law
from ebm_dist.evaluation.exact import exact_log_partition
from ebm_dist.evaluation.likelihood import log_likelihood, log_partition


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def agrees(found, expected, *, precision=0.02):
    """Both directions and their combination within 4 standard errors, and those errors small."""
    assert abs(found.forward - expected) < 4 * found.forward_se + 1e-6
    assert abs(found.reverse - expected) < 4 * found.reverse_se + 1e-6
    assert abs(found.combined - expected) < 4 * found.combined_se + 1e-6
    assert found.combined_se < precision


@pytest.mark.parametrize(("k0", "k1"), [(1.0, 4.0), (2.0, 0.5), (1.0, 25.0)])
@pytest.mark.parametrize("num_dims", [1, 6])
def test_between_two_precisions_it_is_half_their_log_ratio(k0, k1, num_dims):
    base = GaussianBase(torch.zeros(num_dims), torch.full((num_dims,), k0**-0.5))

    def energy(x):
        return 0.5 * k1 * x.square().sum(dim=1)

    found = log_partition(
        energy,
        EventSpec((num_dims,), "real"),
        generator=generator(),
        base=base,
        num_chains=1000,
        num_temperatures=40,
        samples=k1**-0.5 * torch.empty(1000, num_dims).normal_(generator=generator(1)),
    )
    assert base.log_z() == pytest.approx(num_dims / 2 * math.log(2 * math.pi / k0))
    agrees(found, base.log_z() + num_dims / 2 * math.log(k0 / k1), precision=0.05)
    assert found.exact_start


@pytest.mark.parametrize(
    "energy",
    [
        energies.quadratic(precision=[0.5, 8.0, 1.0]),
        energies.ring(radius=2.0, width=0.2),
        energies.double_well(depth=4.0),
        energies.make("double_well", depth=2.0, tilt=0.7),
    ],
    ids=["anisotropic", "ring", "double_well", "tilted"],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_real_energies_with_a_known_z(energy, temperature):
    found = log_partition(
        energy,
        generator=generator(),
        temperature=temperature,
        num_chains=1000,
        num_temperatures=60,
    )
    agrees(found, exact_log_partition(energy, temperature=temperature), precision=0.04)
    assert found.exact_start


@pytest.mark.parametrize(("num_visible", "num_hidden", "weight_std"), [(12, 6, 0.5), (8, 12, 1.0)])
def test_rbm_within_two_hundredths(num_visible, num_hidden, weight_std):
    energy = energies.rbm(num_visible=num_visible, num_hidden=num_hidden, weight_std=weight_std)
    found = log_partition(energy, generator=generator(), num_chains=1500, num_temperatures=150)
    expected = exact_log_partition(energy, method="enumerate")
    agrees(found, expected, precision=0.012)
    assert abs(found.combined - expected) < 0.02


@pytest.mark.parametrize("beta", [0.2, 0.4])
def test_ising_4x4(beta):
    energy = energies.ising(shape=(4, 4), coupling=1.0, field=0.3)
    found = log_partition(
        energy, generator=generator(), temperature=1 / beta, num_chains=1000, num_temperatures=200
    )
    expected = exact_log_partition(energy, method="enumerate", temperature=1 / beta)
    agrees(found, expected, precision=0.03)


def test_potts_of_one_hot_sites():
    energy = energies.make("potts", shape=(2, 3), num_values=3, coupling=0.8)
    found = log_partition(energy, generator=generator(), num_chains=1000, num_temperatures=80)
    agrees(found, exact_log_partition(energy, method="enumerate"))


def test_without_exact_draws_the_reverse_start_says_so_and_still_brackets():
    well = energies.double_well(depth=1.0)

    def energy(x):
        return well(x)

    found = log_partition(
        energy,
        EventSpec((1,), "real"),
        generator=generator(),
        num_chains=1000,
        num_temperatures=40,
    )
    assert not found.exact_start
    agrees(found, exact_log_partition(well))


def test_a_short_path_is_below_going_up_and_above_coming_down():
    # 8 dimensions, 25 times narrower: three temperatures leave a wide bracket.
    energy = energies.quadratic(precision=[25.0] * 8)
    expected = exact_log_partition(energy)
    ups, downs = [], []
    for seed in range(20):
        found = log_partition(energy, generator=generator(seed), num_chains=8, num_temperatures=3)
        ups.append(found.forward)
        downs.append(found.reverse)
    up, down = torch.tensor(ups), torch.tensor(downs)
    assert float(up.mean() + 4 * up.std() / math.sqrt(20)) < expected
    assert float(down.mean() - 4 * down.std() / math.sqrt(20)) > expected


def test_standard_errors_are_those_of_repetition():
    energy = energies.double_well(depth=2.0)
    found = [
        log_partition(energy, generator=generator(seed), num_chains=200, num_temperatures=20)
        for seed in range(40)
    ]
    for name in ("forward", "reverse", "combined"):
        spread = float(torch.tensor([getattr(one, name) for one in found]).std())
        claimed = sum(getattr(one, f"{name}_se") for one in found) / len(found)
        # The spread of 40 is itself known to sqrt(1/78) = 11%.
        assert abs(claimed / spread - 1) < 4 * math.sqrt(1 / 78)


def test_same_generator_gives_the_same_estimate_and_parameters_keep_no_gradient():
    energy = energies.rbm(num_visible=6, num_hidden=4)
    runs = [
        log_partition(energy, generator=generator(), num_chains=50, num_temperatures=10)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert all(parameter.grad is None for parameter in energy.parameters())
    assert all(parameter.requires_grad for parameter in energy.parameters())


def test_fitted_bases_have_the_moments_of_the_data():
    data = (torch.rand(4000, 3, generator=generator()) < torch.tensor([0.1, 0.5, 0.9])).float()
    binary = base_law(EventSpec((3,), "binary"), data)
    draws = binary.sample(20_000, generator(1))
    error = 4 * (data.mean(dim=0) * (1 - data.mean(dim=0)) / 20_000).sqrt() + 1e-3
    assert bool(((draws.mean(dim=0) - data.mean(dim=0)).abs() < error).all())
    assert binary.log_z() == pytest.approx(
        exact_log_partition(binary, EventSpec((3,), "binary"), method="enumerate"), abs=1e-6
    )
    one_hot = torch.nn.functional.one_hot(torch.tensor([[0, 2], [0, 1], [0, 2]]), 3).float()
    spec = EventSpec((2, 3), "categorical")
    categorical = base_law(spec, one_hot)
    assert categorical.log_z() == pytest.approx(
        exact_log_partition(categorical, spec, method="enumerate"), abs=1e-6
    )
    share = categorical.sample(20_000, generator(2)).mean(dim=0)
    expected = (one_hot.sum(dim=0) + 1) / 6
    assert bool(((share - expected).abs() < 4 * (0.25 / 20_000) ** 0.5).all())
    real = base_law(EventSpec((2,), "real"), torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    assert isinstance(real, GaussianBase)
    assert real.mean.tolist() == [1.0, 5.0]
    assert real.std[1] == pytest.approx(0.05 * 2**0.5)


def test_log_likelihood_of_a_gaussian():
    energy = energies.quadratic(precision=[2.0, 2.0])
    x = 0.5**0.5 * torch.empty(50_000, 2).normal_(generator=generator())
    mean, error = log_likelihood(energy, x, energy.log_z())
    assert abs(mean - (-1 - math.log(math.pi))) < 4 * error
    assert error == pytest.approx(1 / math.sqrt(50_000), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"num_chains": 1}, "num_chains >= 2"),
        ({"samples": torch.zeros(4, 3)}, "samples: expected"),
        ({"kernel": samplers.make("mala", step_size=0.1, temperature=2.0)}, "kernel"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_partition(energies.double_well(depth=1.0), generator=generator(), **arguments)
