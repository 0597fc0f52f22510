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


def wandering(num_records, num_chains, drift):
    """A trace that any library can be given: no generator is in it."""
    t = torch.arange(num_records, dtype=torch.float64)[:, None]
    b = torch.arange(num_chains, dtype=torch.float64)
    return torch.sin(2.1 * t * t + 1.3 * b) + torch.sin(0.7 * t + b) + drift * t / num_records


@pytest.mark.parametrize(
    ("num_records", "num_chains", "drift", "expected"),
    [
        (10, 1, 0.0, 3.89378),
        (11, 4, 1.0, 21.18778),
        (64, 1, 0.0, 31.71361),
        (64, 8, 0.0, 280.2655),
        (65, 8, 3.0, 54.07576),
        (200, 16, 6.0, 32.35261),
        (200, 2, 0.5, 207.24682),
    ],
)
def test_ess_is_that_of_arviz(num_records, num_chains, drift, expected):
    # arviz 0.23.4, ess(method="mean").
    trace = wandering(num_records, num_chains, drift)
    assert diagnostics.effective_sample_size(trace) == pytest.approx(expected, rel=1e-5)


def test_ess_sees_chains_that_drift_together():
    # Whole chains agree with each other; the halves of each do not.
    trace = ar1(0.5, 200, 8) + torch.linspace(0, 6, 200)[:, None]
    assert diagnostics.effective_sample_size(trace) < 30


def test_ess_of_swinging_chains_exceeds_their_number_up_to_its_bound():
    num = 50 * 4
    swing = torch.tensor([1.0, -1.0]).repeat(25)[:, None].expand(50, 4) + ar1(0.0, 50, 4) / 100
    assert diagnostics.effective_sample_size(swing) == pytest.approx(num * math.log10(num))


@pytest.mark.parametrize("num_records", [20, 60, 400])
@pytest.mark.parametrize("apart", [0.0, 10.0])
def test_time_of_an_ar1_chain_is_its_own_however_short_the_trace_and_far_the_means(
    num_records, apart
):
    # (1 + rho) / (1 - rho) = 39. The error from independent repetitions.
    num_chains, num_repetitions = 256, 24
    offset = apart * torch.arange(num_chains)
    trace = ar1(0.95, num_records, num_chains * num_repetitions)
    times = torch.stack(
        [
            diagnostics.autocorrelation_time(part + offset).log()
            for part in trace.split(num_chains, dim=1)
        ]
    )
    error = float(times.std()) / math.sqrt(num_repetitions)
    assert 4 * error < 0.35
    assert abs(float(times.mean()) - math.log(39)) < 4 * error + 0.02


@pytest.mark.parametrize(("rho", "expected"), [(0.0, 1.0), (0.5, 3.0), (-0.5, 1 / 3)])
def test_time_of_quick_chains(rho, expected):
    time = diagnostics.autocorrelation_time(ar1(rho, 200, 256, event=(2,)))
    assert time.tolist() == pytest.approx([expected] * 2, rel=0.1)


def test_time_of_a_slow_chain_under_noise_is_that_of_both():
    # Half the variance white, half AR(1) of time 39: 20.
    trace = ar1(0.95, 2000, 64) + ar1(0.0, 2000, 64, seed=1)
    assert diagnostics.autocorrelation_time(trace) == pytest.approx(20, rel=0.2)


def test_time_of_chains_that_never_move_is_the_longest_of_a_trace():
    stuck = torch.arange(4.0).expand(20, 4)
    assert diagnostics.autocorrelation_time(stuck) == pytest.approx(200)


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


def test_chains_that_never_move_in_one_coordinate_raise_an_alarm_though_none_is_stuck():
    trace = ar1(0.0, 64, 32, event=(10,))
    trace[..., 4] = torch.tensor([-3.0, 3.0]).repeat(16)
    found = diagnostics.stagnation(trace, where="shard 2")
    assert not found.stuck.any()
    assert found.alarm is not None
    assert found.alarm.startswith("shard 2: the chains move, but disagree about coordinate 4")


def test_chains_of_two_unequal_modes_raise_an_alarm_though_none_is_stuck():
    side = torch.where(torch.arange(40) < 8, 2.0, -2.0)
    found = diagnostics.stagnation(side + 0.8 * ar1(0.5, 64, 40))
    assert found.fraction == 0
    assert found.rhat > 2
    assert found.alarm is not None


def test_chains_that_agree_in_every_coordinate_and_not_in_energy_raise_an_alarm():
    # On a sphere of another radius each: every coordinate has mean 0.
    radius = torch.linspace(1, 3, 16)[:, None]
    trace = radius * torch.nn.functional.normalize(ar1(0.0, 64, 16, event=(50,)), dim=-1)
    found = diagnostics.stagnation(trace, trace.square().sum(-1) / 2)
    assert found.rhat < 1.2 < found.energy_rhat
    assert found.alarm is not None
    assert "disagree about the energy" in found.alarm


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
