"""Samplers of real events against closed forms, quadrature and exact finite-step laws."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import samplers_claims as claims
import torch
from samplers_claims import METROPOLIS, NUTS, generator, quadratic, same_mean
from scipy import integrate

from ebm_dist import samplers
from ebm_dist.samplers import adapt_scales, adapt_step_size, run_chain


def test_langevin_variance_shows_its_known_bias():
    claims.langevin_variance_shows_its_known_bias(partial(samplers.make, "langevin"))


def test_langevin_follows_its_exact_law_on_a_skewed_target():
    claims.langevin_follows_its_exact_law_on_a_skewed_target(partial(samplers.make, "langevin"))


def test_langevin_autocorrelation_and_effective_sample_size():
    claims.langevin_autocorrelation_and_ess(partial(samplers.make, "langevin"))


def test_langevin_keeps_the_contrastive_fixed_point():
    claims.langevin_keeps_the_contrastive_fixed_point(partial(samplers.make, "langevin"))


def test_langevin_short_run_generates_what_a_long_run_does_not():
    claims.langevin_short_run_generates_what_a_long_run_does_not(partial(samplers.make, "langevin"))


def test_langevin_under_stale_weights_lags_by_the_known_amount():
    claims.langevin_under_stale_weights(partial(samplers.make, "langevin"))


def test_langevin_noise_std_means_what_the_temperature_would():
    # IGEBM's h = 10, sigma = .005, and a pair whose law can be seen.
    assert samplers.make("langevin", step_size=10.0, noise_std=0.005).temperature == pytest.approx(
        1.25e-6
    )

    def make(step_size: float, temperature: float):
        noise_std = (2 * temperature * step_size) ** 0.5
        return samplers.make("langevin", step_size=step_size, noise_std=noise_std)

    claims.langevin_variance_shows_its_known_bias(make, cases=[(1.0, 1.0, 0.5), (2.0, 3.0, 0.2)])


def test_langevin_diverges_at_twice_the_inverse_curvature():
    x = torch.ones(4, 1)
    for h, grows in ((1.9, False), (2.1, True)):
        kernel = samplers.make("langevin", step_size=h, temperature=0.0)
        end = run_chain(kernel, x, quadratic(1.0), 50, generator()).position.abs()
        assert bool((end > 1).all()) is grows


def test_simulated_tempering_has_the_joint_law_of_positions_and_levels():
    claims.chains_of_all_levels_have_their_joint_law(partial(samplers.make, "simulated_tempering"))


def test_chains_that_go_down_the_levels_have_the_variance_of_each_move():
    claims.descent_has_its_discretised_variance(partial(samplers.make, "predictor_corrector"))


def test_corrections_keep_the_noise_of_a_level_whatever_their_size():
    claims.corrections_keep_the_noise_of_a_level(partial(samplers.make, "predictor_corrector"))


def test_flow_langevin_follows_its_schedule():
    claims.flow_langevin_follows_its_schedule(partial(samplers.make, "flow_langevin"))


def test_annealed_langevin_follows_its_schedule():
    claims.annealed_langevin_follows_its_schedule(partial(samplers.make, "annealed_langevin"))


def test_preconditioned_langevin_gives_each_coordinate_its_own_variance():
    claims.preconditioned_langevin_gives_each_coordinate_its_own_variance(
        partial(samplers.make, "preconditioned_langevin")
    )


def test_preconditioned_langevin_follows_its_exact_law_on_a_skewed_target():
    claims.preconditioned_langevin_follows_its_exact_law_on_a_skewed_target(
        partial(samplers.make, "preconditioned_langevin")
    )


def test_adapted_scales_are_the_variances_and_let_all_coordinates_mix_at_one_rate():
    curvature = torch.tensor([[50.0, 1.0], [0.2, 4.0]])

    def energy(x):
        return 0.5 * (curvature * x.square()).flatten(1).sum(1)

    x = torch.randn(3000, 2, 2, generator=generator(3)) * 3
    for temperature in (1.0, 0.25):
        first = samplers.make(
            "preconditioned_langevin", step_size=0.02, scales=(1.0,), temperature=temperature
        )
        tuned = adapt_scales(first, x, energy, 2000, generator(4))
        assert first.scales == (1.0,)
        assert tuned.temperature == temperature
        scales = torch.tensor(tuned.scales).reshape(2, 2)
        # Unadjusted at h a = 1 the narrowest coordinate is twice as wide: 2 / (2 - h a).
        expected = 2 / (curvature * (2 - 0.02 * curvature))
        assert (scales / expected - 1).abs().max() < 0.05
        state = replace(tuned, step_size=0.3, temperature=0.0)
        moved = run_chain(state, torch.ones(1, 2, 2), energy, 1, generator()).position
        assert (moved - (1 - 0.3 * curvature * scales)).abs().max() < 1e-5


def test_scales_that_do_not_fit_the_event_are_refused():
    kernel = samplers.make("preconditioned_langevin", step_size=0.1, scales=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"scales: 2 of them, but an event \(3,\) has 3 numbers"):
        kernel.init(torch.zeros(4, 3), quadratic(1.0))
    still = samplers.make("preconditioned_langevin", step_size=0.1, temperature=0.0)
    with pytest.raises(ValueError, match="does not vary"):
        adapt_scales(still, torch.zeros(4, 3), quadratic(1.0), 10, generator())


def test_sghmc_has_its_discretised_covariance():
    # The table's own figures.
    alpha, gamma, h = 1.0, 1.0, 0.1
    of_v = 2 / (2 - gamma * h - alpha * h**2 / 2)
    assert 1 / (1 - alpha * h**2 / (2 * (2 - gamma * h))) == pytest.approx(1.002639, abs=1e-6)
    assert of_v == pytest.approx(1.055409, abs=1e-6)
    assert h * of_v / 2 == pytest.approx(0.052770, abs=1e-6)
    claims.sghmc_has_its_discretised_covariance(partial(samplers.make, "sghmc"))


def test_sghmc_samples_a_skewed_target():
    claims.sghmc_samples_a_skewed_target(partial(samplers.make, "sghmc"))


@pytest.mark.parametrize(("alpha", "gamma", "h"), [(0.01, 0.19, 0.1), (1.0, 1.0, 0.1), (4, 3, 0.2)])
def test_momentum_contracts_by_the_spectral_radius_of_its_recursion(alpha, gamma, h):
    # Without noise a step is linear: its matrix is read off two unit vectors.
    kernel = samplers.make("sghmc", step_size=h, friction=gamma, temperature=0.0)
    energy, columns = quadratic(alpha), []
    for position, velocity in ((1.0, 0.0), (0.0, 1.0)):
        x = torch.full((1, 1), position, dtype=torch.float64)
        state = kernel.init(x, energy)
        state = type(state)(state.position, state.energy, state.grad, torch.full_like(x, velocity))
        after, _ = kernel.step(state, energy, generator())
        columns.append(torch.cat([after.position, after.velocity])[:, 0])
    came = torch.linalg.eigvals(torch.stack(columns, 1)).abs().max().item()
    trace, determinant = 2 - gamma * h - alpha * h**2, 1 - gamma * h
    root = complex(trace**2 / 4 - determinant) ** 0.5
    assert came == pytest.approx(max(abs(trace / 2 + root), abs(trace / 2 - root)), rel=1e-12)
    plain = samplers.make("langevin", step_size=h, temperature=0.0)
    moved = run_chain(plain, torch.ones(1, 1, dtype=torch.float64), energy, 1, generator())
    assert moved.position.item() == pytest.approx(1 - alpha * h, rel=1e-12)
    if alpha == 0.01:
        assert came == pytest.approx(0.99045, abs=1e-5)
        assert moved.position.item() == pytest.approx(0.999, abs=1e-12)


@pytest.mark.parametrize("name", METROPOLIS)
def test_adjusted_kernel_samples_a_gaussian_exactly(name):
    claims.metropolis_samples_a_gaussian(partial(samplers.make, name), METROPOLIS[name])


@pytest.mark.parametrize("name", METROPOLIS)
def test_adjusted_kernel_samples_both_tails_of_a_skewed_density(name):
    claims.metropolis_samples_a_skewed_target(partial(samplers.make, name), METROPOLIS[name])


@pytest.mark.parametrize("name", METROPOLIS)
def test_adjusted_kernel_samples_a_double_well(name):
    claims.metropolis_samples_a_double_well(partial(samplers.make, name), METROPOLIS[name])


def test_nuts_samples_a_gaussian_exactly():
    claims.metropolis_samples_a_gaussian(partial(samplers.make, "nuts"), NUTS, 10)


def test_nuts_samples_both_tails_of_a_skewed_density():
    claims.metropolis_samples_a_skewed_target(partial(samplers.make, "nuts"), NUTS, 12)


def test_nuts_samples_a_double_well():
    claims.metropolis_samples_a_double_well(partial(samplers.make, "nuts"), NUTS, 20)


def test_nuts_samples_a_correlated_law_that_is_far_narrower_one_way():
    # Covariance [[1, .9], [.9, 1]] stretched by 4: eigenvalues 30 apart and no symmetry.
    covariance = torch.tensor([[1.0, 3.6], [3.6, 16.0]], dtype=torch.float64)
    precision = torch.linalg.inv(covariance).float()

    def energy(x):
        return 0.5 * ((x - 1) @ precision * (x - 1)).sum(1)

    kernel = samplers.make("nuts", step_size=0.4)
    x = torch.zeros(8000, 2)
    end = run_chain(kernel, x, energy, 12, generator(2)).position.double() - 1
    for i, j in ((0, 0), (0, 1), (1, 1)):
        expected = covariance[i, j].item()
        same_mean(end[:, i] * end[:, j], expected, f"covariance {i}{j}")
        same_mean(end[:, i], 0.0, f"mean {i}")


@pytest.mark.parametrize(("step_size", "depth"), [(0.24, 4), (0.12, 5), (0.06, 6)])
def test_nuts_turns_back_after_half_a_period(step_size, depth):
    # On |x|^2 / 2 in many dimensions x and p start at right angles, and the ends of the
    # trajectory draw apart for a time pi: the first 2^d - 1 steps that take longer.
    assert (2 ** (depth - 1) - 1) * step_size < math.pi < (2**depth - 1) * step_size
    for temperature in (1.0, 4.0):
        x = temperature**0.5 * torch.randn(50, 300, generator=generator(1))
        kernel = samplers.make("nuts", step_size=step_size, temperature=temperature)
        info = run_chain(kernel, x, quadratic(1.0), 1, generator(2)).info
        assert (info["tree_depth"] == depth).all()
        assert (info["accepted"] == 1).all()
        assert (info["diverged"] == 0).all()


def test_nuts_says_where_it_diverges_and_stays_there():
    kernel = samplers.make("nuts", step_size=30.0)
    x = torch.randn(200, 4, generator=generator(1))
    chain = run_chain(kernel, x, quadratic(1.0), 1, generator(2))
    assert (chain.info["diverged"] == 1).all()
    assert torch.equal(chain.position, x)


def test_nuts_stops_at_the_depth_it_is_given():
    kernel = samplers.make("nuts", step_size=1e-3, max_tree_depth=3)
    x = torch.randn(50, 2, generator=generator(1))
    assert (run_chain(kernel, x, quadratic(1.0), 4, generator(2)).info["tree_depth"] == 3).all()


def test_random_walk_accepts_as_often_as_it_must():
    claims.random_walk_accepts_as_often_as_it_must(partial(samplers.make, "random_walk"))


def test_proposals_have_their_own_width():
    claims.random_walk_proposes_its_own_width(partial(samplers.make, "random_walk"))
    claims.mala_proposes_its_own_width(partial(samplers.make, "mala"))


def test_mala_leaves_unit_data_at_precision_one():
    # The contrastive fixed point of the adjusted kernel is 1, not 1.05573.
    x = torch.randn(claims.NUM_CHAINS, 2, generator=generator(5))
    for h in (0.1, 0.8):
        kernel = samplers.make("mala", step_size=h)
        end = run_chain(kernel, x, quadratic(1.0), 5, generator(6)).position
        claims.same_gaussian_variance(end, 1.0, "variance of the data after five steps")


@pytest.mark.parametrize(("radius", "width"), [(2.0, 0.2), (1.0, 0.3)])
def test_samplers_go_round_a_ring(radius, width):
    def energy(x):
        return (x.norm(dim=1) - radius).square() / (2 * width**2)

    def weight(r):
        return r * math.exp(-((r - radius) ** 2) / (2 * width**2))

    mass = integrate.quad(weight, 0, 10)[0]
    # The closed form of the table is this integral over the angle, too.
    edge = math.exp(-(radius**2) / (2 * width**2))
    closed = width**2 * edge + radius * width * math.sqrt(math.pi / 2) * (
        1 + math.erf(radius / (width * math.sqrt(2)))
    )
    assert mass == pytest.approx(closed, rel=1e-8)
    mean = integrate.quad(lambda r: r * weight(r), 0, 10)[0] / mass
    square = integrate.quad(lambda r: r * r * weight(r), 0, 10)[0] / mass
    for name, params in (
        ("mala", {"step_size": 0.5 * width**2}),
        ("hmc", {"step_size": 0.5 * width, "num_leapfrog_steps": 8}),
        ("random_walk", {"proposal_std": width}),
    ):
        x = torch.randn(8000, 2, generator=generator(3)) + 0.1
        end = run_chain(samplers.make(name, **params), x, energy, 200, generator(4)).position
        same_mean(end.norm(dim=1), mean, f"{name}: mean radius")
        same_mean(end.square().sum(1), square, f"{name}: mean squared radius")


def tempered(name: str, **params):
    def make(temperatures, **more):
        return samplers.make(
            "parallel_tempering",
            kernel={"name": name, **params, **more},
            temperatures=temperatures,
        )

    return make


@pytest.mark.parametrize(
    "make", [tempered("mala", step_size=0.8), tempered("random_walk", proposal_std=2.0)]
)
def test_tempering_swaps_as_often_as_it_must(make):
    claims.tempering_swaps_as_often_as_it_must(make)


def test_tempering_finds_the_masses_of_two_wells():
    claims.tempering_finds_the_masses_of_two_wells(tempered("random_walk", proposal_std=2.0))


def transitions(name: str, **params):
    def make(temperatures):
        kernel = {"name": name, **params}
        return samplers.make("tempered_transitions", kernel=kernel, temperatures=temperatures)

    return make


def test_tempered_transitions_find_the_masses_of_two_wells():
    claims.transitions_find_the_masses_of_two_wells(transitions("random_walk", proposal_std=2.0))


@pytest.mark.parametrize(
    "make",
    [
        transitions("random_walk", proposal_std=1.5),
        transitions("mala", step_size=0.5),
        transitions("hmc", step_size=0.5, num_leapfrog_steps=2),
    ],
)
def test_tempered_transitions_sample_both_tails_of_a_skewed_density(make):
    claims.transitions_sample_a_skewed_target(make)


@pytest.mark.parametrize("name", ["gibbs", "langevin", "sghmc"])
def test_tempered_transitions_refuse_a_sampler_that_is_not_reversible(name):
    params = samplers.FAMILY.members[name].example
    with pytest.raises(ValueError, match=r"needs a reversible sampler inside: .*\bmala\b"):
        transitions(name, **params)(temperatures=(1.0, 2.0))


def test_tempering_samples_both_tails_of_a_skewed_density():
    make = tempered("mala", step_size=0.5)
    chain = run_chain(
        make(temperatures=(0.5, 1.0, 2.0)), torch.zeros(20_000, 1), claims.gumbel, 60, generator(1)
    )
    claims.same_gumbel(chain.position, 0.5)


def test_tempering_keeps_the_momentum_at_its_temperature():
    claims.tempering_keeps_the_momentum_at_its_temperature(tempered("sghmc"))


# Long trajectories come round on a quadratic, so HMC's acceptance answers to its step size
# only near the top.
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mala", 0.4),
        ("mala", 0.8),
        ("random_walk", 0.25),
        ("random_walk", 0.6),
        ("hmc", 0.8),
        ("nuts", 0.8),
    ],
)
def test_adaptation_reaches_the_acceptance_it_aims_at(name, target):
    # From a start a hundred times too small and ten times too large.
    for scale in (0.01, 10.0):
        params = {**METROPOLIS, "nuts": NUTS}[name]
        key = "proposal_std" if name == "random_walk" else "step_size"
        kernel = samplers.make(name, **{**params, key: params[key] * scale}, temperature=2.0)
        x = torch.randn(500, 4, generator=generator(3)) * 2**0.5
        tuned = adapt_step_size(kernel, x, quadratic(1.0), 300, generator(4), target)
        assert tuned.temperature == 2.0
        came = run_chain(tuned, x, quadratic(1.0), 40, generator(5)).info["acceptance"]
        assert came.mean().item() == pytest.approx(target, abs=0.04)


def test_adaptation_uses_the_kernels_own_target_and_leaves_the_kernel_alone():
    kernel = samplers.make("mala", step_size=0.01)
    x = torch.randn(500, 4, generator=generator(3))
    tuned = adapt_step_size(kernel, x, quadratic(1.0), 300, generator(4))
    assert kernel.step_size == 0.01
    came = run_chain(tuned, x, quadratic(1.0), 40, generator(5)).info["acceptance"]
    assert came.mean().item() == pytest.approx(0.574, abs=0.04)
