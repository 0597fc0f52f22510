"""log Z of a model whose chains are clamped is over the box that they live in."""

from __future__ import annotations

import math

import pytest
import torch

from ebm_dist import energies, samplers
from ebm_dist.core.types import EventSpec
from ebm_dist.evaluation import base_law, exact_log_partition, log_partition
from ebm_dist.samplers.law import box

IMAGE = EventSpec((1, 4, 4), "image")


def log_z_in_the_cube(precision: float, mean: float) -> float:
    """Of the 16 coordinates of exp(-precision (x - mean)^2 / 2) on [-1, 1]."""
    root = math.sqrt(precision / 2)
    mass = 0.5 * (math.erf(root * (1 - mean)) - math.erf(root * (-1 - mean)))
    return 16 * (0.5 * math.log(2 * math.pi / precision) + math.log(mass))


@pytest.mark.parametrize(("precision", "mean", "fitted"), [(0.5, 0.0, False), (20.0, -1.0, True)])
def test_annealing_in_the_cube_finds_its_volume(precision, mean, fitted):
    # Over all of space log Z is 10.4 and 11.1 nats larger.
    def energy(x):
        return 0.5 * precision * (x - mean).square().flatten(1).sum(1)

    generator = torch.Generator().manual_seed(0)
    data = torch.rand(500, 1, 4, 4, generator=generator).mul(0.5).sub(1.0).clamp(-1, 1)
    base = base_law(IMAGE, data if fitted else None, box=(-1.0, 1.0))
    found = log_partition(
        energy, IMAGE, generator=generator, num_chains=64, num_temperatures=60, base=base,
        box=(-1.0, 1.0),
    )  # fmt: skip
    assert 0 < found.combined_se < 0.2
    assert abs(found.combined - log_z_in_the_cube(precision, mean)) < 4 * found.combined_se


def test_the_base_of_the_box_is_normalised_and_stays_inside():
    base = base_law(EventSpec((1,), "real"), std=0.7, box=(-0.5, 2.0))
    x = torch.linspace(-0.5, 2.0, 100_001, dtype=torch.float64)[:, None]
    integral = torch.trapezoid((-base(x)).exp(), x[:, 0])
    assert base.log_z() == pytest.approx(math.log(integral), abs=1e-6)
    drawn = base.sample(20_000, torch.Generator().manual_seed(0))
    assert drawn.min() >= -0.5
    assert drawn.max() <= 2
    weight = (-base(x)).exp() / integral
    mean = torch.trapezoid(weight * x[:, 0], x[:, 0])
    assert abs(float(drawn.mean() - mean)) < 4 * float(drawn.std()) / 20_000**0.5


def test_exact_log_z_of_clamped_chains_is_over_their_range():
    energy = energies.quadratic(precision=[1.0])
    inside = exact_log_partition(energy, box=(-1.0, 1.0))
    whole = exact_log_partition(energy)
    assert inside - whole == pytest.approx(math.log(math.erf(1 / math.sqrt(2))), abs=1e-6)


def test_the_box_is_that_of_the_sampler_or_of_the_one_inside():
    params = {"step_size": 0.1, "clamp": (-1.0, 1.0)}
    assert box(samplers.make("langevin", temperature=1.0, **params)) == (-1.0, 1.0)
    inner = {"name": "langevin", **params}
    assert box(samplers.make("parallel_tempering", kernel=inner, temperatures=[1.0, 2.0])) == (
        -1.0,
        1.0,
    )
    assert box(samplers.make("mala", step_size=0.1)) is None
