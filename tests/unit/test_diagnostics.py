"""Diagnostics on traces made by hand."""

import math

import pytest
import torch

from ebm_dist import diagnostics


def ar1(rho, num_records, num_chains, seed=0, event=()):
    """A stationary AR(1) trace with unit variance."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(num_records, num_chains, *event).normal_(generator=generator)
    trace = torch.empty_like(noise)
    trace[0] = noise[0]
    for t in range(1, num_records):
        trace[t] = rho * trace[t - 1] + math.sqrt(1 - rho**2) * noise[t]
    return trace


def test_autocorrelation_of_a_constant_trace_is_one():
    assert torch.equal(diagnostics.autocorrelation(torch.ones(5, 3, 2)), torch.ones(5))


def test_autocorrelation_sees_chains_stuck_in_different_modes():
    generator = torch.Generator().manual_seed(0)
    modes = torch.tensor([-3.0, 3.0]).repeat(8)
    trace = modes + 0.1 * torch.empty(64, 16).normal_(generator=generator)
    assert diagnostics.autocorrelation(trace, 8)[-1] > 0.99


def test_autocorrelation_equals_its_definition():
    trace = ar1(0.5, 12, 3, event=(2,))
    centred = trace.double() - trace.double().mean(dim=(0, 1))
    got = diagnostics.autocorrelation(trace)
    for lag in range(12):
        product = (centred[: 12 - lag] * centred[lag:]).sum() / (12 - lag)
        expected = product / (centred.square().sum() / 12)
        assert got[lag] == pytest.approx(float(expected), abs=1e-5)


def test_shapes_follow_the_event():
    trace = ar1(0.0, 20, 4, event=(2, 3))
    assert diagnostics.effective_sample_size(trace).shape == (2, 3)
    assert diagnostics.split_rhat(trace).shape == (2, 3)
    assert diagnostics.split_rhat(trace[..., 0, 0]).shape == ()
    assert diagnostics.self_transition_probability(trace).shape == ()
    assert diagnostics.self_transition_probability(trace, per_chain=True).shape == (4,)


def test_ess_of_constant_traces_is_the_number_of_distinct_chains():
    stuck = torch.arange(4.0).expand(20, 4)
    assert diagnostics.effective_sample_size(stuck) == 4
    assert diagnostics.effective_sample_size(torch.zeros(20, 4)) == 1


def test_ess_falls_where_chains_disagree():
    trace = ar1(0.0, 100, 4) + 5 * torch.arange(4.0)
    assert diagnostics.effective_sample_size(trace) < 10


def test_split_rhat_equals_its_definition():
    trace = ar1(0.7, 10, 3)
    halves = torch.cat([trace[:5], trace[5:]], dim=1).double()
    within = halves.var(dim=0).mean()
    expected = ((within * 4 / 5 + halves.mean(dim=0).var()) / within).sqrt()
    assert diagnostics.split_rhat(trace) == pytest.approx(float(expected), rel=1e-6)


def test_split_rhat_sees_one_chain_that_drifts():
    trace = ar1(0.0, 200, 1) + torch.linspace(0, 5, 200)[:, None]
    assert diagnostics.split_rhat(trace) > 1.5


def test_split_rhat_is_infinite_for_chains_stuck_apart_and_one_for_one_constant():
    assert math.isinf(float(diagnostics.split_rhat(torch.arange(4.0).expand(8, 4))))
    assert diagnostics.split_rhat(torch.zeros(8, 4)) == 1


def test_rank_normalised_rhat_is_unmoved_by_a_monotone_map():
    trace = ar1(0.5, 40, 4)
    plain = diagnostics.split_rhat(trace, rank_normalize=True)
    mapped = diagnostics.split_rhat(trace.exp().exp(), rank_normalize=True)
    assert plain == pytest.approx(float(mapped), rel=1e-6)


def test_self_transition_counts_only_whole_events_that_stay():
    trace = torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    assert diagnostics.self_transition_probability(trace) == pytest.approx(2 / 3)


def test_energy_gap_and_its_error():
    gap, error = diagnostics.energy_gap(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 4.0]))
    assert gap == -3
    assert error == 1


def test_weighted_energy_gap_follows_the_weights():
    negatives, log_weight = torch.tensor([1.0, 9.0]), torch.tensor([0.0, -60.0])
    gap, error = diagnostics.energy_gap(torch.zeros(2), negatives, log_weight)
    assert gap == pytest.approx(-1)
    assert error == pytest.approx(0, abs=1e-6)


def test_healthy_chains_raise_no_alarm():
    found = diagnostics.stagnation(ar1(0.5, 64, 32, event=(2,)))
    assert found.alarm is None
    assert not found.stuck.any()


def test_rejecting_chains_raise_an_alarm_that_names_the_shard_and_the_step_size():
    trace = ar1(0.0, 64, 8)
    trace[:, 3:] = trace[:1, 3:]
    found = diagnostics.stagnation(trace, where="shard 3")
    assert found.stuck.tolist() == [False] * 3 + [True] * 5
    assert found.alarm is not None
    assert found.alarm.startswith("shard 3: 5 of 8 chains")
    assert "sampler.step_size" in found.alarm


def test_confined_chains_raise_an_alarm_that_proposes_longer_or_hotter_chains():
    trace = ar1(0.0, 64, 8, event=(2,)) + 20 * torch.arange(8.0)[:, None]
    found = diagnostics.stagnation(trace, where="shard 0")
    assert found.stuck.all()
    assert found.alarm is not None
    assert "sampler.num_steps" in found.alarm
    assert "parallel_tempering" in found.alarm


def test_basin_occupancy_can_be_reweighted():
    minima = torch.tensor([[0.0], [10.0]])
    x = torch.tensor([[0.1], [9.0], [11.0], [10.0]])
    assert diagnostics.basin_occupancy(x, minima).tolist() == [0.25, 0.75]
    weights = torch.tensor([3.0, 1.0, 1.0, 1.0]).log()
    assert diagnostics.basin_occupancy(x, minima, weights).tolist() == pytest.approx([0.5, 0.5])


def test_basin_masses_refuse_a_saddle():
    def saddle(x):
        return x[:, 0] ** 2 - x[:, 1] ** 2

    with pytest.raises(ValueError, match=r"minima\[0\] has curvature"):
        diagnostics.basin_masses(saddle, torch.zeros(1, 2), [1.0])


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (torch.zeros(5), "time first"),
        (torch.zeros(2, 4), "at least 4 records"),
        (torch.full((8, 2), torch.nan), "not finite"),
    ],
)
def test_bad_traces_are_refused_in_one_line(trace, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.split_rhat(trace)
