"""Leases by rows: the same chains as by value, and no late writer in anybody else's rows."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from shards import Clock, chain_ids, chains_of, make_shard, move, total

from ebm_dist.buffer.answers import Origin
from ebm_dist.buffer.rows import open_rows
from ebm_dist.buffer.shard import Shard
from ebm_dist.core.types import Lease

# A worker in a process of its own, which stops half-way through its writing.
WRITER = """
import os, pickle, signal, sys
import numpy as np
from ebm_dist.buffer.rows import locked, open_rows
lease = pickle.load(open(sys.argv[1], "rb"))
grant, rows = lease.grant, open_rows(lease.grant)
with locked(rows.directory, grant.index):
    assert rows.tokens[grant.index] == grant.token
    rows.position[grant.target[:2]] = 777.0
    print("half-way", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    rows.position[grant.target[2:]] = 777.0
    rows.chain_id[grant.target] = lease.chain_id
"""


def mapped_shard(path: Path, **options) -> Shard:
    return make_shard(directory=str(path / "shard"), **{"num_grants": 2, **options})


def write_half(lease: Lease, path: Path) -> subprocess.Popen:
    (path / "lease").write_bytes(pickle.dumps(lease))
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path / "lease"], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"half-way\n"
    while Path(f"/proc/{writer.pid}/stat").read_text().split(") ")[1][0] != "T":
        time.sleep(0.005)
    return writer


def rounds(shard: Shard, first: int, num: int) -> None:
    for lease_id in range(first, first + num):
        lease = shard.checkout(lease_id, 4, by_rows=True)
        assert lease is not None
        assert shard.checkin(move(lease, version=lease_id)).accepted
        shard.take(lease_id)


@pytest.mark.parametrize("reinit_prob", [0.0, 0.5, 1.0])
def test_a_lease_by_rows_moves_the_same_chains_to_the_same_places(reinit_prob, tmp_path) -> None:
    config = {"reinit_prob": reinit_prob}
    by_value, by_rows = make_shard(config=config), mapped_shard(tmp_path, config=config)
    for lease_id in range(20):
        a = by_value.checkout(lease_id, 4)
        b = by_rows.checkout(lease_id, 4, by_rows=True)
        assert b.grant is not None
        assert b.position is None
        assert np.array_equal(chains_of(b), a.position)
        for name in ("slots", "chain_id", "log_weight", "version", "energy", "seed"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        for shard, lease in ((by_value, a), (by_rows, b)):
            assert shard.checkin(move(lease, version=lease_id)).accepted
        taken = [shard.take(lease_id)[1] for shard in (by_value, by_rows)]
        for x, y in zip(*(astuple(negatives) for negatives in taken)):
            assert np.array_equal(x, y)
    saved = by_rows.snapshot().arrays
    for name, array in by_value.snapshot().arrays.items():
        assert np.array_equal(array, saved[name]), name


def test_what_travels_of_a_lease_by_rows_does_not_grow_with_its_chains(tmp_path: Path) -> None:
    from ebm_dist.buffer.config import BufferConfig
    from ebm_dist.core.types import EventSpec

    sizes = []
    for event in ((2,), (3, 32, 32)):
        shard = Shard(
            BufferConfig(capacity=64, reinit_prob=0.0),
            EventSpec(event, "real"),
            index=0,
            capacity=64,
            max_lease=16,
            seed=0,
            directory=str(tmp_path / str(len(event))),
            num_grants=1,
        )
        sizes.append(len(pickle.dumps(shard.checkout(0, 16, by_rows=True))))
    assert abs(sizes[1] - sizes[0]) < 32


def test_leases_beyond_the_rows_there_are_go_by_value(tmp_path: Path) -> None:
    shard = mapped_shard(tmp_path)
    leases = [shard.checkout(i, 4, by_rows=True) for i in range(4)]
    assert [lease.grant is None for lease in leases] == [False, False, True, True]
    for lease in leases:
        assert shard.checkin(move(lease)).accepted
    assert make_shard().checkout(0, 4, by_rows=True).grant is None  # nothing is mapped


def test_more_grants_than_locks_that_may_stay_open_all_come_back(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("ebm_dist.buffer.grants._MOST_OPEN", 2)
    shard = mapped_shard(tmp_path, num_grants=5, capacity=32)
    for first in (0, 5):
        leases = [shard.checkout(first + n, 4, by_rows=True) for n in range(5)]
        assert all(lease.grant is not None for lease in leases)
        for lease in leases:
            assert shard.checkin(move(lease)).accepted
            shard.take(lease.lease_id)
    files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert 0 < sum(file.endswith(".lock") and str(tmp_path) in file for file in files) <= 2


def test_a_late_worker_cannot_write_into_rows_that_another_lease_has_now(tmp_path: Path) -> None:
    clock = Clock()
    shard = mapped_shard(tmp_path, clock=clock, num_grants=1)
    late = shard.checkout(0, 4, by_rows=True)
    clock.now = 11.0
    current = shard.checkout(1, 4, by_rows=True)
    assert set(current.grant.target.tolist()) == set(late.grant.target.tolist())
    moved = move(current)
    late_reply = shard.checkin(move(late, position=np.full((4, 3), 777.0, np.float32)))
    assert not late_reply.accepted
    assert late_reply.counts.late_checkins == 1
    assert shard.checkin(moved).accepted
    assert (shard.snapshot().arrays["position"] != 777.0).all()
    # Nor into rows that are a committed chain's.
    assert not open_rows(current.grant).write(
        current.grant, np.full((4, 3), 777.0, np.float32), current.chain_id
    )
    assert (shard.snapshot().arrays["position"] != 777.0).all()


def test_a_worker_whose_round_is_redone_can_no_longer_write(tmp_path: Path) -> None:
    shard = mapped_shard(tmp_path, config={"reinit_prob": 0.5})
    first = shard.checkout(0, 4, by_rows=True)
    start = chains_of(first)
    second = shard.checkout(0, 4, by_rows=True)
    assert np.array_equal(chains_of(second), start)
    assert chains_of(first) is None
    assert not shard.checkin(move(first)).accepted
    assert shard.checkin(move(second)).accepted


def num_quarantined(shard: Shard) -> int:
    """Rows that cannot be used until a suspended writer continues or dies."""
    return sum(len(item.rows) for item in shard._grants._limbo)


@pytest.mark.parametrize("end", ["goes on", "killed"])
def test_rows_of_a_worker_stopped_while_writing_are_out_of_use_until_it_ends(end, tmp_path) -> None:
    clock = Clock()
    shard = mapped_shard(tmp_path, clock=clock)
    lease = shard.checkout(0, 4, by_rows=True)
    writer = write_half(lease, tmp_path)
    clock.now = 11.0
    rounds(shard, 1, 20)
    before = shard.snapshot().arrays
    assert (before["position"] != 777.0).all()
    assert num_quarantined(shard) == 4
    assert not set(shard._slots.row_of_slot.tolist()) & set(lease.grant.target.tolist())
    os.kill(writer.pid, signal.SIGCONT if end == "goes on" else signal.SIGKILL)
    writer.wait()
    for name, array in shard.snapshot().arrays.items():
        assert np.array_equal(array, before[name]), name
    assert not shard.checkin(move(lease)).accepted
    rounds(shard, 21, 20)
    assert num_quarantined(shard) == 0
    assert (shard.snapshot().arrays["position"] != 777.0).all()
    # Both grants are to be had again.
    assert all(shard.checkout(i, 4, by_rows=True).grant is not None for i in (41, 42))


def test_a_successor_leaves_alone_what_a_worker_of_its_predecessor_is_writing(tmp_path) -> None:
    first = mapped_shard(tmp_path)
    lease = first.checkout(0, 4, by_rows=True)
    idle = first.checkout(1, 4, by_rows=True)
    writer = write_half(lease, tmp_path)
    second = mapped_shard(tmp_path)
    assert second.attached
    assert num_quarantined(second) == 4
    rounds(second, 2, 20)
    assert not open_rows(idle.grant).write(idle.grant, np.zeros((4, 3)), idle.chain_id)
    os.kill(writer.pid, signal.SIGCONT)
    writer.wait()
    assert (second.snapshot().arrays["position"] != 777.0).all()
    assert not second.checkin(move(lease)).accepted
    rounds(second, 22, 20)
    assert num_quarantined(second) == 0
    assert chain_ids(second) == list(range(24))
    assert total(second) == 24


def test_rows_of_a_shard_that_began_anew_are_not_taken_for_the_old_ones(tmp_path: Path) -> None:
    first = mapped_shard(tmp_path)
    lease = pickle.loads(pickle.dumps(first.checkout(0, 4, by_rows=True)))
    (tmp_path / "shard" / "shape.json").unlink()
    second = mapped_shard(tmp_path)
    assert not second.attached
    before = second.snapshot().arrays["position"]
    # He writes into the files he had, which nobody else has any more.
    moved = move(lease, position=np.full((4, 3), 777.0, np.float32))
    assert np.array_equal(second.snapshot().arrays["position"], before)
    assert not second.checkin(moved).accepted


def test_a_restore_voids_the_leases_by_rows(tmp_path: Path) -> None:
    shard = mapped_shard(tmp_path)
    saved = shard.snapshot()
    lease = shard.checkout(0, 4, by_rows=True)
    shard.restore(saved.arrays, Origin(saved.meta.data))
    assert not shard.checkin(move(lease)).accepted
    assert np.array_equal(shard.snapshot().arrays["position"], saved.arrays["position"])


def test_chains_in_the_rows_of_others_are_refused_by_name(tmp_path: Path) -> None:
    shard = mapped_shard(tmp_path)
    lease = shard.checkout(0, 4, by_rows=True)
    moved = move(lease)
    open_rows(lease.grant).chain_id[lease.grant.target[:2]] = lease.chain_id[[1, 0]]
    with pytest.raises(ValueError, match="lie in the rows of"):
        shard.checkin(moved)
