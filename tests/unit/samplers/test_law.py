"""What a sampler's chains have in place of exp(-E/T), measured and put into words."""

from __future__ import annotations

import math

import pytest
import torch

from ebm_dist import energies, samplers
from ebm_dist.core.types import EventSpec
from ebm_dist.export.model_card import sampler_law
from ebm_dist.samplers.law import at_temperature, curvature, effective_temperature, unadjusted

UNADJUSTED = {
    "langevin", "annealed_langevin", "flow_langevin", "preconditioned_langevin", "sghmc",
}  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def measured(kernel, energy, x: torch.Tensor) -> float:
    return curvature(kernel, energy, x, generator())


def test_curvature_of_a_quadratic_is_the_mean_of_its_diagonal():
    energy = energies.quadratic(precision=[[4.0, 1.0], [1.0, 1.0]])
    kernel = samplers.make("langevin", step_size=0.1, temperature=1.0)
    # A sign vector sees (4 + 1 + 2) / 2 or (4 + 1 - 2) / 2, half of the time each.
    x = torch.randn(20_000, 2, generator=generator())
    assert abs(measured(kernel, energy, x) - 2.5) < 4 * 1.0 / 20_000**0.5
    scaled = samplers.make("preconditioned_langevin", step_size=0.1, scales=(0.25, 1.0))
    assert abs(measured(scaled, energy, x) - 1.0) < 4 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("name", sorted(samplers.FAMILY.members.keys() - {"module"}))
def test_every_sampler_can_be_put_at_another_temperature(name):
    section = samplers.FAMILY.members[name]
    kernel = section(**{"name": name, **section.example}).build()
    cold = at_temperature(kernel, 0.25)
    assert cold.temperature == 0.25
    assert type(cold) is type(kernel)
    if ladder := getattr(kernel, "temperatures", None):
        ratios = [t / ladder[0] for t in ladder]
        assert [t / 0.25 for t in cold.temperatures] == pytest.approx(ratios)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("a", "h"), [(1.0, 0.1), (1.0, 1.0), (4.0, 0.2)])
def test_effective_temperature_is_that_of_the_known_biased_variance(a, h):
    # Variance 2T / (a (2 - a h)), and T_eff = a * variance.
    kernel = samplers.make("langevin", step_size=h, temperature=0.5)
    energy = energies.quadratic(precision=[a])
    hot = effective_temperature(kernel, measured(kernel, energy, torch.randn(8, 1)))
    assert hot == pytest.approx(2 * 0.5 / (2 - a * h))
    chain = samplers.run_chain(kernel, torch.randn(20_000, 1), energy, 80, generator())
    assert abs(a * float(chain.position.var()) / hot - 1) < 4 * (2 / 20_000) ** 0.5


def test_effective_temperature_of_sghmc_is_the_known_one():
    # (a, gamma, h) = (1, 1, .1): variance 1.002639.
    kernel = samplers.make("sghmc", step_size=0.1, friction=1.0)
    assert effective_temperature(kernel, 1.0) == pytest.approx(1.002639, abs=1e-6)


def test_a_step_beyond_the_curvature_has_no_temperature_and_a_concave_energy_that_of_the_noise():
    kernel = samplers.make("langevin", step_size=10.0, noise_std=0.01)
    assert math.isinf(effective_temperature(kernel, 0.2))
    assert effective_temperature(kernel, -3.0) == kernel.temperature


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_networks_have_a_curvature(name):
    spec = EventSpec((1, 8, 8), "image")
    energy = energies.FAMILY.section(name).bind(spec).build()  # type: ignore[attr-defined]
    kernel = samplers.make("langevin", step_size=0.1, temperature=1.0)
    assert math.isfinite(measured(kernel, energy, torch.randn(2, 1, 8, 8)))


@pytest.mark.parametrize("name", sorted(samplers.FAMILY.members.keys() - {"module"}))
def test_a_card_says_of_every_sampler_whether_its_law_is_that_of_the_model(name):
    section = samplers.FAMILY.members[name]
    section = section(**{"name": name, **section.example})
    inner = getattr(section, "kernel", None)
    exact = (inner.name if name == "parallel_tempering" else name) not in UNADJUSTED
    assert (unadjusted(section.build()) is None) == exact
    assert bool(sampler_law(section, None)) == (not exact)


def test_a_card_names_step_size_clipping_and_clamping():
    params = {"step_size": 10.0, "temperature": 0.5, "clamp": (-1.0, 1.0)}
    section = samplers.FAMILY.section("langevin", **params, grad_clip=0.03, precision="bf16")
    step, clip, clamp, precision = sampler_law(section, 0.02)
    assert "T_eff = T / (1 - a h / 2)" in step
    assert "curvature along the chains is 0.02: T_eff = 0.555556" in step
    assert clip.startswith("grad_clip = 0.03: ")
    assert clamp.startswith("clamp = [-1, 1]: ")
    assert precision.startswith("precision = bf16: ")
    assert "h is too long for it" in sampler_law(section, 0.3)[0]
    tempered = samplers.FAMILY.section(
        "parallel_tempering", kernel={"name": "langevin", **params}, temperatures=[0.5, 1.0]
    )
    assert sampler_law(tempered, 0.02)[0] == step
