"""Toy sources: the shards hold samples of the law that the toy documents."""

from __future__ import annotations

import numpy as np
import pytest

from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, describe, load_split
from ebm_dist.data.sources.toys import ISING_COUPLING, TOYS, toy

NUM = 100_000


def mixture(means, variance, weights):
    """Mean and covariance of a mixture of N(m_k, variance I)."""
    means, weights = np.array(means), np.array(weights)
    mean = weights @ means
    spread = means - mean
    return mean, variance * np.eye(len(mean)) + (spread * weights[:, None]).T @ spread


def isotropic(mean_square):
    """Of a law of the plane that is invariant under a rotation by less than a half turn."""
    return np.zeros(2), mean_square / 2 * np.eye(2)


def of_points(x, weights):
    """Of weighted points (N, D)."""
    mean = weights @ x
    return mean, (x * weights[:, None]).T @ x - np.outer(mean, mean)


def eight_gaussians():
    angle = np.arange(8) * np.pi / 4
    return mixture(2 * np.stack([np.cos(angle), np.sin(angle)], 1), 0.04, np.full(8, 1 / 8))


def two_moons():
    apart = 4 / np.pi - 0.5  # between the mean heights of the two moons
    yy = 0.5 - 4 / np.pi**2 + apart**2 / 4 + 0.1**2
    return np.zeros(2), np.array([[0.76, -apart / 4], [-apart / 4, yy]])


def swiss_roll():
    t = 1.5 * np.pi * (1 + 2 * (np.arange(200_000) + 0.5) / 200_000)
    x = t[:, None] / 7 * np.stack([np.cos(t), np.sin(t)], axis=1)
    mean, covariance = of_points(x, np.full(len(x), 1 / len(x)))
    return mean, covariance + 0.1**2 * np.eye(2)


def double_well():
    x = np.linspace(-2.5, 2.5, 100_001)
    weight = np.exp(-4 * (x**2 - 1) ** 2)
    return of_points(x[:, None], weight / weight.sum())


def bars_and_stripes():
    row, column = np.divmod(np.arange(16), 4)
    same_row, same_column = row[:, None] == row, column[:, None] == column
    return np.full(16, 0.5), (same_row * 1.0 + same_column) / 8


def ising():
    bits = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    spin = (2.0 * bits - 1).reshape(-1, 4, 4)
    bonds = (spin * np.roll(spin, 1, 1) + spin * np.roll(spin, 1, 2)).sum(axis=(1, 2))
    weight = np.exp(ISING_COUPLING * (bonds - bonds.max()))
    return of_points(bits.astype(np.float64), weight / weight.sum())


def potts_chain():
    # The transition matrix is 1/q + rho^k (I - 1/q) after k sites.
    rho = (4 * np.e / (np.e + 3) - 1) / 3
    distance = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    return np.full(32, 1 / 4), np.kron(rho**distance, (np.eye(4) - 1 / 4) / 4)


# Mean (D,) and covariance (D, D) of the flattened event of each toy.
MOMENTS = {
    "unit_gaussian_1d": lambda: (np.zeros(1), np.eye(1)),
    "shifted_gaussian_1d": lambda: (np.ones(1), np.eye(1)),
    "gaussian": lambda: (np.zeros(2), np.eye(2)),
    "correlated_gaussian": lambda: (np.zeros(2), np.array([[1, 0.8], [0.8, 1]])),
    "shifted_gaussian": lambda: (np.array([2.0, -1.0]), np.eye(2) / 4),
    "two_gaussians_1d": lambda: mixture([[-3], [3]], 1, [0.5, 0.5]),
    "unequal_modes": lambda: mixture([[-3], [3]], 0.25, [0.8, 0.2]),
    "gaussian_mixture": lambda: mixture([[-2, 0], [2, 0], [0, 2]], 0.25, [0.5, 0.3, 0.2]),
    "8gaussians": eight_gaussians,
    # E rho^2 = E_N[rho^3] / E_N[rho]; the mass of N(2, .2^2) below 0 is 1e-23.
    "ring": lambda: isotropic(2**2 + 3 * 0.2**2),
    "rings": lambda: isotropic((0.5**2 + 1 + 1.5**2 + 2**2) / 4 + 0.08**2),
    "two_moons": two_moons,
    "checkerboard": lambda: (np.zeros(2), np.array([[4 / 3, 1 / 4], [1 / 4, 4 / 3]])),
    "pinwheel": lambda: isotropic(4 * (1 + 0.3**2 + 0.1**2)),
    "swiss_roll": swiss_roll,
    "double_well": double_well,
    "bars_and_stripes": bars_and_stripes,
    "ising": ising,
    "potts_chain": potts_chain,
}


@pytest.mark.parametrize("name", sorted(TOYS))
def test_toy_has_the_moments_of_its_law(name: str):
    law = TOYS[name]
    x, label = law.draw(NUM, np.random.default_rng(11))
    assert x.shape == (NUM, *law.spec.shape)
    x = x.reshape(NUM, -1).astype(np.float64)
    mean, covariance = MOMENTS[name]()
    mean_error = x.std(axis=0) / NUM**0.5
    assert (np.abs(x.mean(axis=0) - mean) <= 4 * mean_error + 1e-12).all()
    centred = x - mean
    second = centred.T @ centred / NUM
    error = (((centred**2).T @ centred**2 / NUM - second**2).clip(min=0) / NUM) ** 0.5
    assert (np.abs(second - covariance) <= 4.5 * error + 1e-12).all()
    # The tolerance sees a scale that is 5% wrong, in the direction of largest variance.
    top = int(np.argmax(np.diag(covariance)))
    assert 4.5 * error[top, top] < 0.1 * covariance[top, top]
    if label is not None:
        assert law.spec.num_classes is not None
        assert set(np.unique(label)) == set(range(law.spec.num_classes))


def test_ring_has_the_radial_density_of_its_energy():
    from scipy.integrate import quad

    x, _ = toy("ring").draw(NUM, np.random.default_rng(3))
    radius = np.linalg.norm(x, axis=1)

    def density(rho: float) -> float:
        return rho * np.exp(-((rho - 2) ** 2) / (2 * 0.2**2))

    mass = quad(density, 0, 4)[0]
    for low, high in ((0, 1.7), (1.7, 2.0), (2.0, 2.3), (2.3, 4)):
        expected = quad(density, low, high)[0] / mass
        share = float(np.mean((radius >= low) & (radius < high)))
        assert abs(share - expected) < 4 * (expected * (1 - expected) / NUM) ** 0.5


def test_checkerboard_fills_the_even_squares_alone():
    x, _ = toy("checkerboard").draw(NUM, np.random.default_rng(3))
    cell = np.floor(x).astype(int)
    assert (cell.sum(axis=1) % 2 == 0).all()
    _, counts = np.unique(cell, axis=0, return_counts=True)
    assert len(counts) == 8
    assert (np.abs(counts / NUM - 1 / 8) < 4 * (1 / 8 * 7 / 8 / NUM) ** 0.5).all()


def test_ising_toy_matches_the_known_energy_and_magnetisation():
    # 4x4 periodic, beta J = .4: E/N = -1.379116, |m| = .764712 by enumeration elsewhere.
    assert ISING_COUPLING == 0.4
    x, _ = toy("ising").draw(NUM, np.random.default_rng(3))
    spin = 2.0 * x - 1
    energy = -(spin * np.roll(spin, 1, 1) + spin * np.roll(spin, 1, 2)).sum(axis=(1, 2)) / 16
    size = np.abs(spin.mean(axis=(1, 2)))
    assert abs(energy.mean() + 1.379116) < 4 * energy.std() / NUM**0.5
    assert abs(size.mean() - 0.764712) < 4 * size.std() / NUM**0.5


def test_double_well_toy_matches_the_quadrature():
    x, _ = toy("double_well").draw(NUM, np.random.default_rng(3))
    assert abs((x**2).mean() - 0.917671) < 4 * (x**2).std() / NUM**0.5


def test_bars_and_stripes_draws_only_bars_or_stripes():
    x, label = toy("bars_and_stripes").draw(2000, np.random.default_rng(3))
    rows = (x == x[:, :, :1]).all(axis=(1, 2))
    columns = (x == x[:, :1, :]).all(axis=(1, 2))
    assert label is not None
    assert (np.where(label == 0, rows, columns)).all()


@pytest.mark.parametrize("name", ["two_moons", "ising", "potts_chain"])
def test_shards_of_a_toy_hold_its_law(name: str, tmp_path):
    config = DataConfig(source=f"toy:{name}", cache_dir=str(tmp_path), toy_samples=4000)
    train, test = load_split(config, "train"), load_split(config, "test")
    spec = describe(config)
    assert spec == TOYS[name].spec
    assert train.x.shape == (4000, *spec.shape)
    assert test.x.shape == (1000, *spec.shape)
    assert (train.label is None) == (spec.num_classes is None)
    x = train.x.reshape(4000, -1).double().numpy()
    mean, _ = MOMENTS[name]()
    assert (np.abs(x.mean(axis=0) - mean) < 4 * x.std(axis=0) / 4000**0.5).all()
    if not spec.discrete:
        assert not set(map(tuple, train.x.tolist())) & set(map(tuple, test.x.tolist()))


def test_unknown_toy_names_the_nearest():
    with pytest.raises(UserError, match="two_moons"):
        describe(DataConfig(source="toy:twomoons"))
