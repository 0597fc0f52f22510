"""A kernel from outside is treated by what it says of itself, and never by its class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from ebm_dist import energies, samplers
from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EnergyFn
from ebm_dist.energies.family import EnergySection
from ebm_dist.export.model_card import sampler_law
from ebm_dist.jarzynski.kernel import weighted
from ebm_dist.jarzynski.weights import check_sampler
from ebm_dist.samplers import KernelSection
from ebm_dist.samplers.continuous.mala import Mala
from ebm_dist.samplers.law import effective_temperature, unadjusted
from ebm_dist.samplers.traits import KernelTraits, names_with, trait


@dataclass(frozen=True)
class Plain:
    """A kernel from outside with nothing but the interface."""

    temperature: float = 1.0

    def init(self, x: torch.Tensor, energy: EnergyFn):
        return Mala(0.5, self.temperature).init(x, energy)

    def step(self, state, energy: EnergyFn, generator: torch.Generator):
        return Mala(0.5, self.temperature).step(state, energy, generator)


@dataclass(frozen=True)
class Exact(Plain):
    reversible = True
    leaves_invariant = True


@dataclass(frozen=True)
class Biased(Plain):
    step_size: float = 0.5
    temperature_ratio_formula = "1 - a h"

    def temperature_ratio(self, curvature: float) -> float:
        return 1 - curvature * self.step_size


class Outside(KernelSection):
    name: str = "outside"

    def build(self) -> Biased:
        return Biased()


def ladder(kernel):
    return samplers.make("tempered_transitions", kernel=kernel, temperatures=(1.0, 2.0))


def test_a_kernel_that_says_it_is_reversible_goes_inside_tempered_transitions():
    assert ladder(Exact()).kernel == Exact()
    with pytest.raises(ValueError, match=r"reversible sampler inside: .*mala.* or \w+, got"):
        ladder(Plain())
    with pytest.raises(ValueError, match="cannot hold another tempered sampler"):
        ladder(replace(ladder(Exact())))


def test_a_kernel_that_keeps_the_law_carries_jarzynski_weights_and_one_that_is_silent_does_not():
    assert weighted(Exact()) == Exact()
    with pytest.raises(UserError, match=r"langevin \(unclipped\), or .*mala.*or \w+, or turn"):
        check_sampler(Outside())


def test_an_unadjusted_kernel_from_outside_has_an_effective_temperature_on_the_card():
    assert unadjusted(Biased()) == Biased()
    assert unadjusted(Plain()) is None
    assert effective_temperature(Biased(temperature=2.0), 1.0) == 4.0
    (said,) = sampler_law(Outside(), 1.0)
    assert "T_eff = T / (1 - a h)" in said
    assert "T_eff = 2;" in said


def test_traits_of_the_samplers_here_are_as_the_mathematics_has_them():
    reversible = "discrete_langevin, gibbs_with_gradients, hmc, mala, nuts, random_walk"
    assert (
        ", ".join(sorted(names_with("reversible").replace(" or ", ", ").split(", "))) == reversible
    )
    exact = {*reversible.split(", "), "gibbs", "tempered_transitions"}
    assert set(names_with("leaves_invariant").replace(" or ", ", ").split(", ")) == exact
    assert not trait(Plain(), "reversible")
    assert not KernelTraits.leaves_invariant


def test_an_energy_section_says_whether_its_parts_recompute():
    vit = {"name": "vit", "event_shape": (1, 8, 8)}
    inner = {"name": "sum", "members": [{"name": "mlp", "event_shape": (1, 8, 8)}, vit]}
    section = energies.FAMILY.section("tempered", member=inner, temperature=2.0)
    assert isinstance(section, EnergySection)
    said = [
        type(p).model_fields["name"].default for p in section.parts() if p.recomputes_activations
    ]
    assert said == ["vit"]
