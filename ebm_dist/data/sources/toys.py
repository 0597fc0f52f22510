"""Toy distributions with exact samples, to check what an energy has learnt."""

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
    """A distribution with exact samples."""

    spec: EventSpec
    law: str
    """The density or the recipe, in one line."""
    draw: Draw
    """`draw(num, rng)`: x (num, *shape) float64 and labels (num,) or None."""


TOYS: dict[str, Toy] = {}


def toy(name: str) -> Toy:
    """The toy `name`; raises UserError with the nearest name if it is unknown."""
    if name not in TOYS:
        raise UserError(
            f"data.source: unknown toy {name!r}{nearest(name, TOYS)}; known: "
            + ", ".join(sorted(TOYS))
        )
    return TOYS[name]


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

    spec = EventSpec((dim,), "real", num_components if labelled else None)
    TOYS[name] = Toy(spec, law, draw)


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


TOYS["ring"] = Toy(
    EventSpec((2,), "real"),
    "density proportional to exp(-(|x| - 2)^2 / (2 * .2^2)), the `ring` energy at T = 1",
    _draw_ring,
)

_RINGS, _RINGS_STD = np.array([0.5, 1.0, 1.5, 2.0]), 0.08


def _draw_rings(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(4, size=num)
    return _on_circle(_RINGS[label] + _RINGS_STD * rng.standard_normal(num), rng), label


TOYS["rings"] = Toy(
    EventSpec((2,), "real", 4),
    "radius N(r_k, .08^2), r_k one of .5, 1, 1.5, 2 with equal chance, angle uniform",
    _draw_rings,
)

_MOONS_STD = 0.1


def _draw_moons(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(2, size=num)
    angle = rng.uniform(0.0, np.pi, num)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x = np.where(label[:, None] == 0, upper, np.array([1.0, 0.5]) - upper)
    return x - np.array([0.5, 0.25]) + _MOONS_STD * rng.standard_normal((num, 2)), label


TOYS["two_moons"] = Toy(
    EventSpec((2,), "real", 2),
    "half circles (cos a, sin a) and (1 - cos a, 1/2 - sin a), a ~ U[0, pi], centred, + N(0, .1^2)",
    _draw_moons,
)


def _draw_checkerboard(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    column = rng.integers(-2, 2, num)
    row = 2 * rng.integers(-1, 1, num) + column % 2
    return np.stack([column, row], axis=1) + rng.uniform(0.0, 1.0, (num, 2)), None


TOYS["checkerboard"] = Toy(
    EventSpec((2,), "real"),
    "uniform on the squares of [-2, 2]^2 with floor(x) + floor(y) even",
    _draw_checkerboard,
)


def _draw_pinwheel(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(5, size=num)
    radial = 1.0 + 0.3 * rng.standard_normal(num)
    tangential = 0.1 * rng.standard_normal(num)
    angle = 2 * np.pi * label / 5 + 0.25 * np.exp(radial)
    cos, sin = np.cos(angle), np.sin(angle)
    x = np.stack([cos * radial - sin * tangential, sin * radial + cos * tangential], axis=1)
    return 2.0 * x, label


TOYS["pinwheel"] = Toy(
    EventSpec((2,), "real", 5),
    "2 R(2 pi k / 5 + e^r / 4) (r, t), r ~ N(1, .3^2), t ~ N(0, .1^2), k uniform (Johnson 2016)",
    _draw_pinwheel,
)


def _draw_swiss_roll(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    t = 1.5 * np.pi * (1 + 2 * rng.uniform(0.0, 1.0, num))
    x = 1 / 7 * t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)
    return x + 0.1 * rng.standard_normal((num, 2)), None


TOYS["swiss_roll"] = Toy(
    EventSpec((2,), "real"),
    "t (cos t, sin t) / 7 + N(0, .1^2), t ~ U[3 pi / 2, 9 pi / 2]",
    _draw_swiss_roll,
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


TOYS["double_well"] = Toy(
    EventSpec((1,), "real"),
    "density proportional to exp(-4 (x^2 - 1)^2), the `double_well` energy of depth 4 at T = 1",
    _draw_double_well,
)


# -- discrete laws

_SIDE = 4


def _draw_bars(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(2, size=num)
    lines = rng.integers(2, size=(num, _SIDE))
    rows = np.repeat(lines[:, :, None], _SIDE, axis=2)
    return np.where(label[:, None, None] == 0, rows, rows.transpose(0, 2, 1)), label


TOYS["bars_and_stripes"] = Toy(
    EventSpec((_SIDE, _SIDE), "binary", 2),
    "4x4 bits: rows (label 0) or columns (label 1), each line on with chance 1/2",
    _draw_bars,
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


TOYS["ising"] = Toy(
    EventSpec((_SIDE, _SIDE), "binary"),
    "4x4 periodic Ising model, exp(.4 sum s_i s_j) over neighbours, s = 2x - 1, by enumeration",
    _draw_ising,
)

_SITES, _STATES = 8, 4


def _draw_potts(num: int, rng: np.random.Generator) -> tuple[np.ndarray, None]:
    # On an open chain exp(sum [s_i = s_{i+1}]) is a Markov chain that stays with this probability.
    probability = np.e / (np.e + _STATES - 1)
    site = rng.integers(_STATES, size=(num, _SITES))
    stay = rng.uniform(size=(num, _SITES)) < probability
    move = rng.integers(1, _STATES, size=(num, _SITES))
    for k in range(1, _SITES):
        site[:, k] = (site[:, k - 1] + np.where(stay[:, k], 0, move[:, k])) % _STATES
    return np.eye(_STATES)[site], None


TOYS["potts_chain"] = Toy(
    EventSpec((_SITES, _STATES), "categorical"),
    "open chain of 8 sites with 4 states, exp(sum [s_i = s_{i+1}]), one-hot",
    _draw_potts,
)
