"""A shard's part of a checkpoint: whole, or what changed since a whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shards import Numbered, Paired, Roaming, carrying, make_shard, move

from ebm_dist.buffer.answers import Origin


def work(shard, lease_ids, num: int = 2, *, roams: bool = False) -> None:
    for lease_id in lease_ids:
        lease = shard.checkout(lease_id, num)
        assert shard.checkin(move(lease, version=lease_id, roams=roams)).accepted
        shard.take(lease_id)


def merged(whole: dict, part: dict) -> dict:
    out = {key: value.copy() for key, value in whole.items()}
    rows = part["row"]
    for key, value in part.items():
        if key != "row":
            out[key][rows] = value
    return out


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert np.array_equal(a[key], b[key]), key


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_a_difference_on_top_of_its_base_is_the_snapshot(rounds: int) -> None:
    shard = make_shard(capacity=24)
    work(shard, range(6))
    meta, whole = shard.cut(1)
    assert meta.since is None
    work(shard, range(6, 6 + rounds))
    meta, part = shard.cut(2, since=1)
    assert meta.since == 1
    assert len(part["row"]) <= 2 * rounds
    assert_same(merged(whole, part), shard.snapshot().arrays)


@pytest.mark.parametrize("kind", [Numbered, Paired, Roaming])
def test_a_difference_holds_the_context_of_every_chain_in_it_and_a_restore_goes_on_from_there(
    kind: type[Numbered],
) -> None:
    half = {"reinit_prob": 0.5}
    shard = carrying(kind, config=half)
    work(shard, range(6), roams=kind.roams)
    _, whole = shard.cut(1)
    work(shard, range(6, 11), roams=kind.roams)
    meta, part = shard.cut(2, since=1)
    assert meta.since == 1
    for field in kind.fields:  # there is something to lose
        before = whole[f"context/{field.name}"][part["row"]]
        assert not np.array_equal(part[f"context/{field.name}"], before), field.name
    found = merged(whole, part)
    assert_same(found, shard.snapshot().arrays)
    kind.check_arrays(found)
    restored = carrying(kind, config=half)
    restored.restore(found, Origin(meta.data))
    assert_same(restored.snapshot().arrays, found)
    for one in (shard, restored):
        work(one, range(11, 20), roams=kind.roams)
    kind.check_arrays(restored.snapshot().arrays)
    # Chains that restart do so at the data after that of the cut.
    assert_same(restored.snapshot().arrays, shard.snapshot().arrays)


def test_differences_are_to_the_last_whole_cut_however_many_lie_between() -> None:
    shard = make_shard(capacity=24)
    _, whole = shard.cut(1)
    for number in range(2, 6):
        work(shard, [number])
        meta, part = shard.cut(number, since=1)
        assert meta.since == 1
    assert_same(merged(whole, part), shard.snapshot().arrays)


def test_where_half_of_the_slots_changed_the_cut_is_whole_and_the_next_refers_to_it() -> None:
    shard = make_shard(capacity=8)
    shard.cut(1)
    work(shard, range(12))
    meta, whole = shard.cut(2, since=1)
    assert meta.since is None
    assert "row" not in whole
    work(shard, [12])
    meta, part = shard.cut(3, since=2)
    assert meta.since == 2
    assert_same(merged(whole, part), shard.snapshot().arrays)


def test_after_a_whole_cut_that_was_not_written_the_one_before_still_serves() -> None:
    shard = make_shard(capacity=8)
    _, whole = shard.cut(1)
    work(shard, range(12))
    assert shard.cut(2, since=1)[0].since is None
    meta, arrays = shard.cut(3, since=1)  # the disk refused cut 2
    current = shard.snapshot().arrays
    assert_same(arrays if meta.since is None else merged(whole, arrays), current)


def test_chains_on_lease_are_in_a_cut_as_they_were_and_in_the_next_as_committed() -> None:
    shard = make_shard(capacity=24)
    _, whole = shard.cut(1)
    lease = shard.checkout(5, 3)
    _, part = shard.cut(2, since=1)
    assert len(part["row"]) == 0
    shard.checkin(move(lease))
    _, part = shard.cut(3, since=1)
    assert sorted(part["row"]) == sorted(lease.slots)
    assert_same(merged(whole, part), shard.snapshot().arrays)


def test_a_restored_shard_and_a_successor_remember_no_cut(tmp_path: Path) -> None:
    shard = make_shard(directory=str(tmp_path / "s"))
    _, whole = shard.cut(1)
    successor = make_shard(directory=str(tmp_path / "s"))
    assert successor.attached
    # Killed between a commit and the move of its generation, it could not know what changed.
    assert successor.cut(2, since=1)[0].since is None
    work(successor, range(3))
    successor.restore(whole, Origin(next_chain=24))
    assert successor.cut(3, since=2)[0].since is None
