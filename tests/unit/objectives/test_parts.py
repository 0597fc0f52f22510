"""Parts of objectives, each against a value worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ebm_dist import energies, objectives
from ebm_dist.core.types import Batch, Negatives
from ebm_dist.objectives.contrast.neighbours import neighbours
from ebm_dist.objectives.likelihood.kl_term import kl_term
from ebm_dist.objectives.likelihood.penalties import spectral_norms
from ebm_dist.objectives.matching.energy_matching import flow_weight, trimmed


class Parabola(nn.Module):
    """E(x) = alpha/2 |x|^2."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.alpha * x.flatten(1).square().sum(1)


def test_energy_l2_adds_the_mean_squares_of_both_sides():
    energy = Parabola(2.0)  # energies 1, 4 and 9
    data, negatives = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])
    plain, _ = objectives.make("contrastive")(energy, data, negatives)
    held, metrics = objectives.make("contrastive", energy_l2=0.1)(energy, data, negatives)
    assert plain.item() == pytest.approx(2.5 - 9)
    assert held.item() == pytest.approx(2.5 - 9 + 0.1 * (8.5 + 81))
    assert metrics["energy/gap"].item() == pytest.approx(-6.5)
    assert metrics["energy/positive"].item() == pytest.approx(2.5)
    assert metrics["energy/negative"].item() == pytest.approx(9)


def test_negatives_count_by_their_log_weight():
    energy = Parabola(2.0)
    negatives = Negatives(
        torch.tensor([[1.0], [2.0]]),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([3.0, 1.0]).log(),
    )
    _, metrics = objectives.make("contrastive")(energy, torch.zeros(1, 1), negatives)
    assert metrics["energy/negative"].item() == pytest.approx((3 * 1 + 1 * 4) / 4)


def test_the_energy_is_called_once_on_data_negatives_and_penalty_points():
    calls = []

    def energy(x):
        calls.append(len(x))
        return x.square().sum(1)

    objective = objectives.make(
        "contrastive", gradient_penalty=0.1, gradient_penalty_at="interpolation"
    )
    objective(energy, torch.zeros(3, 2), torch.zeros(5, 2), torch.Generator())
    assert calls == [3 + 5 + 3]


def test_kl_term_has_the_gradient_of_a_moved_parabola():
    # x' = (1 - h alpha) x + noise, and d/d alpha of stop(alpha)/2 x'^2 = -alpha h x x'.
    alpha, h = 1.5, 0.2
    energy, x = Parabola(alpha), torch.linspace(-2, 3, 7, dtype=torch.float64)[:, None]
    term = kl_term(
        energy,
        x,
        step_size=h,
        temperature=0.7,
        repel_weight=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    noise = torch.empty(7, 1, dtype=torch.float64).normal_(
        generator=torch.Generator().manual_seed(0)
    )
    moved = (1 - h * alpha) * x + (2 * 0.7 * h) ** 0.5 * noise
    term.backward()
    assert term.item() == pytest.approx(0.5 * alpha * moved.square().mean().item())
    assert energy.alpha.grad.item() == pytest.approx((-alpha * h * x * moved).mean().item())


def test_repelling_term_is_the_mean_log_distance_to_the_nearest_other_negative():
    energy = Parabola(1.0)
    x = torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64)
    h = 0.1

    def term(weight):
        return kl_term(
            energy,
            x,
            step_size=h,
            temperature=0.0,
            repel_weight=weight,
            generator=torch.Generator(),
        )

    # Moved to 0, .9, 3.6; the nearest of the others stands at 1, 0, 1.
    expected = (math.log(1.0) + math.log(0.9) + math.log(2.6)) / 3
    assert (term(0.0) - term(1.0)).item() == pytest.approx(expected)
    # d/d alpha: moved = (1 - h alpha) x, so the distances fall at h x on the left side of none.
    (slope,) = torch.autograd.grad(term(0.0) - term(1.0), energy.alpha)
    assert slope.item() == pytest.approx((0.0 - h * 1 / 0.9 - h * 4 / 2.6) / 3)


def test_spectral_norms_are_the_largest_singular_values():
    energy = energies.FAMILY.section("mlp", event_shape=(3,), widths=(8, 8)).build(1)
    exact = [torch.linalg.svdvals(p.flatten(1))[0] for p in energy.parameters() if p.ndim > 1]
    total = spectral_norms(energy, num_iterations=200)
    assert total.item() == pytest.approx(sum(exact).item(), rel=1e-4)
    quick = spectral_norms(energy).item()
    assert 0.9 * sum(exact).item() < quick <= sum(exact).item() * (1 + 1e-6)
    with pytest.raises(ValueError, match="no weight matrix"):
        spectral_norms(Parabola(1.0))


def test_joint_loss_is_cross_entropy_plus_contrastive_of_minus_logsumexp():
    energy = energies.FAMILY.section("mlp", event_shape=(2,), widths=(8,), num_classes=3).build()
    g = torch.Generator().manual_seed(0)
    x, negatives = torch.randn(6, 2, generator=g), torch.randn(4, 2, generator=g)
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    loss, metrics = objectives.make("joint", classification_weight=2.0)(
        energy, Batch(x, label), negatives
    )
    cross = torch.nn.functional.cross_entropy(energy.logits(x), label)
    expected = 2 * cross + energy(x).mean() - energy(negatives).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    right = (energy.logits(x).argmax(1) == label).float().mean()
    assert metrics["objective/accuracy"].item() == right.item()


class Ramps(nn.Module):
    """Logits x, 2 x and 3 x of x (B, 1)."""

    def logits(self, x):
        return x * torch.tensor([1.0, 2.0, 3.0])


def test_joint_loss_with_labels_contrasts_the_logits_of_the_labels_of_data_and_of_chains():
    negatives = Negatives(
        torch.tensor([[1.0], [3.0]]),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([3.0, 1.0]).log(),
        {"label": torch.tensor([1, 0])},
    )
    batch = Batch(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 2]))
    objective = objectives.make("joint", classification_weight=2.0, contrastive_weight=0.5)
    loss, metrics = objective(Ramps(), batch, negatives)
    # E(x, y) = -f_y(x): -1 and -6 of the data, -2 and -3 of the chains, of weights 3/4 and 1/4.
    assert metrics["energy/positive"].item() == pytest.approx(-3.5)
    assert metrics["energy/negative"].item() == pytest.approx(-2.25)
    normalisers = [math.log(sum(math.exp(k * x) for k in (1, 2, 3))) for x in (1, 2)]
    cross = (normalisers[0] - 1 + normalisers[1] - 6) / 2
    assert metrics["loss/classification"].item() == pytest.approx(cross)
    assert loss.item() == pytest.approx(2 * cross + 0.5 * (-3.5 + 2.25))
    assert metrics["objective/accuracy"].item() == 0.5


def test_trimming_leaves_out_the_highest_energies_and_shares_out_their_weight():
    energy = torch.tensor([1.0, 50.0, 3.0, 2.0])
    assert trimmed(torch.full((4,), 0.25), energy, 0.25).sum().item() == pytest.approx(2.0)
    assert trimmed(torch.full((4,), 0.25), energy, 0.2).sum().item() == pytest.approx(14.0)
    weight = torch.tensor([0.5, 0.2, 0.2, 0.1])
    expected = (0.5 * 1 + 0.2 * 3 + 0.1 * 2) / 0.8
    assert trimmed(weight, energy, 0.25).sum().item() == pytest.approx(expected)


def test_flow_counts_fully_before_the_cutoff_and_not_at_time_one():
    time = torch.tensor([0.0, 0.5, 0.8, 0.9, 1.0])
    torch.testing.assert_close(flow_weight(time, 0.8), torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0]))
    torch.testing.assert_close(flow_weight(time, 1.0), torch.ones(5))


def test_the_clamp_takes_the_gradient_of_a_contrastive_part_that_ran_away():
    energy, g = Parabola(1.0), torch.Generator()
    params = {"contrastive_weight": 1.0, "trim_fraction": 0.0, "flow_weight": 0.0}
    data, negatives = torch.zeros(4, 1), torch.ones(4, 1)  # gap -1/2
    for clamp, expected in ((0.1, 0.0), (0.6, -0.5)):
        objective = objectives.make("energy_matching", contrastive_clamp=clamp, **params)
        loss, _ = objective(energy, data, negatives, g)
        (grad,) = torch.autograd.grad(loss, energy.alpha)
        assert grad.item() == pytest.approx(expected)
        assert loss.item() == pytest.approx(max(-0.5, -clamp))


def test_warm_up_is_announced_and_keeps_the_contrastive_part_out():
    energy, g = Parabola(1.0), torch.Generator().manual_seed(0)
    objective = objectives.make("energy_matching", warmup_steps=3)
    data, negatives = torch.zeros(4, 1), torch.ones(4, 1)
    with pytest.raises(ValueError, match="begin_update"):
        objective(energy, data, negatives, g)
    seen = []
    for step in range(5):
        objective.begin_update(step)
        seen.append("energy/gap" in objective(energy, data, negatives, g)[1])
    assert seen == [False, False, False, True, True]


def test_neighbours_of_bits_differ_in_the_chosen_bit_alone():
    x = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
    out = neighbours(x, torch.tensor([[0, 3]]), one_hot=False)
    assert out.shape == (1, 2, 1, 2, 2)
    assert out[0, 0, 0].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert out[0, 1, 0].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_neighbours_of_one_hot_sites_visit_every_other_state_once():
    state = torch.tensor([[2, 0]])
    x = torch.nn.functional.one_hot(state, 3).float()
    out = neighbours(x, torch.tensor([[0, 1]]), one_hot=True)
    assert out.shape == (1, 2, 2, 2, 3)
    states = out.argmax(-1)[0].reshape(4, 2).tolist()
    assert sorted(map(tuple, states)) == [(0, 0), (1, 0), (2, 1), (2, 2)]
    assert torch.equal(out.sum(-1), torch.ones(1, 2, 2, 2))


def test_recovery_by_levels_needs_a_logit_for_each_level():
    objective = objectives.make(
        "recovery_likelihood", noise_std=(0.2, 0.5), conditioning="level", num_steps=1
    )
    energy = energies.make("mlp", event_shape=(2,), widths=(4,), num_classes=3)
    with pytest.raises(ValueError, match=r"energy\.num_classes: 3, .*2 levels"):
        objective(energy, torch.zeros(4, 2), None, torch.Generator())
    with pytest.raises(ValueError, match="below 1"):
        objectives.make("recovery_likelihood", noise_std=1.5, conditioning="level")
    with pytest.raises(ValueError, match="run_chain"):
        objectives.make("recovery_likelihood", noise_std=0.5).sample(
            energy, torch.zeros(1, 2), torch.Generator()
        )
