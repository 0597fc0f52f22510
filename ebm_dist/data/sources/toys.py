"""Toy distributions with known moments, to check what an energy has learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebm_dist.core.errors import UserError
from ebm_dist.core.section import nearest
from ebm_dist.core.types import EventSpec

Array = NDArray[np.floating[Any]]
Draw = Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True, slots=True)
class Toy:
    """A distribution with exact samples and known first two moments."""

    spec: EventSpec
    law: str
    """The density or the recipe, in one line."""
    draw: Draw
    """`draw(num, rng)`: x (num, *shape) float64 and labels (num,) or None."""
    moments: Callable[[], tuple[Array, Array]]
    """Mean (D,) and covariance (D, D) of the flattened event, in closed form, by quadrature or
    by enumeration."""


TOYS: dict[str, Toy] = {}


def toy(name: str) -> Toy:
    """The toy `name`; raises UserError with the nearest name if it is unknown."""
    if name not in TOYS:
        raise UserError(
            f"data.source: unknown toy {name!r}{nearest(name, TOYS)}; known: "
            + ", ".join(sorted(TOYS))
        )
    return TOYS[name]


def _add(
    name: str,
    law: str,
    draw: Draw,
    moments: Callable[[], tuple[Array, Array]],
    spec: EventSpec,
) -> None:
    TOYS[name] = Toy(spec, law, draw, moments)


# -- Gaussians and their mixtures


def _add_mixture(
    name: str, law: str, means: Array, covariance: Array, weights: Array, *, labelled: bool
) -> None:
    num_components, dim = means.shape
    factor = np.linalg.cholesky(covariance)

    def draw(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        label = rng.choice(num_components, size=num, p=weights)
        x = means[label] + rng.standard_normal((num, dim)) @ factor.T
        return x, label if labelled else None

    def moments() -> tuple[Array, Array]:
        mean = weights @ means
        centred = means - mean
        return mean, covariance + (centred * weights[:, None]).T @ centred

    spec = EventSpec((dim,), "real", num_components if labelled else None)
    _add(name, law, draw, moments, spec)


def _add_gaussian(name: str, law: str, mean: list[float], covariance: list[list[float]]) -> None:
    _add_mixture(name, law, np.array([mean]), np.array(covariance), np.ones(1), labelled=False)


_add_gaussian("unit_gaussian_1d", "N(0, 1)", [0.0], [[1.0]])
_add_gaussian("shifted_gaussian_1d", "N(1, 1)", [1.0], [[1.0]])
_add_gaussian("gaussian", "N(0, I), 2-D", [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
_add_gaussian(
    "correlated_gaussian",
    "N(0, [[1, .8], [.8, 1]])",
    [0.0, 0.0],
    [[1.0, 0.8], [0.8, 1.0]],
)
_add_gaussian("shifted_gaussian", "N((2, -1), I / 4), 2-D", [2.0, -1.0], [[0.25, 0.0], [0.0, 0.25]])
_add_mixture(
    "two_gaussians_1d",
    "N(-3, 1) / 2 + N(3, 1) / 2",
    np.array([[-3.0], [3.0]]),
    np.eye(1),
    np.array([0.5, 0.5]),
    labelled=True,
)
_add_mixture(
    "unequal_modes",
    ".8 N(-3, .25) + .2 N(3, .25), 1-D: far modes, whose weights not every objective sees",
    np.array([[-3.0], [3.0]]),
    0.25 * np.eye(1),
    np.array([0.8, 0.2]),
    labelled=True,
)
_add_mixture(
    "gaussian_mixture",
    ".5 N((-2, 0), .25 I) + .3 N((2, 0), .25 I) + .2 N((0, 2), .25 I)",
    np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]),
    0.25 * np.eye(2),
    np.array([0.5, 0.3, 0.2]),
    labelled=True,
)
_ANGLES = np.arange(8) * np.pi / 4
_add_mixture(
    "8gaussians",
    "eight equal N(m_k, .04 I), m_k on the circle of radius 2",
    2.0 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1),
    0.04 * np.eye(2),
    np.full(8, 1 / 8),
    labelled=True,
)


# -- curves and regions of the plane


def _on_circle(radius: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0.0, 2 * np.pi, len(radius))
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _isotropic(mean_square: float) -> tuple[Array, Array]:
    """Moments of a law that is invariant under a rotation by less than a half turn."""
    return np.zeros(2), mean_square / 2 * np.eye(2)


RING_RADIUS, RING_WIDTH = 2.0, 0.2


def _draw_ring(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    # In polar coordinates the density is rho * exp(-(rho - r)^2 / 2 s^2): accept a normal rho in
    # proportion to rho. The mass of a normal above r + 8 s is negligible in double precision.
    top = RING_RADIUS + 8 * RING_WIDTH
    kept: list[np.ndarray] = []
    missing = num
    while missing > 0:
        rho = RING_RADIUS + RING_WIDTH * rng.standard_normal(3 * missing + 16)
        rho = rho[rng.uniform(0.0, top, len(rho)) < rho][:missing]
        kept.append(rho)
        missing -= len(rho)
    return _on_circle(np.concatenate(kept), rng), None


_add(
    "ring",
    "density proportional to exp(-(|x| - 2)^2 / (2 * .2^2)), the `ring` energy at T = 1",
    _draw_ring,
    # E rho^2 = E_N[rho^3] / E_N[rho]; the mass of N(2, .2^2) below 0 is 1e-23.
    lambda: _isotropic(RING_RADIUS**2 + 3 * RING_WIDTH**2),
    EventSpec((2,), "real"),
)

_RINGS, _RINGS_STD = np.array([0.5, 1.0, 1.5, 2.0]), 0.08


def _draw_rings(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(4, size=num)
    return _on_circle(_RINGS[label] + _RINGS_STD * rng.standard_normal(num), rng), label


_add(
    "rings",
    "radius N(r_k, .08^2), r_k one of .5, 1, 1.5, 2 with equal chance, angle uniform",
    _draw_rings,
    lambda: _isotropic(float(np.mean(_RINGS**2)) + _RINGS_STD**2),
    EventSpec((2,), "real", 4),
)

_MOONS_STD = 0.1


def _draw_moons(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(2, size=num)
    angle = rng.uniform(0.0, np.pi, num)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x = np.where(label[:, None] == 0, upper, np.array([1.0, 0.5]) - upper)
    return x - np.array([0.5, 0.25]) + _MOONS_STD * rng.standard_normal((num, 2)), label


def _moons_moments() -> tuple[Array, Array]:
    apart = 4 / np.pi - 0.5  # between the mean heights of the two moons
    xx = 0.5 + 0.25 + _MOONS_STD**2
    yy = 0.5 - 4 / np.pi**2 + apart**2 / 4 + _MOONS_STD**2
    return np.zeros(2), np.array([[xx, -apart / 4], [-apart / 4, yy]])


_add(
    "two_moons",
    "half circles (cos a, sin a) and (1 - cos a, 1/2 - sin a), a ~ U[0, pi], centred, + N(0, .1^2)",
    _draw_moons,
    _moons_moments,
    EventSpec((2,), "real", 2),
)


def _draw_checkerboard(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    column = rng.integers(-2, 2, num)
    row = 2 * rng.integers(-1, 1, num) + column % 2
    return np.stack([column, row], axis=1) + rng.uniform(0.0, 1.0, (num, 2)), None


_add(
    "checkerboard",
    "uniform on the squares of [-2, 2]^2 with floor(x) + floor(y) even",
    _draw_checkerboard,
    lambda: (np.zeros(2), np.array([[4 / 3, 1 / 4], [1 / 4, 4 / 3]])),
    EventSpec((2,), "real"),
)


def _draw_pinwheel(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(5, size=num)
    radial = 1.0 + 0.3 * rng.standard_normal(num)
    tangential = 0.1 * rng.standard_normal(num)
    angle = 2 * np.pi * label / 5 + 0.25 * np.exp(radial)
    cos, sin = np.cos(angle), np.sin(angle)
    x = np.stack([cos * radial - sin * tangential, sin * radial + cos * tangential], axis=1)
    return 2.0 * x, label


_add(
    "pinwheel",
    "2 R(2 pi k / 5 + e^r / 4) (r, t), r ~ N(1, .3^2), t ~ N(0, .1^2), k uniform (Johnson 2016)",
    _draw_pinwheel,
    lambda: _isotropic(4 * (1.0 + 0.3**2 + 0.1**2)),
    EventSpec((2,), "real", 5),
)

_ROLL_SCALE, _ROLL_STD = 1 / 7, 0.1


def _roll(t: np.ndarray) -> np.ndarray:
    return _ROLL_SCALE * t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)


def _draw_swiss_roll(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    x = _roll(1.5 * np.pi * (1 + 2 * rng.uniform(0.0, 1.0, num)))
    return x + _ROLL_STD * rng.standard_normal((num, 2)), None


def _swiss_roll_moments() -> tuple[Array, Array]:
    middle = (np.arange(200_000) + 0.5) / 200_000  # the midpoint rule, error below 1e-9
    x = _roll(1.5 * np.pi * (1 + 2 * middle))
    covariance = np.cov(x.T, bias=True) + _ROLL_STD**2 * np.eye(2)
    return x.mean(axis=0), np.asarray(covariance, dtype=np.float64)


_add(
    "swiss_roll",
    "t (cos t, sin t) / 7 + N(0, .1^2), t ~ U[3 pi / 2, 9 pi / 2]",
    _draw_swiss_roll,
    _swiss_roll_moments,
    EventSpec((2,), "real"),
)


@cache
def _double_well_grid() -> tuple[Array, Array]:
    """Bin edges (N + 1,) and bin masses (N,) of exp(-4 (x^2 - 1)^2)."""
    edges = np.linspace(-2.5, 2.5, 100_001)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = np.exp(-4 * (middle**2 - 1) ** 2)
    return edges, mass / mass.sum()


def _draw_double_well(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    edges, mass = _double_well_grid()
    cumulative = np.concatenate([[0.0], np.cumsum(mass)])
    return np.interp(rng.uniform(0.0, cumulative[-1], (num, 1)), cumulative, edges), None


def _double_well_moments() -> tuple[Array, Array]:
    edges, mass = _double_well_grid()
    middle = (edges[1:] + edges[:-1]) / 2
    return np.zeros(1), np.array([[float(mass @ middle**2)]])


_add(
    "double_well",
    "density proportional to exp(-4 (x^2 - 1)^2), the `double_well` energy of depth 4 at T = 1",
    _draw_double_well,
    _double_well_moments,
    EventSpec((1,), "real"),
)


# -- discrete laws

_SIDE = 4


def _draw_bars(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(2, size=num)
    lines = rng.integers(2, size=(num, _SIDE))
    rows = np.repeat(lines[:, :, None], _SIDE, axis=2)
    return np.where(label[:, None, None] == 0, rows, rows.transpose(0, 2, 1)), label


def _bars_moments() -> tuple[Array, Array]:
    row, column = np.divmod(np.arange(_SIDE**2), _SIDE)
    same_row, same_column = row[:, None] == row, column[:, None] == column
    return np.full(_SIDE**2, 0.5), (same_row * 1.0 + same_column) / 8


_add(
    "bars_and_stripes",
    "4x4 bits: rows (label 0) or columns (label 1), each line on with chance 1/2",
    _draw_bars,
    _bars_moments,
    EventSpec((_SIDE, _SIDE), "binary", 2),
)

ISING_COUPLING = 0.4


@cache
def _ising_table() -> tuple[np.ndarray, Array]:
    """All 2^16 states (65536, 4, 4) as bits, and their probabilities (65536,)."""
    codes = np.arange(2 ** (_SIDE**2))
    bits = (codes[:, None] >> np.arange(_SIDE**2)) & 1
    spins = (2.0 * bits - 1).reshape(-1, _SIDE, _SIDE)
    bonds = spins * np.roll(spins, 1, axis=1) + spins * np.roll(spins, 1, axis=2)
    log_weight = ISING_COUPLING * bonds.sum(axis=(1, 2))
    weight = np.exp(log_weight - log_weight.max())
    return bits.reshape(-1, _SIDE, _SIDE).astype(np.uint8), weight / weight.sum()


def _draw_ising(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    states, probability = _ising_table()
    return states[rng.choice(len(states), size=num, p=probability)], None


def _ising_moments() -> tuple[Array, Array]:
    states, probability = _ising_table()
    x = states.reshape(len(states), -1).astype(np.float64)
    mean = probability @ x
    return mean, (x * probability[:, None]).T @ x - np.outer(mean, mean)


_add(
    "ising",
    "4x4 periodic Ising model, exp(.4 sum s_i s_j) over neighbours, s = 2x - 1, by enumeration",
    _draw_ising,
    _ising_moments,
    EventSpec((_SIDE, _SIDE), "binary"),
)

_SITES, _STATES, _POTTS_COUPLING = 8, 4, 1.0


def _stay_probability() -> float:
    return float(np.exp(_POTTS_COUPLING) / (np.exp(_POTTS_COUPLING) + _STATES - 1))


def _draw_potts(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    # On an open chain exp(sum [s_i = s_{i+1}]) is a Markov chain that stays with this probability.
    site = rng.integers(_STATES, size=(num, _SITES))
    stay = rng.uniform(size=(num, _SITES)) < _stay_probability()
    move = rng.integers(1, _STATES, size=(num, _SITES))
    for k in range(1, _SITES):
        site[:, k] = (site[:, k - 1] + np.where(stay[:, k], 0, move[:, k])) % _STATES
    return np.eye(_STATES)[site], None


def _potts_moments() -> tuple[Array, Array]:
    # The transition matrix is 1/q + rho^k (I - 1/q) after k sites.
    rho = (_STATES * _stay_probability() - 1) / (_STATES - 1)
    distance = np.abs(np.subtract.outer(np.arange(_SITES), np.arange(_SITES)))
    within = (np.eye(_STATES) - 1 / _STATES) / _STATES
    return np.full(_SITES * _STATES, 1 / _STATES), np.kron(rho**distance, within)


_add(
    "potts_chain",
    "open chain of 8 sites with 4 states, exp(sum [s_i = s_{i+1}]), one-hot",
    _draw_potts,
    _potts_moments,
    EventSpec((_SITES, _STATES), "categorical"),
)
