"""Barriers against wells whose saddle is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_dist.evaluation.connectivity import barriers, connectivity, pairs


def double_well(x):
    return 3 * (x[:, 0] ** 2 - 1) ** 2 + x[:, 1] ** 2


def ring(x):
    return 50 * (x.norm(dim=1) - 1) ** 2


def test_the_barrier_between_two_wells_is_the_height_of_their_saddle():
    start, end = torch.tensor([[-1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # No image stands on the saddle, and all would slide off it if they were not spaced again.
    straight, relaxed = barriers(double_well, start, end, num_images=16)
    assert straight.tolist() == pytest.approx([3.0, 0.0], abs=0.03)
    assert relaxed.tolist() == pytest.approx([3.0, 0.0], abs=0.03)


def test_a_bent_path_finds_the_saddle_that_a_straight_one_misses():
    """The saddle is at the origin; the ends lie off the axis, and the valley is a parabola."""

    def bent(x):
        return double_well(torch.stack([x[:, 0], 4 * (x[:, 1] - x[:, 0] ** 2)], 1))

    # Of the second path the ends lie on the slopes, and stay there.
    x = torch.tensor([1.0, 0.6])
    ends = torch.stack([-x, x**2], 1), torch.stack([x, x**2], 1)
    low = bent(ends[0])
    straight, relaxed = barriers(bent, *ends, num_steps=200)
    assert straight.tolist() == pytest.approx((3 + 16 * x**4 - low).tolist())
    assert relaxed.tolist() == pytest.approx((3 - low).tolist(), rel=0.05)


def test_events_of_one_valley_are_connected_though_the_straight_line_leaves_it():
    angle = torch.tensor([0.0, 2.0])
    x = torch.stack([angle.cos(), angle.sin()], 1)
    straight, relaxed = barriers(ring, x[:1], x[1:])
    assert straight.item() > 5
    assert relaxed.item() < 0.05 * straight.item()


def test_paths_do_not_depend_on_the_others_of_their_batch():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.empty(2, 3, 2).normal_(generator=generator)
    together = barriers(double_well, start, end)
    alone = [barriers(double_well, start[i : i + 1], end[i : i + 1]) for i in range(3)]
    for both, parts in zip(together, zip(*alone)):
        torch.testing.assert_close(both, torch.cat(parts))


def test_ends_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        barriers(ring, torch.zeros(2, 2), torch.zeros(3, 2))


class Wells(nn.Module):
    """E(x, 0) is the double well, E(x, 1) a bowl."""

    context, needs_context, num_labels = frozenset({"label"}), frozenset({"label"}), 2

    def forward(self, x, label):
        return torch.where(label == 0, double_well(x), x.square().sum(1))


def test_connectivity_counts_barriers_in_units_of_the_temperature_within_each_class():
    label = torch.tensor([0, 1, 0, 1] * 5)
    side = torch.tensor([-1.0, -1.0, 1.0, 1.0] * 5)
    x = torch.stack([side, torch.zeros(20)], 1)
    found = connectivity(Wells(), x, label, temperature=0.1)
    # Five pairs of wells, 30 T apart, and five of a bowl, which nothing parts.
    assert found["connectivity/connected"] == 0.5
    assert found["connectivity/connected_low"] < 0.5 < found["connectivity/connected_high"]
    hot = connectivity(Wells(), x, label, temperature=1.0)
    assert hot["connectivity/connected"] == 1.0
    left, right = pairs(20, label, 32)
    assert torch.equal(label[left], label[right])
    assert len({*left.tolist(), *right.tolist()}) == 20
    assert connectivity(Wells(), x[:1], label[:1], temperature=1.0) == {}
