"""The mutation check: each sampler with one line of its source made wrong fails its own claim.

A mutation is a piece of the source and what it becomes: the noise 5% too large, a missing
sqrt(2), a missing temperature, a proposal correction of the wrong sign. Its claim is the
one that the sampler's own test makes of the right source (`samplers_claims.py`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import samplers_claims as claims
from samplers_claims import METROPOLIS, NUTS, Coupled, CoupledBits, Make

from ebm_dist import samplers


@dataclass(frozen=True)
class Mutation:
    """One wrong line, and the claim that must notice it."""

    module: str
    what: str
    right: str
    wrong: str
    claim: Callable[[Make], None]

    def __str__(self) -> str:
        return f"{self.module}: {self.what}"


KERNEL = {
    "langevin": "Langevin",
    "annealed_langevin": "AnnealedLangevin",
    "flow_langevin": "FlowLangevin",
    "sghmc": "Sghmc",
    "mala": "Mala",
    "hmc": "Hmc",
    "nuts": "Nuts",
    "preconditioned_langevin": "PreconditionedLangevin",
    "random_walk": "RandomWalk",
    "parallel_tempering": "ParallelTempering",
    "tempered_transitions": "TemperedTransitions",
    "simulated_tempering": "SimulatedTempering",
    "predictor_corrector": "PredictorCorrector",
    "gibbs": "Gibbs",
    "gibbs_with_gradients": "GibbsWithGradients",
    "discrete_langevin": "DiscreteLangevin",
}


def gaussian(name: str) -> Callable[[Make], None]:
    return partial(claims.metropolis_samples_a_gaussian, params=METROPOLIS[name])


def skewed(name: str) -> Callable[[Make], None]:
    return partial(claims.metropolis_samples_a_skewed_target, params=METROPOLIS[name])


def enumerated(num_steps: int, target: type[Coupled]) -> Callable[[Make], None]:
    return partial(claims.discrete_law_is_the_enumerated_one, num_steps=num_steps, target=target)


def ising(num_steps: int) -> Callable[[Make], None]:
    return partial(claims.ising_has_its_moments, num_steps=num_steps)


def coloured(num_steps: int) -> Callable[[Make], None]:
    return partial(claims.ising_has_its_moments, num_steps=num_steps, lattice=claims.ColouredSpins)


LANGEVIN = "(2 * self.temperature * self.step_size) ** 0.5"
ANNEALED = "(2 * t * self.step_size).sqrt()"
SGHMC = "(2 * gamma * self.temperature * h) ** 0.5"
PRECONDITIONED = "(2 * self.temperature * self.step_size * scales) ** 0.5"
MALA = "alpha=(2 * t * h) ** 0.5"
WALK = "alpha=self.proposal_std"

Line = tuple[str, str, str]


def of(module: str, claim: Callable[[Make], None], *lines: Line) -> list[Mutation]:
    """Mutations (what, right, wrong) of one module that one claim must notice."""
    return [Mutation(module, what, right, wrong, claim) for what, right, wrong in lines]


LANGEVIN_NOISE: list[Line] = [
    ("noise x 1.05", LANGEVIN, f"1.05 * {LANGEVIN}"),
    ("noise / 1.05", LANGEVIN, f"{LANGEVIN} / 1.05"),
    ("no sqrt 2", LANGEVIN, "(self.temperature * self.step_size) ** 0.5"),
    ("no T", LANGEVIN, "(2 * self.step_size) ** 0.5"),
    ("T for sqrt T", LANGEVIN, "self.temperature * (2 * self.step_size) ** 0.5"),
]
PRECONDITIONED_NOISE: list[Line] = [
    ("noise x 1.05", PRECONDITIONED, f"1.05 * {PRECONDITIONED}"),
    ("no sqrt 2", PRECONDITIONED, "(self.temperature * self.step_size * scales) ** 0.5"),
    ("no T", PRECONDITIONED, "(2 * self.step_size * scales) ** 0.5"),
    ("no scales in the noise", PRECONDITIONED, "(2 * self.temperature * self.step_size) ** 0.5"),
    ("no scales in the drift", "(self.step_size * scales))", "self.step_size)"),
]
TRANSITIONS: list[Line] = [
    ("accepts the wrong way", "decide(log_ratio", "decide(-log_ratio"),
    ("nothing for the way down", "log_ratio - fall * there", "log_ratio - 0 * there"),
    ("wrong sign on the way up", "log_ratio + fall * there", "log_ratio - fall * there"),
]
TEMPERING: list[Line] = [
    ("swaps the wrong way", "energy_cold - energy_hot", "energy_hot - energy_cold"),
    ("no T in the swap", "(1 / cold - 1 / hot)", "1.0"),
]
GRADIENT_GIBBS: list[Line] = [
    ("correction of the wrong sign", "return fro - to", "return to - fro"),
    ("no correction", "return fro - to", "return 0 * fro"),
    ("no T in the ratio", "value) / self.temperature", "value)"),
]
DISCRETE_LANGEVIN: list[Line] = [
    ("correction of the wrong sign", "+ move_log", "- move_log"),
    ("no correction", "+ move_log", "+ 0 * move_log"),
    ("no T in the ratio", "value) / self.temperature", "value)"),
]

MUTATIONS = [
    *of("langevin", claims.langevin_variance_shows_its_known_bias, *LANGEVIN_NOISE),
    *of("langevin", claims.langevin_follows_its_exact_law_on_a_skewed_target, *LANGEVIN_NOISE),
    *of(
        "langevin",
        claims.langevin_variance_shows_its_known_bias,
        ("ascends", "alpha=-self.step_size", "alpha=self.step_size"),
    ),
    *of(
        "langevin",
        claims.langevin_autocorrelation_and_ess,
        ("half the drift", "alpha=-self.step_size", "alpha=-0.5 * self.step_size"),
    ),
    *of(
        "annealed_langevin",
        claims.annealed_langevin_follows_its_schedule,
        ("noise x 1.05", ANNEALED, f"1.05 * {ANNEALED}"),
        ("no sqrt 2", ANNEALED, "(t * self.step_size).sqrt()"),
        ("no T", ANNEALED, "(2 * self.step_size + 0 * t).sqrt()"),
        ("cools one move late", "at(state.clock)", "at(state.clock - 1)"),
    ),
    *of(
        "flow_langevin",
        claims.flow_langevin_follows_its_schedule,
        ("heats at once", "(time - self.time_cutoff) / (1 - self.time_cutoff)", "1 + 0 * time"),
        ("heats from time 0", "(time - self.time_cutoff) / (1 - self.time_cutoff)", "time"),
        ("heats one move late", "clock.double() *", "(clock.double() - 1) *"),
        ("no T", "self.temperature * ramp", "ramp"),
    ),
    *of(
        "preconditioned_langevin",
        claims.preconditioned_langevin_gives_each_coordinate_its_own_variance,
        *PRECONDITIONED_NOISE,
    ),
    *of(
        "preconditioned_langevin",
        claims.preconditioned_langevin_follows_its_exact_law_on_a_skewed_target,
        *PRECONDITIONED_NOISE,
    ),
    *of(
        "sghmc",
        claims.sghmc_has_its_discretised_covariance,
        ("noise x 1.05", SGHMC, f"1.05 * {SGHMC}"),
        ("no sqrt 2", SGHMC, "(gamma * self.temperature * h) ** 0.5"),
        ("no T", SGHMC, "(2 * gamma * h) ** 0.5"),
        ("no friction in the noise", SGHMC, "(2 * self.temperature * h) ** 0.5"),
        ("friction times h^2", "1 - gamma * h", "1 - gamma * h * h"),
    ),
    *of(
        "sghmc",
        claims.sghmc_samples_a_skewed_target,
        ("noise x 1.05", SGHMC, f"1.05 * {SGHMC}"),
        ("no T", SGHMC, "(2 * gamma * h) ** 0.5"),
    ),
    *of(
        "mala",
        claims.mala_proposes_its_own_width,
        ("noise x 1.05", MALA, "alpha=1.05 * (2 * t * h) ** 0.5"),
    ),
    *of(
        "mala",
        gaussian("mala"),
        ("no sqrt 2 in the noise", MALA, "alpha=(t * h) ** 0.5"),
        ("no T in the noise", MALA, "alpha=(2 * h) ** 0.5"),
        ("no T in the ratio", ") / t\n", ")\n"),
        ("correction of the wrong sign", "+ log_p", "- log_p"),
    ),
    *of(
        "mala",
        skewed("mala"),
        ("no sqrt 2 in the noise", MALA, "alpha=(t * h) ** 0.5"),
        ("correction of the wrong sign", "+ log_p", "- log_p"),
        ("no correction", "+ log_p", "+ 0 * log_p"),
    ),
    *of(
        "hmc",
        gaussian("hmc"),
        ("noise x 1.05", "t**0.5", "1.05 * t**0.5"),
        ("no T in the momentum", "t**0.5", "1.0"),
        ("accepts the wrong way", "-change / t", "change / t"),
    ),
    *of(
        "hmc",
        skewed("hmc"),
        ("noise x 1.05", "t**0.5", "1.05 * t**0.5"),
        ("no T in the ratio", "-change / t", "-change"),
        ("no kinetic energy at the end", "0.5 * sum_event(momentum.square()) - k", "-k"),
    ),
    *of(
        "nuts",
        partial(claims.metropolis_samples_a_gaussian, params=NUTS, num_steps=10),
        ("noise x 1.05", "mul_(self.temperature**0.5)", "mul_(1.05 * self.temperature**0.5)"),
        ("no T in the momentum", "mul_(self.temperature**0.5)", "mul_(1.0)"),
        ("takes the new half always", "(merge.log() < tree.log_weight - log_weight)", "True"),
        ("draws the last leaf always", "uniform < share", "uniform < 1 + share"),
    ),
    *of(
        "nuts",
        partial(claims.metropolis_samples_a_skewed_target, params=NUTS, num_steps=12),
        ("no T in the weights", "- start_h) / self.temperature", "- start_h)"),
        ("no kinetic energy", "value + 0.5 * sum_event(momentum.square())", "value"),
        ("energy of the wrong sign", "(value + 0.5", "(-value + 0.5"),
    ),
    *of(
        "random_walk",
        claims.random_walk_proposes_its_own_width,
        ("noise x 1.05", WALK, "alpha=1.05 * self.proposal_std"),
    ),
    *of(
        "random_walk",
        claims.random_walk_accepts_as_often_as_it_must,
        ("noise x 1.05", WALK, "alpha=1.05 * self.proposal_std"),
        ("no T", "/ self.temperature", ""),
    ),
    *of(
        "random_walk",
        skewed("random_walk"),
        ("no T", "/ self.temperature", ""),
        ("accepts the wrong way", "state.energy - new.energy", "new.energy - state.energy"),
    ),
    *of("parallel_tempering", claims.tempering_swaps_as_often_as_it_must, *TEMPERING),
    *of("parallel_tempering", claims.tempering_finds_the_masses_of_two_wells, *TEMPERING),
    *of("tempered_transitions", claims.transitions_find_the_masses_of_two_wells, *TRANSITIONS),
    *of("tempered_transitions", claims.transitions_sample_a_skewed_target, *TRANSITIONS),
    *of(
        "tempered_transitions",
        claims.transitions_sample_a_skewed_target,
        ("no T in the kernels", "temperature=t)", "temperature=1.0)"),
        ("T for 1/T", "[1 / t for t in", "[t for t in"),
    ),
    *of(
        "parallel_tempering",
        claims.tempering_swaps_as_often_as_it_must,
        ("no T in the kernels", "temperature=t)", "temperature=1.0)"),
    ),
    *of(
        "parallel_tempering",
        claims.tempering_keeps_the_momentum_at_its_temperature,
        ("velocities not scaled", 'hasattr(kernel_a, "exchanged")', "False"),
    ),
    *of(
        "simulated_tempering",
        claims.chains_of_all_levels_have_their_joint_law,
        ("accepts the wrong way", "inner.energy - there.energy", "there.energy - inner.energy"),
        ("no T", ") / self.temperature", ")"),
        ("a proposal in the old unit", "u = x / per_chain(unit, x)", "u = x"),
        ("steps up too often", "< 0.5", "< 0.7"),
    ),
    *of(
        "predictor_corrector",
        claims.descent_has_its_discretised_variance,
        ("no T in the correction", "c / t *", "c *"),
        ("no T in the prediction", "removed / t *", "removed *"),
        ("noise of plain Langevin steps", "(c * (2 - c)) ** 0.5", "(2 * c) ** 0.5"),
        (
            "noise of the old level",
            "std * removed.sqrt() / before",
            "before * removed.sqrt() / before",
        ),
        (
            "corrections at the level above",
            "at_level(energy, level)",
            "at_level(energy, state.level)",
        ),
    ),
    *of(
        "gibbs",
        enumerated(8, CoupledBits),
        ("no T, bits", "flipped) / temperature", "flipped)"),
    ),
    *of(
        "gibbs",
        enumerated(8, Coupled),
        ("no T, categories", "-energies / temperature", "-energies"),
    ),
    *of(
        "gibbs",
        coloured(25),
        ("no T, colours", "(-grad / self.temperature)", "(-grad)"),
        ("wrong sign, colours", "sigmoid(-grad /", "sigmoid(grad /"),
    ),
    *of("gibbs", ising(20), ("no T, lattice", "flipped) / temperature", "flipped)")),
    *of(
        "gibbs",
        claims.rbm_has_its_enumerated_law,
        ("latent units at any T", "self.temperature == 1.0 and", ""),
    ),
    *of(
        "gibbs",
        partial(claims.rbm_has_its_enumerated_law, of=claims.as_rbm),
        ("last sweep's input", "sharing.latent_input(position)", "state.latent_input"),
    ),
    *of("gibbs_with_gradients", enumerated(62, Coupled), *GRADIENT_GIBBS),
    *of("gibbs_with_gradients", enumerated(62, CoupledBits), *GRADIENT_GIBBS),
    *of("discrete_langevin", enumerated(30, Coupled), *DISCRETE_LANGEVIN),
    *of("discrete_langevin", enumerated(30, CoupledBits), *DISCRETE_LANGEVIN),
    *of(
        "discrete_langevin",
        ising(120),
        ("density of the other move", "logsigmoid(sign * forward", "logsigmoid(-sign * forward"),
    ),
]


def build(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The constructor of the mutated kernel, in place of `samplers.make`'s."""
    source = inspect.getsource(sys.modules[samplers.FAMILY.members[mutation.module].__module__])
    # The config's registration would clash with the right one, and is not what is tested.
    source = source.split("@FAMILY.register")[0]
    assert mutation.right in source, f"{mutation}: the source has changed; update the mutation"
    module = ModuleType(f"mutated_{mutation.module}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    wrong = source.replace(mutation.right, mutation.wrong)
    exec(compile(wrong, module.__name__, "exec"), module.__dict__)
    kernel = getattr(module, KERNEL[mutation.module])
    return constructor(mutation.module, kernel)


def constructor(name: str, kernel: Callable[..., Any]) -> Make:
    """`kernel` with what the right test gives it beyond the claim's own parameters."""
    if name == "discrete_langevin":
        return partial(kernel, step_size=0.7)
    if name == "tempered_transitions":
        return partial(kernel, samplers.make("random_walk", proposal_std=2.0))
    if name != "parallel_tempering":
        return kernel

    def make(temperatures: tuple[float, ...], **inner: Any) -> Any:
        if inner:
            return kernel(samplers.make("sghmc", **inner), temperatures)
        return kernel(samplers.make("random_walk", proposal_std=2.0), temperatures)

    return make


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_claim_fails_on_a_wrong_line(mutation, monkeypatch):
    make = build(mutation, monkeypatch)
    with pytest.raises((AssertionError, samplers.NonFiniteEnergy)):
        mutation.claim(make)


def one_of_each_claim() -> list[Mutation]:
    """For each sampler and claim a mutation that changes nothing."""
    seen: dict[str, Mutation] = {}
    for m in MUTATIONS:
        seen[f"{m.module} {m.claim}"] = Mutation(m.module, "nothing", m.right, m.right, m.claim)
    return list(seen.values())


@pytest.mark.parametrize("unchanged", one_of_each_claim(), ids=str)
def test_claim_holds_of_the_line_left_as_it_is(unchanged, monkeypatch):
    # Otherwise a claim could fail above for the way that a mutation is built.
    unchanged.claim(build(unchanged, monkeypatch))


def test_every_sampler_has_a_mutation():
    known = samplers.FAMILY.members.keys() - {"module"}  # a user's own code is not ours to change
    assert set(KERNEL) == known == {m.module for m in MUTATIONS}
