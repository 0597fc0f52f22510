"""Samplers of discrete events against enumeration: Ising, RBM, lopsided bits and categories."""

from __future__ import annotations

from functools import partial

import pytest
import samplers_claims as claims
import torch
from samplers_claims import (
    ColouredSpins,
    Coupled,
    CoupledBits,
    Machine,
    Spins,
    generator,
    same_chi_square,
)
from torch import Tensor

from ebm_dist import energies, samplers
from ebm_dist.samplers import adapt_step_size, run_chain

KERNELS = {
    "gibbs": (partial(samplers.make, "gibbs"), 20),
    "gibbs_with_gradients": (partial(samplers.make, "gibbs_with_gradients"), 250),
    "discrete_langevin": (partial(samplers.make, "discrete_langevin", step_size=0.7), 120),
}


@pytest.mark.parametrize("name", KERNELS)
def test_ising_has_its_enumerated_moments(name):
    claims.ising_has_its_moments(*KERNELS[name])


def test_ising_moves_by_colour_where_the_energy_offers_it():
    claims.ising_has_its_moments(partial(samplers.make, "gibbs"), 25, lattice=ColouredSpins)


class Lattice(ColouredSpins):
    """The project's own Ising energy in place of the one written out."""

    def __init__(self, side: int, coupling: float = 1.0, field: float = 0.0) -> None:
        super().__init__(side, coupling, field)
        self.ising = energies.ising((side, side), coupling, field)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ising(x)

    @property
    def gibbs_blocks(self) -> tuple[Tensor, ...]:
        return self.ising.gibbs_blocks


def test_the_ising_energy_itself_moves_by_colour_to_its_enumerated_moments():
    claims.ising_has_its_moments(partial(samplers.make, "gibbs"), 25, lattice=Lattice)


# Sides of 2 (two bonds between two sites) and odd ones (three colours) among them; every one
# in a field, so that no symmetry hides a wrong site.
LATTICES = {
    "ring of 7": energies.ising(7, 0.5, 0.3),
    "3x3 against alignment": energies.ising((3, 3), -0.5, 0.2),
    "2x4": energies.ising((2, 4), 0.25, -0.25),
    "2x2x2": energies.ising((2, 2, 2), 0.12, 0.15),
    "Potts ring of 5": energies.potts(5, 3, 0.9, [0.3, 0.0, -0.4]),
    "Potts 2x2 of 4 values": energies.potts((2, 2), 4, -0.6, [0.2, -0.3, 0.1, 0.4]),
}


@pytest.mark.parametrize("energy", LATTICES.values(), ids=LATTICES)
def test_lattice_moved_by_colour_has_every_state_as_often_as_enumeration_says(energy):
    states = torch.cat(list(energy.states())).float()
    num_values = states.shape[-1] if energy.event.kind == "categorical" else 2
    for t in (1.0, 0.6, 2.0):
        probability = (-energy(states).double() / t).softmax(0)
        kernel = samplers.make("gibbs", temperature=t)
        x = states[:1].expand(6000, *states.shape[1:])
        assert kernel.init(x, energy).scan == "blocks"
        end = run_chain(kernel, x, energy, 30, generator(5)).position
        value = end.argmax(-1) if num_values > 2 else end.long()
        index = (value.flatten(1) * num_values ** torch.arange(value[0].numel())).sum(1)
        count = torch.bincount(index, minlength=len(states)).double()
        same_chi_square(count, probability, f"the lattice at T={t}")


@pytest.mark.parametrize("shape", [(2,), (3,), (5,), (8,), (3, 4), (5, 7), (2, 3, 4), (3, 3, 3, 3)])
def test_no_bond_joins_two_sites_of_a_colour(shape):
    for energy in (energies.ising(shape), energies.potts(shape, 3)):
        blocks = torch.stack(energy.gibbs_blocks)
        assert (blocks.sum(0) == 1).all()
        assert len(blocks) == (3 if any(side % 2 for side in shape) else 2)
        for dim in range(1, blocks.ndim):
            assert not (blocks & blocks.roll(1, dim)).any()


@pytest.mark.parametrize("name", KERNELS)
def test_ising_has_its_enumerated_log_partition(name):
    make, num_steps = KERNELS[name]
    claims.ising_has_its_log_partition(make, moves=max(1, num_steps // 14))


@pytest.mark.parametrize("target", [Coupled, CoupledBits])
@pytest.mark.parametrize("name", KERNELS)
def test_lopsided_law_is_the_enumerated_one(name, target):
    make, num_steps = KERNELS[name]
    claims.discrete_law_is_the_enumerated_one(make, max(8, num_steps // 4), target)


@pytest.mark.parametrize("target", [Coupled, CoupledBits])
@pytest.mark.parametrize(
    "kernel",
    [{"name": "gibbs_with_gradients"}, {"name": "discrete_langevin", "step_size": 0.7}],
    ids=lambda k: k["name"],
)
def test_tempered_transitions_of_a_discrete_sampler_have_the_enumerated_law(kernel, target):
    def make(temperature):
        ladder = (temperature, 1.7 * temperature, 3 * temperature)
        return samplers.make("tempered_transitions", kernel=kernel, temperatures=ladder)

    claims.discrete_law_is_the_enumerated_one(make, 30, target)


class PottsRing:
    """A Potts ring with fields, linear in each colour of its sites."""

    num_sites, num_values = 4, 3
    field = torch.tensor([0.5, 0.0, -0.3])

    def __init__(self) -> None:
        index = torch.arange(81)[:, None] // 3 ** torch.arange(4) % 3
        self.states = torch.nn.functional.one_hot(index, 3).float()

    def __call__(self, x: Tensor) -> Tensor:
        return -(x * (0.8 * x.roll(1, 1) + self.field)).flatten(1).sum(1)

    @property
    def gibbs_blocks(self) -> tuple[Tensor, ...]:
        even = torch.arange(4) % 2 == 0
        return even, ~even


def test_categories_move_by_colour_where_the_energy_offers_it():
    energy = PottsRing()
    for t in (1.0, 0.5, 3.0):
        probability = (-energy(energy.states).double() / t).softmax(0)
        x = energy.states[torch.zeros(5000, dtype=torch.long)]
        end = run_chain(samplers.make("gibbs", temperature=t), x, energy, 30, generator()).position
        index = (end.argmax(-1) * 3 ** torch.arange(4)).sum(-1)
        same_chi_square(torch.bincount(index, minlength=81).double(), probability, f"T={t}")


@pytest.mark.parametrize("of", [lambda machine: machine, claims.as_rbm], ids=["callable", "ours"])
def test_gibbs_on_an_rbm_samples_the_enumerated_law(of):
    claims.rbm_has_its_enumerated_law(partial(samplers.make, "gibbs"), of)


def test_gibbs_moves_an_rbm_in_blocks_only_where_the_joint_law_has_that_marginal():
    for temperature in (1.0, 2.0):
        energy = Machine(4, 3, seed=1)
        kernel = samplers.make("gibbs", temperature=temperature)
        run_chain(kernel, torch.zeros(5, 4), energy, 3, generator())
        assert energy.num_draws == (3 if temperature == 1.0 else 0)


@pytest.mark.parametrize("name", KERNELS)
def test_gibbs_like_samplers_reach_an_rbms_law(name):
    energy = Machine(6, 3, seed=4)
    probability = (-energy(energy.states).double()).softmax(0)
    make, num_steps = KERNELS[name]
    end = run_chain(make(), torch.ones(5000, 6), energy, num_steps, generator(2)).position
    index = (end.long() * 2 ** torch.arange(6)).sum(-1)
    same_chi_square(torch.bincount(index, minlength=64).double(), probability, name)


def test_discrete_langevin_adapts_to_the_acceptance_it_aims_at():
    energy = Spins(4, field=0.1)
    x = torch.randint(0, 2, (500, 4, 4), generator=generator(3)).float()
    for start in (0.2, 3.0):
        kernel = samplers.make("discrete_langevin", step_size=start, temperature=3.0)
        tuned = adapt_step_size(kernel, x, energy, 300, generator(4))
        warm = run_chain(tuned, x, energy, 60, generator(5)).position
        came = run_chain(tuned, warm, energy, 60, generator(6)).info["acceptance"].mean().item()
        assert came == pytest.approx(0.574, abs=0.04)


def test_draws_have_the_weights_they_are_given():
    from ebm_dist.samplers.discrete.events import draw

    weight = torch.tensor([0.0, 0.02, 0.5, 0.0, 0.18, 0.3, 0.0])
    index = draw(weight.log().expand(100_000, 7), generator(1))
    count = torch.bincount(index, minlength=7).double()
    assert count[weight == 0].sum() == 0
    same_chi_square(count[weight > 0], weight[weight > 0].double(), "draws")
