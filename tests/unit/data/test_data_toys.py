"""Toy sources: the shards hold samples of the law that the toy documents."""

from __future__ import annotations

import numpy as np
import pytest

from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, describe, load_split
from ebm_dist.data.sources.toys import ISING_COUPLING, TOYS, toy

NUM = 100_000


@pytest.mark.parametrize("name", sorted(TOYS))
def test_toy_has_the_moments_of_its_law(name: str):
    law = TOYS[name]
    x, label = law.draw(NUM, np.random.default_rng(11))
    assert x.shape == (NUM, *law.spec.shape)
    x = x.reshape(NUM, -1).astype(np.float64)
    mean, covariance = law.moments()
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
    mean, _ = TOYS[name].moments()
    assert (np.abs(x.mean(axis=0) - mean) < 4 * x.std(axis=0) / 4000**0.5).all()
    if not spec.discrete:
        assert not set(map(tuple, train.x.tolist())) & set(map(tuple, test.x.tolist()))


def test_unknown_toy_names_the_nearest():
    with pytest.raises(UserError, match="two_moons"):
        describe(DataConfig(source="toy:twomoons"))
