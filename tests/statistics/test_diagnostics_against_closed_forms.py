"""Diagnostics against chains whose correlation, acceptance and masses have closed forms.

The chains are written out here, so that a wrong sampler cannot hide a wrong diagnostic.
"""

import math

import pytest
import torch

from ebm_dist import diagnostics
from ebm_dist.metrics.names import METRICS
from ebm_dist.report.health import LONG_ROUND


def langevin_trace(alpha_h, num_records, num_chains, seed=0):
    """Unadjusted Langevin on x^2/2, from its own stationary law."""
    generator = torch.Generator().manual_seed(seed)
    rho, std = 1 - alpha_h, math.sqrt(2 * alpha_h)
    x = math.sqrt(2 / (2 - alpha_h)) * torch.empty(num_chains).normal_(generator=generator)
    trace = torch.empty(num_records, num_chains)
    for t in range(num_records):
        trace[t] = x
        x = rho * x + std * torch.empty(num_chains).normal_(generator=generator)
    return trace


@pytest.mark.parametrize("alpha_h", [0.1, 0.3, 1.0, 1.5])
def test_autocorrelation_of_langevin_is_one_minus_alpha_h(alpha_h):
    num_chains, num_records = 400, 400
    rho = diagnostics.autocorrelation(langevin_trace(alpha_h, num_records, num_chains), 3)
    # Bartlett: Var(rho_1) = (1 - rho^2) / N for an AR(1) of N records, here at lag 1.
    error = math.sqrt((1 - (1 - alpha_h) ** 2) / (num_chains * num_records))
    assert abs(float(rho[1]) - (1 - alpha_h)) < 4 * error
    # Lags multiply; their errors are at most those of white noise times the correlation time.
    bound = 4 * math.sqrt((2 - alpha_h) / alpha_h / (num_chains * num_records))
    assert abs(float(rho[3]) - (1 - alpha_h) ** 3) < bound


@pytest.mark.parametrize("alpha_h", [0.05, 0.1, 0.4, 1.0])
def test_ess_of_langevin_is_alpha_h_over_two_minus_alpha_h(alpha_h):
    # Its own error, from independent repetitions: the estimate has no closed-form variance.
    shares = torch.tensor(
        [
            float(diagnostics.effective_sample_size(langevin_trace(alpha_h, 1000, 16, seed)))
            for seed in range(24)
        ]
    ) / (16 * 1000)
    expected = alpha_h / (2 - alpha_h)
    error = float(shares.std()) / math.sqrt(len(shares))
    # Geyer's truncation is biased by a share of the error of one estimate; 3% covers it, and a
    # noise or lag convention that is wrong by one record is 10% off at alpha_h = .1.
    assert abs(float(shares.mean()) - expected) < 4 * error + 0.03 * expected


def test_ess_predicts_the_error_of_the_mean():
    num_repetitions, alpha_h = 2000, 0.2
    trace = langevin_trace(alpha_h, 500, num_repetitions)
    variance = float(trace.mean(dim=0).var())
    ess_of_one_chain = float(diagnostics.effective_sample_size(trace)) / num_repetitions
    predicted = 2 / (2 - alpha_h) / ess_of_one_chain
    error = math.sqrt(2 / num_repetitions)
    assert abs(variance / predicted - 1) < 4 * error


@pytest.mark.parametrize("proposal_std", [0.3, 1.0, 2.5])
def test_self_transition_of_a_random_walk_on_a_gaussian(proposal_std):
    num_records, num_chains = 60, 4000
    generator = torch.Generator().manual_seed(1)
    x = torch.empty(num_chains).normal_(generator=generator)
    trace = [x]
    for _ in range(num_records - 1):
        proposal = x + proposal_std * torch.empty(num_chains).normal_(generator=generator)
        log_accept = (x**2 - proposal**2) / 2
        accept = torch.rand(num_chains, generator=generator).log() < log_accept
        x = torch.where(accept, proposal, x)
        trace.append(x)
    per_chain = diagnostics.self_transition_probability(torch.stack(trace), per_chain=True)
    error = float(per_chain.std()) / math.sqrt(num_chains)
    expected = 1 - 2 / math.pi * math.atan(2 / proposal_std)
    assert abs(float(per_chain.mean()) - expected) < 4 * error


def test_split_rhat_of_mixed_chains_is_near_one():
    rhat = diagnostics.split_rhat(langevin_trace(1.0, 1000, 8))
    assert 0.999 < rhat < 1.005


@pytest.mark.parametrize("time", [4, 19])
def test_chains_that_agree_have_a_healthy_rhat_in_a_long_round_and_not_in_a_short_one(time):
    healthy = METRICS["chain/rhat"].healthy
    assert healthy is not None
    # Half a round of n steps: 1 + (time / n) / (1 - time / n) is 1.05^2 in the long round.
    trace = langevin_trace(2 / (1 + time), LONG_ROUND * time, 32)
    assert float(diagnostics.split_rhat(trace)) < healthy[1]
    assert float(diagnostics.split_rhat(trace[: len(trace) // 4])) > healthy[1]


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_split_rhat_of_shifted_chains_has_its_known_limit(shift):
    # Half the chains shifted: between-variance s^2/4 * n/(n-1) on within-variance 1.
    num_chains = 400
    offset = torch.tensor([0.0, shift]).repeat(num_chains // 2)
    trace = langevin_trace(1.0, 4000, num_chains)
    trace = trace / math.sqrt(2) + offset
    rhat = float(diagnostics.split_rhat(trace))
    num_halves = 2 * num_chains
    expected = math.sqrt(1 + shift**2 / 4 * num_halves / (num_halves - 1))
    assert rhat == pytest.approx(expected, rel=0.01)


def two_wells(gap, k1, k2, distance=8.0):
    def energy(x):
        left = k1 * (x[:, 0] + distance) ** 2 / 2
        right = gap + k2 * (x[:, 0] - distance) ** 2 / 2
        return torch.minimum(left, right)

    return energy, torch.tensor([[-distance], [distance]])


@pytest.mark.parametrize(("gap", "k1", "k2"), [(0.0, 1.0, 4.0), (1.0, 1.0, 4.0), (-0.5, 3.0, 0.5)])
def test_basin_masses_of_two_wells_follow_depth_and_width(gap, k1, k2):
    temperatures = [0.5, 1.0, 2.0]
    energy, minima = two_wells(gap, k1, k2)
    masses = diagnostics.basin_masses(energy, minima, temperatures)
    for row, temperature in zip(masses, temperatures):
        expected = math.exp(gap / temperature) * math.sqrt(k2 / k1)
        assert float(row[0] / row[1]) == pytest.approx(expected, rel=1e-5)
    effect = "rescale" if gap == 0 else "distort"
    assert diagnostics.temperature_effect(masses) == effect


def test_basin_masses_of_the_reference_wells():
    energy, minima = two_wells(1.0, 1.0, 4.0)
    masses = diagnostics.basin_masses(energy, minima, [0.5, 1.0, 2.0])
    ratio = (masses[:, 0] / masses[:, 1]).tolist()
    assert ratio == pytest.approx([14.778, 5.437, 3.297], abs=1e-3)


def test_basin_masses_in_many_dimensions_use_the_determinant():
    scale = torch.tensor([1.0, 2.0, 5.0])

    def energy(x):
        near = (scale * x**2).sum(dim=1) / 2
        return torch.minimum(near, ((x - 9) ** 2).sum(dim=1) / 2)

    minima = torch.stack([torch.zeros(3), torch.full((3,), 9.0)])
    masses = diagnostics.basin_masses(energy, minima, [1.0])[0]
    assert float(masses[1] / masses[0]) == pytest.approx(math.sqrt(10), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_reweighted_occupancy_agrees_with_the_masses(temperature):
    gap, k1, k2 = 1.0, 1.0, 4.0
    energy, minima = two_wells(gap, k1, k2, distance=20.0)
    num = 400_000
    generator = torch.Generator().manual_seed(3)
    # Exact draws at T = 1, reweighted to `temperature`.
    share = diagnostics.basin_masses(energy, minima, [1.0])[0, 0]
    left = torch.rand(num, generator=generator) < share
    width = torch.where(left, k1**-0.5, k2**-0.5)
    centre = torch.where(left, minima[0], minima[1])
    x = (centre + width * torch.empty(num).normal_(generator=generator))[:, None]
    log_weight = -energy(x).double() * (1 / temperature - 1)
    got = diagnostics.basin_occupancy(x, minima, log_weight)[0]
    expected = diagnostics.basin_masses(energy, minima, [temperature])[0, 0]
    weight = log_weight.softmax(dim=0)
    residual = weight * ((x[:, 0] < 0).double() - expected)
    assert abs(float(got - expected)) < 4 * float(residual.square().sum().sqrt()) + 1e-6
