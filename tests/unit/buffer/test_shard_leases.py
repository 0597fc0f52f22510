"""The lease protocol: chains are conserved, and nobody's late work overwrites anybody's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shards import Clock, chain_ids, make_shard, move, total

from ebm_dist.buffer.answers import Origin
from ebm_dist.buffer.config import BufferConfig, shard_capacities
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import Batch, EventSpec


def test_a_lease_takes_slots_that_no_other_lease_has():
    shard = make_shard(24)
    leases = [shard.checkout(i, 4) for i in range(6)]
    slots = np.concatenate([lease.slots for lease in leases if lease is not None])
    assert sorted(slots.tolist()) == list(range(24))
    assert shard.checkout(6, 1) is None
    assert shard.counts().leased == 24


def test_more_chains_than_a_lease_may_have_are_refused():
    with pytest.raises(ValueError, match=r"5 chains.*4 at a time.*workers\.num_chains"):
        make_shard().checkout(0, 5)


def test_a_shard_with_too_few_free_chains_gives_none_and_keeps_them():
    shard = make_shard(6)
    shard.checkout(0, 4)
    assert shard.checkout(1, 4) is None
    assert shard.counts().free == 2


def test_a_repeated_checkout_gives_the_same_lease_with_the_same_noise():
    shard = make_shard()
    first, again = shard.checkout(7, 4), shard.checkout(7, 4)
    assert first is not None
    assert again is not None
    assert first.slots.tolist() == again.slots.tolist()
    assert first.seed == again.seed
    assert np.array_equal(first.position, again.position)
    assert shard.counts().leased == 4


def test_a_checkin_commits_and_a_repeated_one_changes_nothing():
    shard = make_shard()
    lease = shard.checkout(0, 4)
    moved = move(lease, version=3)
    reply = shard.checkin(moved)
    assert reply.accepted
    assert reply.counts.ready == 4
    after = shard.snapshot().arrays
    repeated = shard.checkin(move(lease, version=9, position=moved.position + 5))
    assert repeated.accepted
    assert repeated.version == 3
    for name, array in shard.snapshot().arrays.items():
        assert np.array_equal(array, after[name]), name
    assert shard.counts().late_checkins == 0


def test_a_committed_lease_asked_for_again_repeats_its_reply_and_takes_no_slots():
    # The reply of a checkin was lost and the round is started again.
    shard = make_shard()
    shard.checkin(move(shard.checkout(0, 4), version=3))
    assert shard.checkout(0, 4) is None
    reply = shard.checkin(None, 0)
    assert reply.accepted
    assert reply.version == 3
    assert shard.counts().leased == 0
    assert not shard.checkin(None, 1).accepted


def test_negatives_are_handed_over_once_and_only_after_the_commit():
    shard = make_shard()
    lease = shard.checkout(0, 4)
    assert shard.take(0) == (False, None)
    moved = move(lease, version=3)
    shard.checkin(moved)
    ready, negatives = shard.take(0)
    assert ready
    assert negatives is not None
    assert np.array_equal(negatives.x, moved.position)
    assert np.array_equal(negatives.energy, moved.energy)
    assert negatives.version.tolist() == [3] * 4
    assert shard.take(0) == (False, None)
    assert shard.counts().free == 24


def test_an_expired_lease_gives_the_old_chains_back_and_its_late_checkin_is_counted():
    clock = Clock()
    shard = make_shard(clock=clock)
    before = shard.snapshot().arrays
    lease = shard.checkout(0, 4)
    clock.now = 10.5
    reply = shard.checkin(move(lease))
    assert not reply.accepted
    assert reply.counts.free == 24
    assert reply.counts.expired_leases == 1
    assert reply.counts.late_checkins == 1
    after = shard.snapshot().arrays
    for name in ("position", "energy", "version", "age", "log_weight", "chain_id"):
        assert np.array_equal(before[name], after[name]), name


@pytest.mark.parametrize("capacity", [8, 24])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rounds_redone_after_their_leases_expired_move_the_chains_that_they_were_about(
    capacity: int, order: tuple[int, int]
):
    # Drawn anew, in another order or beside others, they would get others: sync mode must not.
    clock = Clock()
    shard = make_shard(capacity, clock=clock, config={"reinit_prob": 0.5})
    first = dict(enumerate(shard.checkout_many([0, 1], 4)))
    clock.now = 10.5
    for lease_id in order:
        again = shard.checkout(lease_id, 4)
        for name in ("slots", "chain_id", "position", "version", "log_weight"):
            expected = getattr(first[lease_id], name)
            assert np.array_equal(getattr(again, name), expected), (lease_id, name)
        assert again.seed == first[lease_id].seed
        assert not shard.checkin(move(first[lease_id])).accepted, "the worker that was too late"
        assert shard.checkin(move(again)).accepted
    assert shard.counts().expired_leases == 2


def test_it_moves_others_where_those_have_gone_to_another_lease():
    clock = Clock()
    shard = make_shard(4, clock=clock)
    shard.checkout(0, 4)
    clock.now = 10.5
    assert shard.checkout(1, 4) is not None
    assert shard.checkout(0, 4) is None
    assert shard.counts().leased == 4


def test_a_late_checkin_does_not_touch_the_lease_that_has_its_slots_now():
    clock = Clock()
    shard = make_shard(4, clock=clock)
    late = shard.checkout(0, 4)
    clock.now = 11.0
    current = shard.checkout(1, 4)
    assert set(current.slots.tolist()) == set(late.slots.tolist())
    assert not shard.checkin(move(late, position=np.full((4, 3), 99.0))).accepted
    # Not under the id of the present lease either: its generations are of the old one.
    assert not shard.checkin(move(late, lease_id=1)).accepted
    assert shard.checkin(move(current)).accepted
    assert (shard.snapshot().arrays["position"] != 99.0).all()


def test_a_renewed_lease_lives_from_its_renewal():
    clock = Clock()
    shard = make_shard(clock=clock)
    shard.checkout(0, 4)
    clock.now = 8.0
    lease = shard.checkout(0, 4)
    clock.now = 15.0
    assert shard.checkin(move(lease)).accepted


@pytest.mark.parametrize(
    "changes",
    [
        {"shard_epoch": 1},
        {"lease_id": 77},
        {"generations": np.full(4, 9)},
        {"slots": np.array([0, 1, 2, 3])},
    ],
)
def test_a_checkin_of_another_epoch_lease_generation_or_slots_is_refused(changes):
    shard = make_shard()
    lease = shard.checkout(0, 4)
    assert sorted(lease.slots.tolist()) != [0, 1, 2, 3]
    before = shard.snapshot().arrays
    reply = shard.checkin(move(lease, **changes))
    assert not reply.accepted
    assert reply.counts.late_checkins == 1
    assert reply.counts.leased == 4
    assert np.array_equal(before["position"], shard.snapshot().arrays["position"])


def test_chains_of_another_shape_or_number_are_an_error_that_names_both():
    shard = make_shard()
    lease = shard.checkout(0, 4)
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(4, 3\)"):
        shard.checkin(move(lease, position=np.zeros((4, 2), np.float32)))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\)"):
        shard.checkin(move(lease, position=np.zeros((2, 3), np.float32)))
    assert total(shard) == 24


def test_a_repair_leases_the_ready_chains_again_from_where_they_are():
    shard = make_shard()
    moved = move(shard.checkout(0, 4), version=1)
    shard.checkin(moved)
    lease = shard.checkout_ready(1, 0)
    assert np.array_equal(lease.position, moved.position)
    assert lease.version.tolist() == [1] * 4
    assert shard.take(0) == (False, None)
    assert shard.checkin(move(lease, version=5)).accepted
    _, negatives = shard.take(1)
    assert negatives.version.tolist() == [5] * 4
    assert shard.checkout_ready(2, 0) is None


def test_released_negatives_are_free_again():
    shard = make_shard()
    shard.checkin(move(shard.checkout(0, 4)))
    assert shard.release(0) == 4
    assert shard.release(0) == 0
    assert shard.counts().free == 24


def test_leases_drawn_together_do_not_depend_on_what_comes_back_when():
    apart, together = make_shard(12), make_shard(12)
    drawn = together.checkout_many([0, 1, 2], 4)
    first = [apart.checkout(0, 4), apart.checkout(1, 4)]
    third = apart.checkout(2, 4)
    for a, b in zip(drawn, [*first, third]):
        assert a.slots.tolist() == b.slots.tolist()
    # Drawn one by one with a round back in between, the third has other slots to choose from.
    late = make_shard(12)
    late.checkout(0, 4)
    late.cancel(0)
    late.checkout(1, 4)
    assert late.checkout(2, 4).slots.tolist() != drawn[2].slots.tolist()


def test_a_chain_that_starts_afresh_is_young_and_keeps_its_identity():
    shard = make_shard(config={"reinit_prob": 1.0})
    before = chain_ids(shard)
    old = shard.snapshot().arrays["position"]
    lease = shard.checkout(0, 4)
    assert not np.isclose(lease.position, old[lease.slots]).any()
    assert lease.version.tolist() == [-1] * 4
    for _ in range(2):
        shard.checkin(move(lease))
        shard.take(lease.lease_id)
        assert shard.snapshot().arrays["age"][lease.slots].tolist() == [1] * 4
        lease = shard.checkout(lease.lease_id + 1, 4)
    assert chain_ids(shard) == before


def test_a_chain_restarts_as_often_as_reinit_prob_says():
    shard = make_shard(2000, 50, config={"reinit_prob": 0.1})
    for i in range(200):
        shard.checkin(move(shard.checkout(i, 50)))
        shard.take(i)
    num = 200 * 50
    standard_error = (0.1 * 0.9 / num) ** 0.5
    assert abs(shard.counts().reinitialised / num - 0.1) < 4 * standard_error


@pytest.mark.parametrize("capacity", [24, 25, 26])
def test_identities_number_the_chains_of_all_shards(capacity):
    config = {"capacity": capacity, "num_shards": 3, "reinit_prob": 1.0}
    seen: list[int] = []
    for index, size in enumerate(shard_capacities(capacity, 3)):
        shard = make_shard(size, index=index, config=config)
        shard.checkin(move(shard.checkout(0, 4)))
        seen += chain_ids(shard)
    assert seen == list(range(capacity))


@pytest.mark.parametrize("mixed_up", [[1, 0, 2, 3], [0, 0, 2, 3]])
def test_chains_that_a_worker_mixed_up_are_refused_by_name(mixed_up):
    shard = make_shard()
    lease = shard.checkout(0, 4)
    before = shard.snapshot().arrays
    with pytest.raises(ValueError, match=r"lease 0 came back with chains \[.*went out"):
        shard.checkin(move(lease, chain_id=lease.chain_id[mixed_up]))
    for name, array in shard.snapshot().arrays.items():
        assert np.array_equal(array, before[name]), name


def test_no_two_leases_and_no_two_shards_share_noise():
    seeds, starts = [], []
    for index in range(3):
        shard = make_shard(index=index, config={"reinit_prob": 1.0})
        for i in range(6):
            lease = shard.checkout(3 * i + index, 4)  # ids are unique over the run
            seeds.append(lease.seed)
            starts += [tuple(row) for row in lease.position.tolist()]
        starts += [tuple(row) for row in shard.snapshot().arrays["position"].tolist()]
    assert len(set(seeds)) == len(seeds)
    assert len(set(starts)) == len(starts)


def test_slots_are_drawn_evenly():
    shard = make_shard(20)
    counts = np.zeros(20)
    num = 2000
    for i in range(num):
        lease = shard.checkout(i, 4)
        counts[lease.slots] += 1
        shard.cancel(i)
    expected, variance = num * 0.2, num * 0.2 * 0.8
    # Pearson's chi-square of 20 slots; the counts sum to a constant, which leaves 19 degrees.
    statistic = ((counts - expected) ** 2 / (variance * 20 / 19)).sum()
    assert abs(statistic - 19) < 4 * (2 * 19) ** 0.5


class Numbers:
    """Data that counts 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.at = 0

    def next_batch(self, num: int) -> Batch:
        x = torch.arange(self.at, self.at + num).float()[:, None].expand(num, 3)
        self.at += num
        return Batch(x.clone())

    def state(self) -> dict:
        return {"at": self.at}

    def load_state(self, state: dict) -> None:
        self.at = state["at"]


def data_shard(noise: float = 0.0, spec: EventSpec | None = None) -> Shard:
    config = BufferConfig(capacity=8, init="data", reinit_prob=1.0, data_noise_std=noise)
    spec = spec or EventSpec((3,), "real")
    return Shard(config, spec, index=0, capacity=8, max_lease=4, seed=0, data=Numbers())


def test_data_chains_start_at_consecutive_data_and_resume_at_the_cursor():
    shard = data_shard()
    assert shard.snapshot().arrays["position"][:, 0].tolist() == list(range(8))
    shard.checkin(move(shard.checkout(0, 4)))
    shard.take(0)
    saved = shard.snapshot()
    other = data_shard()
    other.restore(saved.arrays, Origin(saved.meta.data))
    assert other.checkout(1, 4).position[:, 0].tolist() == [12, 13, 14, 15]
    assert shard.checkout(1, 4).position[:, 0].tolist() == [12, 13, 14, 15]


def test_data_noise_is_added_to_real_events_and_never_to_discrete_ones():
    noisy = data_shard(0.1).snapshot().arrays["position"]
    assert 0 < np.abs(noisy - np.arange(8)[:, None]).max() < 1
    binary = data_shard(0.1, EventSpec((3,), "binary")).snapshot().arrays["position"]
    assert (binary == np.arange(8)[:, None]).all()


def test_data_start_without_data_is_refused():
    with pytest.raises(ValueError, match=r"buffer\.init"):
        make_shard(config={"init": "data"})
