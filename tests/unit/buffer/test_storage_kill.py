"""Memory-mapped chains after `kill -9` in the middle of commits: each whole, none mixed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from shards import chain_ids, make_shard, move, total

from ebm_dist.buffer.answers import Origin
from ebm_dist.buffer.rows import ROW

CAPACITY, LEASE = 64, 16

# Every number of a chain repeats the version, so that a mixture of two commits shows; its clock
# repeats the age, and what it carries of its datum the number of that. Position and pair are wide:
# their copies are where a kill most often lands. Every other lease goes by rows.
CHILD = f"""
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
import shards
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import ContextField, EventSpec
class Data(shards.Numbered):
    width = 4096
context = dict(shards.Numbered.context, level="stratified")
fields = (
    *shards.Numbered.fields[:3],
    ContextField("pair", (4096,), "float32"),
    ContextField("level", size=5),
)
shard = Shard(
    BufferConfig(capacity={CAPACITY}, reinit_prob=0.3, context=context),
    EventSpec((4096,), "real"), index=0, capacity={CAPACITY}, max_lease={LEASE}, seed=0,
    directory=sys.argv[1], num_grants=1, data=Data(), fields=fields,
)
first = lease_id = int(sys.argv[3])
while True:
    lease = shard.checkout(lease_id, {LEASE}, by_rows=lease_id % 2 == 0)
    assert (lease.grant is None) == (lease_id % 2 == 1)
    position = np.full(({LEASE}, 4096), float(lease_id), np.float32)
    energy = np.full({LEASE}, float(lease_id), np.float32)
    level = np.full({LEASE}, lease_id % 5)
    moved = shards.move(lease, version=lease_id, position=position, energy=energy, level=level)
    assert shard.checkin(moved).accepted
    shard.take(lease_id)
    lease_id += 1
    if lease_id == first + 3:
        print("ready", flush=True)
"""


def test_a_killed_process_leaves_every_chain_whole(tmp_path: Path) -> None:
    directory = tmp_path / "shard"
    rng = np.random.default_rng(0)
    newest, next_lease, epochs = 0, 0, []
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, directory, Path(__file__).parent, str(next_lease)],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(float(rng.uniform(0.02, 0.15)))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        arrays = _read(directory)
        rows = arrays["row_of_slot"]
        assert len(set(rows.tolist())) == CAPACITY
        assert arrays["chain_id"][rows].tolist() == list(range(CAPACITY))
        for row in rows:
            version = arrays["version"][row]
            datum = arrays["pair"][row, 0]
            assert (arrays["pair"][row] == datum).all()
            assert arrays["label"][row] == datum % 7
            assert arrays["condition"][row].tolist() == [datum + 0.25, datum + 0.5]
            assert arrays["clock"][row] == 3 * arrays["age"][row]
            if version < 0:
                continue
            assert (arrays["position"][row] == float(version)).all()
            assert arrays["energy"][row] == float(version)
            assert arrays["level"][row] == version % 5
        assert arrays["version"][rows].max() > newest, "the child committed nothing"
        newest = int(arrays["version"][rows].max())
        epochs.append(int(arrays["epoch"][0]))
        next_lease = newest + 2
    assert epochs == list(range(6))


def _read(directory: Path) -> dict[str, np.ndarray]:
    rows = np.fromfile(directory / "rows.bin", ROW)
    slots = np.fromfile(directory / "slots.bin", [("row_of_slot", "i8"), ("generation", "i8")])
    arrays = {
        name: np.fromfile(directory / f"{name}.bin", np.float32).reshape(len(rows), -1)
        for name in ("position", "condition", "pair")
    }
    for name in ("label", "level", "clock", "epoch"):
        arrays[name] = np.fromfile(directory / f"{name}.bin", np.int64)
    arrays |= {name: rows[name] for name in ("chain_id", "version", "energy", "age")}
    return {**arrays, "row_of_slot": slots["row_of_slot"]}


def test_a_successor_takes_the_chains_over_and_refuses_the_leases_of_the_dead(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "shard")
    first = make_shard(directory=path)
    first.checkin(move(first.checkout(0, 4), version=2))  # ready, never taken
    lost = first.checkout(1, 4)
    saved, ids = first.snapshot().arrays, chain_ids(first)
    second = make_shard(directory=path)
    assert second.attached
    assert second.counts().free == total(second) == 24
    for name, array in second.snapshot().arrays.items():
        assert np.array_equal(array, saved[name]), name
    assert not second.checkin(move(lost)).accepted
    assert second.counts().late_checkins == 1
    second = make_shard(directory=path, config={"reinit_prob": 1.0})
    second.checkin(move(second.checkout(2, 4)))
    assert chain_ids(second) == ids


@pytest.mark.parametrize("damage", ["unfinished", "other capacity", "nothing there"])
def test_what_is_not_whole_is_filled_anew_under_a_later_epoch(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    first = make_shard(directory=str(path))
    lease = first.checkout(0, 4)
    if damage == "unfinished":
        (path / "shape.json").unlink()
    if damage == "nothing there":
        (path / "shape.json").unlink()
        (path / "position.bin").unlink()
    second = make_shard(32 if damage == "other capacity" else 24, directory=str(path))
    assert not second.attached
    assert second.epoch == 1
    assert not second.checkin(move(lease)).accepted
    assert chain_ids(second) == list(range(second.capacity))


def test_a_shard_killed_while_it_is_restored_does_not_pass_for_whole(tmp_path: Path) -> None:
    saved = make_shard(seed=9).snapshot()
    path = str(tmp_path / "shard")
    shard = make_shard(directory=path)
    broken = saved.arrays | {"chain_id": saved.arrays["chain_id"][:5]}
    with pytest.raises(ValueError, match="shape"):  # half-way, like a kill there
        shard.restore(broken, Origin(saved.meta.data))
    assert not make_shard(directory=path).attached
    shard = make_shard(directory=path)
    shard.restore(saved.arrays, Origin(saved.meta.data))
    successor = make_shard(directory=path)
    assert successor.attached
    assert np.array_equal(successor.snapshot().arrays["position"], saved.arrays["position"])
