"""Chains out of a buffer and back: a shard against the peers' buffers and against a plain copy.

    python benchmarks/buffers.py [--slots 100000] [--repetitions 25] [--quick] [--out FILE.json]

Runs where torchrl, torchebm and ebmkit are installed; those that are not are left out. Every arm
takes B chains at random places into memory that a sampler would work on, and puts as many back in
the same places (torchebm: where its rule puts them). All in one process, one thread, without Ray.

- `shard, by rows`: checkout, the worker's copy out of the mapped rows, its copy back behind the
  fence, checkin, release. Without replacement, with lease, identities, ages and energies.
- `shard, by value`: the same where the worker is on another machine, less the network.
- `and converted`: what the worker works on is float32, rounded at random on the way back.
- `cold copy`: B neighbouring rows out of a buffer of the same size and B back in, by `memcpy`.

Twice: with glibc as it is, which returns each freed block past 128 KiB to the kernel, so that the
next one is faulted in again page by page; and with freed memory kept, as in a worker of ours. The
peers allocate what they return; a shard copies into memory that is kept anyway.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved, keep, machine, medians, seconds, spread

from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.rows import open_rows
from ebm_dist.buffer.shard import Shard
from ebm_dist.cluster.process import tune_process
from ebm_dist.core.types import EventSpec, Lease, MovedChains

EVENT = (3, 32, 32)
SPEC = EventSpec(EVENT, "image")
Arm = Callable[[int], Callable[[], None]]
"""Maps a batch size to one round trip."""


def shard_arm(shard: Shard, codec: Codec, ids: Iterator[int], *, rows: bool, convert: bool) -> Arm:
    def of(batch: int) -> Callable[[], None]:
        landing = np.empty((batch, *EVENT), codec.dtype)
        energy, weight = np.zeros(batch, np.float32), np.zeros(batch, np.float32)
        generator = torch.Generator().manual_seed(0)

        def trip() -> None:
            lease = shard.checkout(next(ids), batch, rows)
            assert lease is not None
            assert (lease.grant is not None) == rows
            token = None
            if lease.grant is not None:
                mapped = open_rows(lease.grant)
                assert mapped is not None
                mapped.read(lease.grant, landing, lease.chain_id)
            else:
                assert lease.position is not None
                np.copyto(landing, lease.position)
            stored = landing
            if convert:
                x = codec.decode(torch.from_numpy(landing))
                stored = codec.encode(x, generator).numpy()
            if lease.grant is not None:
                mapped.write(lease.grant, stored, lease.chain_id)
                token = lease.grant.token
            moved = _moved(lease, None if rows else stored, energy, weight, token)
            assert shard.checkin(moved).accepted
            shard.release(lease.lease_id)

        return trip

    return of


def _moved(
    lease: Lease, position: Any, energy: np.ndarray, weight: np.ndarray, token: int | None
) -> MovedChains:
    return MovedChains.of(
        lease,
        position=position,
        energy=energy,
        log_weight=weight,
        version=1,
        num_steps=1,
        token=token,
    )


def cold_copy(num: int, dtype: np.dtype) -> Arm:
    data = np.ones((num, *EVENT), dtype)
    rng = np.random.default_rng(0)

    def of(batch: int) -> Callable[[], None]:
        out = np.empty((batch, *EVENT), dtype)

        def trip() -> None:
            a, b = rng.integers(num - batch, size=2)
            out[:] = data[a : a + batch]
            data[b : b + batch] = out

        return trip

    return of


def torchrl_arm(kind: str, num: int, dtype: torch.dtype, scratch: Path, convert: bool) -> Arm:
    from torchrl.data import (  # pyright: ignore[reportMissingImports]
        LazyMemmapStorage,
        LazyTensorStorage,
    )

    if kind == "memmap":
        # In the same memory as the shard: on a disk it would be slower.
        storage = LazyMemmapStorage(num, scratch_dir=str(scratch / f"torchrl_{dtype}"))
    else:
        storage = LazyTensorStorage(num)
    for start in range(0, num, 4096):
        stop = min(start + 4096, num)
        storage.set(range(start, stop), torch.ones((stop - start, *EVENT), dtype=dtype))

    def of(batch: int) -> Callable[[], None]:
        def trip() -> None:
            index = torch.randint(num, (batch,))
            x = storage.get(index)
            if convert:
                y = x.float().div_(127.5).sub_(1)
                x = y.add_(1).mul_(127.5).round_().to(torch.uint8)
            storage.set(index, x)

        return trip

    return of


def ebmkit_arm(num: int, dtype: torch.dtype) -> Arm:
    from ebm.buffer import ReplayBuffer  # pyright: ignore[reportMissingImports]

    buffer = ReplayBuffer(num, EVENT, 0.0, lambda shape: torch.ones(shape, dtype=dtype))

    def of(batch: int) -> Callable[[], None]:
        return lambda: buffer.push(buffer.sample(batch))

    return of


def torchebm_arm(num: int) -> Arm:
    from torchebm.losses import (  # pyright: ignore[reportMissingImports]
        ContrastiveDivergence,
    )

    logging.disable(logging.INFO)
    loss = ContrastiveDivergence(
        model=torch.nn.Identity(),
        sampler=torch.nn.Identity(),
        persistent=True,
        buffer_size=num,
        init_steps=0,
        new_sample_ratio=0.0,
    )

    def of(batch: int) -> Callable[[], None]:
        data = torch.zeros((batch, *EVENT))
        return lambda: loss.update_buffer(loss.get_start_points(data))

    return of


def arms(num: int, name: str, scratch: Path, max_batch: int) -> dict[str, Arm]:
    codec = Codec.of(name, SPEC)  # type: ignore[arg-type]
    config = BufferConfig(capacity=num, reinit_prob=0.0, storage=name)  # type: ignore[arg-type]
    shard = Shard(
        config,
        SPEC,
        index=0,
        capacity=num,
        max_lease=max_batch,
        seed=0,
        directory=str(scratch / f"shard_{name}"),
        num_grants=2,
    )
    ids = iter(range(1 << 62))
    dtype = torch.float32 if name == "float32" else torch.uint8
    found = {
        "shard, by rows": shard_arm(shard, codec, ids, rows=True, convert=False),
        "shard, by value": shard_arm(shard, codec, ids, rows=False, convert=False),
        "cold copy": cold_copy(num, codec.dtype),
    }
    if installed("torchrl"):
        found["torchrl LazyMemmapStorage"] = torchrl_arm("memmap", num, dtype, scratch, False)
        found["torchrl LazyTensorStorage"] = torchrl_arm("tensor", num, dtype, scratch, False)
    if installed("ebm"):
        found["ebmkit ReplayBuffer"] = ebmkit_arm(num, dtype)
    if name == "float32" and installed("torchebm"):
        found["torchebm replay buffer"] = torchebm_arm(num)
    if name == "uint8":
        found["shard, by rows, and converted"] = shard_arm(
            shard, codec, ids, rows=True, convert=True
        )
        if installed("torchrl"):
            found["torchrl LazyMemmapStorage, and converted to the nearest"] = torchrl_arm(
                "memmap", num, dtype, scratch / "converted", True
            )
    return found


def measure(made: dict[str, Arm], batch: int, name: str, kept: bool, num: int) -> list[dict]:
    number = max(2, 1024 // batch)
    trips = {arm: of(batch) for arm, of in made.items()}
    for trip in trips.values():
        trip()
    times = interleaved({arm: partial(seconds, trip, number) for arm, trip in trips.items()}, num)
    middle = medians(times)
    rows = []
    for arm, taken in middle.items():
        row = {
            "freed_memory": "kept" if kept else "returned",
            "stored": name,
            "batch": batch,
            "arm": arm,
            "microseconds": round(taken * 1e6, 1),
            "chains_per_s": round(batch / taken),
            "ours_is_faster": round(taken / middle["shard, by rows"], 2),
            "of_a_cold_copy": round(middle["cold copy"] / taken, 2),
            "spread": round(spread(times[arm]), 2),
        }
        rows.append(row)
        print(*row.values(), sep="  ", flush=True)
    return rows


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="10,000 slots, 5 repetitions")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.slots, options.repetitions = 10_000, 5
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    scratch = Path(tempfile.mkdtemp(prefix="buffers-", dir="/dev/shm"))
    print(machine())
    try:
        for kept, name in itertools.product((False, True), ("float32", "uint8")):
            if kept:
                tune_process(1)
            made = arms(options.slots, name, scratch, 1024)
            for batch in (64, 256, 1024):
                rows += measure(made, batch, name, kept, options.repetitions)
            del made
            shutil.rmtree(scratch)
            scratch.mkdir()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    keep("buffers", rows, options.out, event=list(EVENT), slots=options.slots)


if __name__ == "__main__":
    main()
