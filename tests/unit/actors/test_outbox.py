"""The average has the same bits whichever thread brings an update into it, and whenever."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ebm_dist.learner import Ema
from ebm_dist.learner.packed import PackedWeights
from ebm_dist.learner.weight_outbox import WeightOutbox

FLAT = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


def outbox() -> WeightOutbox:
    return WeightOutbox(0.9, FLAT[0].numpy(), num_averaged=35)


def averages() -> list[torch.Tensor]:
    """After each update, by `Ema` alone."""
    ema = Ema(0.9, FLAT[0], num_averaged=35)
    out = []
    for flat in FLAT[1:]:
        ema.update(flat)
        out.append(ema.flat.clone())
    return out


@pytest.mark.parametrize("cuts", itertools.product([False, True], repeat=4))
@pytest.mark.parametrize("late", [False, True])
def test_a_cut_has_each_update_once_whether_it_was_sent_before_or_not(
    late: bool, cuts: Sequence[bool]
) -> None:
    box, expected = outbox(), averages()
    for index, cut in enumerate(cuts):
        box.add(PackedWeights(FLAT[index + 1].clone()))
        if not late:
            box.take(average=False)
        if cut:
            state = box.state()
            assert torch.equal(state["flat"], expected[index])
            assert state["num_updates"] == index + 1
        if late:
            flat, mean = box.take(average=True)
            assert np.array_equal(flat, FLAT[index + 1].numpy())
            assert mean is not None
            assert np.array_equal(mean, expected[index].numpy())


def test_weights_of_two_updates_leave_in_their_order() -> None:
    box = outbox()
    box.add(PackedWeights(FLAT[1].clone()))
    box.add(PackedWeights(FLAT[2].clone()))
    for index in (1, 2):
        flat, mean = box.take(average=True)
        assert np.array_equal(flat, FLAT[index].numpy())
        assert mean is not None
        assert np.array_equal(mean, averages()[index - 1].numpy())


def test_an_average_that_was_sent_is_not_moved_by_later_updates() -> None:
    box = outbox()
    box.add(PackedWeights(FLAT[1].clone()))
    _, mean = box.take(average=True)
    box.add(PackedWeights(FLAT[2].clone()))
    box.state()
    assert mean is not None
    assert np.array_equal(mean, averages()[0].numpy())


def test_weights_that_wait_while_a_checkpoint_is_loaded_have_no_part_in_its_average() -> None:
    box, other = outbox(), outbox()
    other.add(PackedWeights(FLAT[3].clone()))
    saved = other.state()
    box.add(PackedWeights(FLAT[1].clone()))
    box.begin(FLAT[2].numpy(), saved)
    flat, _ = box.take(average=False)
    assert np.array_equal(flat, FLAT[1].numpy())
    assert torch.equal(box.state()["flat"], saved["flat"])
    assert box.state()["num_updates"] == 1


class Slow(PackedWeights):
    """Weights whose transfer ends when the test says so."""

    def __init__(self, flat: torch.Tensor) -> None:
        super().__init__(flat)
        self.begun, self.end = threading.Event(), threading.Event()

    def on_host(self) -> np.ndarray:
        self.begun.set()
        assert self.end.wait(60)
        return super().on_host()


def test_an_update_does_not_wait_for_the_transfer_of_the_one_before_and_a_cut_does() -> None:
    box, slow = outbox(), Slow(FLAT[1].clone())
    box.add(slow)
    taken: list[np.ndarray] = []
    sends = threading.Thread(target=lambda: taken.append(box.take(average=False)[0]))
    sends.start()
    assert slow.begun.wait(60)
    box.add(PackedWeights(FLAT[2].clone()))  # returns, with the transfer under way
    states: list[dict[str, torch.Tensor]] = []
    cut = threading.Thread(target=lambda: states.append(box.state()))
    cut.start()
    cut.join(0.05)
    assert not taken
    assert not states, "without the first update"
    slow.end.set()
    sends.join(60)
    cut.join(60)
    assert np.array_equal(taken[0], FLAT[1].numpy())
    assert torch.equal(states[0]["flat"], averages()[1])
