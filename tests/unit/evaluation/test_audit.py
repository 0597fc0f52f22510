"""The audit finds planted minima and short-run laws, and stays silent where there are none."""

import math

import pytest
import torch

from ebm_dist import energies, samplers
from ebm_dist.evaluation.audit import MAX_HIGH, long_run_audit
from ebm_dist.evaluation.config import EvaluationConfig


def normal(num, dim, std=1.0, seed=0):
    return std * torch.empty(num, dim).normal_(generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(7)


class Planted(torch.nn.Module):
    """A unit Gaussian well around the data and a deeper one that no datum is near.

    The path to it starts at about x = 3, so short chains from the data do not find it.
    """

    def __init__(self):
        super().__init__()
        self.depth = torch.nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        well = torch.exp(-((x[:, 0] - 5) ** 2 + x[:, 1] ** 2) / (2 * 1.2**2))
        return x.square().sum(dim=1) / 2 - (self.depth + 8) * well


def audit_of(energy, *, step_size=0.05, **changes):
    kernel = samplers.make("langevin", step_size=step_size, temperature=1.0)
    given = {"short_steps": 20, "num_steps": 600, "generator": generator()} | changes
    data = given.pop("data", normal(400, 2, seed=1))
    x = given.pop("x", normal(200, 2, seed=2))
    return long_run_audit(energy, kernel, x, data, **given)


def test_planted_minimum_is_found_and_its_chains_are_handed_back():
    audit = audit_of(Planted())
    assert audit.spurious_fraction > 0.5
    assert audit.law_differs
    assert audit.alarm is not None
    assert "spurious minima" in audit.alarm
    # Every spurious chain is in the planted well.
    assert float((audit.long[audit.spurious] - torch.tensor([5.0, 0.0])).norm(dim=1).max()) < 4


def test_feeding_the_chains_back_removes_the_planted_minimum():
    energy = Planted()
    data = normal(400, 2, seed=1)
    audit = audit_of(energy, data=data)
    optimizer = torch.optim.SGD(energy.parameters(), lr=2.0)
    for _ in range(40):
        if audit.spurious_fraction == 0:
            break
        optimizer.zero_grad()
        (energy(data).mean() - energy(audit.negatives).mean()).backward()
        optimizer.step()
        audit = audit_of(energy, data=data)
    assert audit.spurious_fraction == 0
    with torch.no_grad():
        planted = float(energy(torch.tensor([[5.0, 0.0]])))
        assert planted > float(energy(data).quantile(0.5))


def test_chains_far_above_the_datas_energies_are_an_alarm():
    # The model is far wider than the data: its own law lies where the data never is.
    wide = energies.quadratic(precision=[1.0, 1.0])
    audit = audit_of(wide, data=0.1 * normal(400, 2, seed=1))
    assert audit.high_fraction > 0.9
    assert audit.alarm is not None
    assert "lie far above the data's energies" in audit.alarm


def test_energies_of_data_with_a_heavy_tail_are_not_taken_for_high():
    # One coordinate of a quadratic has chi-squared energies: some per cent are past the fence.
    audit = audit_of(
        energies.quadratic(precision=[1.0]), data=normal(400, 1, seed=1), x=normal(200, 1, seed=2)
    )
    assert abs(audit.high_fraction) < MAX_HIGH
    assert audit.alarm is None


def test_a_right_model_raises_no_alarm():
    audit = audit_of(energies.quadratic(precision=[1.0, 1.0]))
    assert audit.alarm is None
    assert audit.spurious_fraction == 0
    assert not audit.law_differs
    assert len(audit.negatives) == 0


def test_false_alarms_are_as_rare_as_asked_for():
    energy = energies.quadratic(precision=[1.0, 1.0])
    alarms = sum(
        audit_of(
            energy,
            x=normal(60, 2, seed=100 + seed),
            short_steps=30,
            num_steps=60,
            step_size=0.3,
            significance=0.05,
            min_shift=0.0,
            generator=torch.Generator().manual_seed(seed),
        ).law_differs
        for seed in range(100)
    )
    # Bonferroni over correlated quantities: at most 5 expected, 4 standard errors above is 13.
    assert alarms <= 13


def test_short_run_generator_is_seen_by_its_long_run_variance():
    # exact: rho^2K s0^2 + (1 - rho^2K) 2/(a(2 - ah)) = 1, and in the long run 2/(a(2 - ah)).
    alpha, h, num_steps, num_chains = 1.73491, 0.01, 60, 4000
    audit = audit_of(
        energies.quadratic(precision=[alpha]),
        step_size=h,
        data=normal(500, 1, seed=1),
        x=normal(num_chains, 1, std=2.0, seed=2),
        short_steps=num_steps,
        num_steps=900,
    )
    error = math.sqrt(2 / num_chains)
    assert abs(audit.variance_short - 1) < 4 * error
    assert 2 / (alpha * (2 - alpha * h)) == pytest.approx(0.58144, abs=1e-5)
    assert abs(audit.variance_long / 0.58144 - 1) < 4 * error
    assert audit.law_differs
    assert audit.spurious_fraction == 0
    assert audit.alarm is not None
    assert "short-run generator" in audit.alarm
    assert "buffer.reinit_prob" in audit.alarm
    assert len(audit.negatives) == num_chains


def test_a_run_with_persistent_chains_is_not_told_to_use_them():
    audit = audit_of(
        energies.quadratic(precision=[1.73491]),
        step_size=0.01,
        data=normal(500, 1, seed=1),
        x=normal(500, 1, std=2.0, seed=2),
        persistent=True,
    )
    assert audit.alarm is not None
    assert "the persistent chains have not converged to the model's law" in audit.alarm
    assert "reinit_prob" not in audit.alarm


def test_diverging_chains_are_set_aside_and_named():
    def cliff(x):
        # Beyond 3 it falls without end, faster than a float can follow.
        return x.square().sum(dim=1) / 2 - (x[:, 0] - 3).relu() ** 4

    audit = audit_of(cliff, num_steps=400, step_size=0.1, x=normal(64, 2))
    assert 0 < int(audit.diverged.sum()) < 64
    assert bool(torch.isfinite(audit.long).all())
    assert audit.alarm is not None
    assert "diverged" in audit.alarm
    assert math.isfinite(audit.energy_long)


def test_audit_is_determined_by_its_generator_and_leaves_no_gradients():
    energy = Planted()
    first, second = audit_of(energy, num_steps=50), audit_of(energy, num_steps=50)
    assert torch.equal(first.long, second.long)
    assert first.metrics() == second.metrics()
    assert energy.depth.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 20}, "short_steps < num_steps"),
        ({"x": torch.zeros(4, 3)}, "must be equal"),
        ({"x": torch.zeros(1, 2)}, "at least 2 chains"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        audit_of(energies.quadratic(precision=[1.0, 1.0]), **changes)


def test_every_key_of_the_config_has_a_docstring():
    fields = EvaluationConfig.model_fields
    assert all(field.description for field in fields.values())
    assert EvaluationConfig().every == 500
