"""Chains come back from a checkpoint to any number of shards, to the bit."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ebm_dist.buffer.answers import Origin
from ebm_dist.buffer.config import BufferConfig, shard_capacities
from ebm_dist.buffer.shard import Shard
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.cut import Progress, deal_chains, read_manifest, write_cut
from ebm_dist.cluster.inline import InlineBackend
from ebm_dist.core.errors import RunFailed
from ebm_dist.core.types import EventSpec, Lease, MovedChains, RankState

SPEC = EventSpec((2, 3), "real")
FIELDS = ("position", "energy", "version", "age", "log_weight", "chain_id")


def make_shards(num: int, capacity: int, seed: int = 0):
    backend = InlineBackend()
    capacities = shard_capacities(capacity, num)
    handles = [
        backend.spawn(
            partial(
                Shard,
                BufferConfig(capacity=capacity, num_shards=num, reinit_prob=0.5),
                SPEC,
                index=i,
                capacity=capacities[i],
                max_lease=3,
                seed=seed,
            ),
            f"shard-{i}",
        )
        for i in range(num)
    ]
    return handles, capacities


def work(shards, *, first_lease: int, rounds: int = 12) -> None:
    for lease_id in range(first_lease, first_lease + rounds):
        shard = shards[lease_id % len(shards)].part
        lease = shard.checkout(lease_id, 3)
        shard.checkin(move(lease, lease_id))
        shard.take(lease_id)


def move(lease: Lease, version: int) -> MovedChains:
    position = lease.position + np.float32(1 / 3)
    return MovedChains.of(
        lease,
        position=position,
        energy=position.sum((1, 2)),
        log_weight=lease.log_weight + np.float32(0.1),
        version=version,
        num_steps=2,
    )


def restore_shards(shards, found, capacities, *, only: int | None = None) -> None:
    for index, part in enumerate(deal_chains(found, capacities) or []):
        if only in (None, index):
            shards[index].part.restore(part.arrays, Origin(part.data, part.next_chain))


def identities(shards) -> list[int]:
    return sorted(np.concatenate([shard.part.identities() for shard in shards]).tolist())


def save(run_dir: Path, shards, snapshots=None) -> None:
    ranks = [RankState(learner={"w": np.zeros(1)}, ema=None, data={"at": 5})]
    snapshots = snapshots or [shard.part.snapshot() for shard in shards]
    progress = Progress(step=7, version=9, epoch=2, next_lease=12)
    write_cut(run_dir, progress, ranks, snapshots, {"name": "x"}, keep=2)


def chains(shards) -> dict[int, tuple]:
    """Identity -> everything else about the chain, as bytes."""
    out = {}
    for shard in shards:
        arrays = shard.part.snapshot().arrays
        for i, identity in enumerate(arrays["chain_id"].tolist()):
            assert identity not in out, "an identity twice"
            out[identity] = tuple(arrays[name][i].tobytes() for name in FIELDS)
    return out


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_chains_are_conserved_to_the_bit_at_any_number_of_shards(
    num_shards: int, tmp_path: Path
) -> None:
    before, _ = make_shards(3, 35)
    work(before, first_lease=0)
    # A lease that is out at the cut counts with the chains it had.
    before[1].part.checkout(99, 3)
    save(tmp_path, before)
    found = checkpoint.latest(tmp_path)
    after, capacities = make_shards(num_shards, 35, seed=1)
    restore_shards(after, found, capacities)
    assert chains(after) == chains(before)
    work(after, first_lease=12, rounds=20)
    assert sum(shard.part.counts().free for shard in after) == 35
    assert identities(after) == list(range(35))


def test_a_checkpoint_from_before_chains_had_identities_numbers_them(tmp_path: Path) -> None:
    before, _ = make_shards(3, 35)
    work(before, first_lease=0)
    snapshots = [shard.part.snapshot() for shard in before]
    for snapshot in snapshots:
        del snapshot.arrays["chain_id"]
    save(tmp_path, before, snapshots)
    after, capacities = make_shards(2, 36, seed=1)
    restore_shards(after, checkpoint.latest(tmp_path), capacities)
    assert identities(after) == list(range(36))


class Fleet(RuleBasedStateMachine):
    """Shards at work, with leases lost and late, dealt out anew over other numbers of shards."""

    def __init__(self) -> None:
        super().__init__()
        self.capacity, self.num, self.next_lease = 10, 2, 0
        self.shards, self.capacities = make_shards(self.num, self.capacity)
        self.out: list[tuple[int, Lease]] = []

    @rule(data=st.data())
    def checkout(self, data) -> None:
        index = data.draw(st.integers(0, self.num - 1))
        lease = self.shards[index].part.checkout(self.next_lease, 2)
        if lease is not None:
            self.out.append((index, lease))
        self.next_lease += 1

    @precondition(lambda self: self.out)
    @rule(data=st.data(), late=st.booleans(), take=st.booleans())
    def checkin(self, data, late, take) -> None:
        index, lease = data.draw(st.sampled_from(self.out))
        if index >= self.num:
            return
        shard = self.shards[index].part
        if late:
            shard.cancel(lease.lease_id)
        shard.checkin(move(lease, 1))
        if take:
            shard.take(lease.lease_id)

    @rule(num=st.integers(1, 4), more=st.integers(0, 2))
    def resumed(self, num, more) -> None:
        snapshots = [shard.part.snapshot() for shard in self.shards]
        found = SimpleNamespace(
            names=[f"shard_{i:04d}" for i in range(self.num)],
            arrays=lambda name: snapshots[int(name[-4:])].arrays,
            meta={"shards": [asdict(snapshot.meta) for snapshot in snapshots]},
        )
        self.num, self.capacity = num, self.capacity + more
        self.shards, self.capacities = make_shards(num, self.capacity, seed=1)
        restore_shards(self.shards, found, self.capacities)

    @invariant()
    def the_identities_are_those_of_the_start(self) -> None:
        if hasattr(self, "shards"):
            assert identities(self.shards) == list(range(self.capacity))


Fleet.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
)
TestFleet = Fleet.TestCase


def test_room_for_more_chains_is_filled_with_fresh_ones(tmp_path: Path) -> None:
    before, _ = make_shards(2, 20)
    work(before, first_lease=0)
    save(tmp_path, before)
    after, capacities = make_shards(3, 30)
    restore_shards(after, checkpoint.latest(tmp_path), capacities)
    assert identities(after) == list(range(30))
    assert chains(before).items() <= chains(after).items()


def test_a_shard_may_be_dealt_no_chain_of_the_checkpoint(tmp_path: Path) -> None:
    before, _ = make_shards(2, 20)
    work(before, first_lease=0)
    save(tmp_path, before)
    after, capacities = make_shards(4, 80)
    restore_shards(after, checkpoint.latest(tmp_path), capacities)
    assert identities(after) == list(range(80))
    assert chains(before).items() <= chains(after).items()


def test_a_manifest_that_a_full_disk_refuses_does_not_cost_the_checkpoint(
    tmp_path: Path, monkeypatch
) -> None:
    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    shards, _ = make_shards(1, 6)
    save(tmp_path, shards)
    assert checkpoint.latest(tmp_path).step == 7


def test_too_few_slots_are_refused_with_the_number_needed(tmp_path: Path) -> None:
    before, _ = make_shards(2, 20)
    save(tmp_path, before)
    after, capacities = make_shards(2, 18)
    with pytest.raises(RunFailed, match=r"20 chains.*18"):
        restore_shards(after, checkpoint.latest(tmp_path), capacities)


def test_one_lost_shard_gets_its_part_alone(tmp_path: Path) -> None:
    shards, capacities = make_shards(3, 36)
    work(shards, first_lease=0)
    save(tmp_path, shards)
    saved = chains(shards)
    work(shards, first_lease=12)
    kept = [shards[i].part.snapshot().arrays["position"] for i in (0, 2)]
    shards[1] = make_shards(3, 36, seed=4)[0][1]
    restore_shards(shards, checkpoint.latest(tmp_path), capacities, only=1)
    assert chains([shards[1]]).items() <= saved.items()
    for old, i in zip(kept, (0, 2)):
        assert np.array_equal(old, shards[i].part.snapshot().arrays["position"])


def test_the_manifest_names_the_checkpoint_and_a_broken_one_costs_nothing(tmp_path: Path) -> None:
    shards, _ = make_shards(1, 6)
    save(tmp_path, shards)
    manifest = read_manifest(tmp_path)
    assert (manifest["latest"], manifest["version"], manifest["epoch"]) == ("step_00000007", 9, 2)
    (tmp_path / "manifest.json").write_text("{")
    assert read_manifest(tmp_path) == {}
    assert checkpoint.latest(tmp_path).step == 7
