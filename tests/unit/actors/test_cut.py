"""Chains come back from a checkpoint to any number of shards, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ebm_dist import checkpoint
from ebm_dist.actors.cut import Progress, read_manifest, restore_shards, write_cut
from ebm_dist.actors.handles import InlineBackend
from ebm_dist.assembly import shard_capacities
from ebm_dist.buffer.policy import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.errors import RunFailed
from ebm_dist.types import EventSpec, MovedChains

SPEC = EventSpec((2, 3), "real")
FIELDS = ("position", "energy", "version", "age", "log_weight", "chain_id")


def make_shards(num: int, capacity: int, seed: int = 0):
    backend = InlineBackend()
    capacities = shard_capacities(capacity, num)
    handles = [
        backend.spawn(
            Shard,
            {
                "config": BufferConfig(capacity=capacity, reinit_prob=0.5),
                "spec": SPEC,
                "index": i,
                "capacity": capacities[i],
                "max_lease": 3,
                "seed": seed,
            },
            name=f"shard-{i}",
        )
        for i in range(num)
    ]
    return handles, capacities


def work(shards, *, first_lease: int, rounds: int = 12) -> None:
    for lease_id in range(first_lease, first_lease + rounds):
        shard = shards[lease_id % len(shards)].part
        lease = shard.checkout(lease_id, 3)
        position = lease.position + np.float32(1 / 3)
        shard.checkin(
            MovedChains(
                lease_id=lease_id,
                shard=lease.shard,
                shard_epoch=lease.shard_epoch,
                slots=lease.slots,
                generations=lease.generations,
                position=position,
                energy=position.sum((1, 2)),
                log_weight=lease.log_weight + np.float32(0.1),
                version=lease_id,
                num_steps=2,
            )
        )
        shard.take(lease_id)


def save(run_dir: Path, shards) -> None:
    ranks = [{"learner": {"w": np.zeros(1)}, "ema": None, "data": {"at": 5}}]
    snapshots = [shard.part.snapshot() for shard in shards]
    progress = Progress(step=7, version=9, epoch=2, next_lease=12)
    write_cut(run_dir, progress, ranks, snapshots, {"name": "x"}, keep=2)


def chains(shards) -> dict[int, tuple]:
    """Identity -> everything else about the chain, as bytes."""
    out = {}
    for shard in shards:
        arrays = shard.part.snapshot()["arrays"]
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
    for ref in restore_shards(after, found, capacities):
        assert ref.error is None
    assert chains(after) == chains(before)
    known = set(chains(before))
    work(after, first_lease=12, rounds=20)
    assert sum(shard.part.counts()["free"] for shard in after) == 35
    assert len(chains(after)) == 35
    new = set(chains(after)) - known
    assert new, "half of the chains restart, so some are new"


def test_new_identities_after_a_restore_are_those_of_no_chain_before(tmp_path: Path) -> None:
    before, _ = make_shards(3, 36)
    ever = set(chains(before))
    for lease_id in range(30):
        work(before, first_lease=lease_id, rounds=1)
        ever |= set(chains(before))
    saved = set(chains(before))
    assert len(ever) > 60, "chains have come and gone"
    save(tmp_path, before)
    after, capacities = make_shards(2, 36)
    restore_shards(after, checkpoint.latest(tmp_path), capacities)
    for lease_id in range(30, 60):
        work(after, first_lease=lease_id, rounds=1)
        assert not (set(chains(after)) - saved) & ever


def test_room_for_more_chains_is_filled_with_fresh_ones(tmp_path: Path) -> None:
    before, _ = make_shards(2, 20)
    work(before, first_lease=0)
    save(tmp_path, before)
    after, capacities = make_shards(3, 30)
    restore_shards(after, checkpoint.latest(tmp_path), capacities)
    assert len(chains(after)) == 30
    assert chains(before).items() <= chains(after).items()


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
    kept = [shards[i].part.snapshot()["arrays"]["position"] for i in (0, 2)]
    shards[1] = make_shards(3, 36, seed=4)[0][1]
    (ref,) = restore_shards(shards, checkpoint.latest(tmp_path), capacities, only=1)
    assert ref.error is None
    assert chains([shards[1]]).items() <= saved.items()
    for old, i in zip(kept, (0, 2)):
        assert np.array_equal(old, shards[i].part.snapshot()["arrays"]["position"])


def test_the_manifest_names_the_checkpoint_and_a_broken_one_costs_nothing(tmp_path: Path) -> None:
    shards, _ = make_shards(1, 6)
    save(tmp_path, shards)
    manifest = read_manifest(tmp_path)
    assert (manifest["latest"], manifest["version"], manifest["epoch"]) == ("step_00000007", 9, 2)
    (tmp_path / "manifest.json").write_text("{")
    assert read_manifest(tmp_path) == {}
    assert checkpoint.latest(tmp_path).step == 7
