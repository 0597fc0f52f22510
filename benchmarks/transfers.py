"""What passes between actors on one node: chains by rows or by value, weights bound or copied.

    python benchmarks/transfers.py [--rounds 200] [--quick] [--out FILE.json]

Chains: a shard and two workers as real Ray actors; the workers move nothing, so that only the
transfer is left: checkout, read, write back, checkin, and the negatives of each round taken. Four
rounds are under way at a time, as in a run. Weights: an actor packs and returns them, as a learner
rank does at each update, and another makes them its module's parameters.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved, keep, machine, medians, spread
from torch import nn

from ebm_dist.actors.shard import open_shard
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.rows import open_rows
from ebm_dist.cluster.backend import ActorOptions
from ebm_dist.cluster.ray_backend import RayBackend
from ebm_dist.controller.clients import ShardClient
from ebm_dist.core.types import EventSpec, Lease, MovedChains
from ebm_dist.core.weights import FlatLayout

EVENT = (3, 32, 32)
SIZES = {"1.6M": [1024, 1024, 512], "25M": [2048] * 7}


class Mover:
    """A worker less the sampling."""

    def __init__(self, batch: int) -> None:
        self._landing = np.empty((batch, *EVENT), np.float32)
        self._zeros = np.zeros(batch, np.float32)

    def run_round(self, lease: Lease) -> MovedChains:
        position, token = None, None
        if lease.grant is not None:
            rows = open_rows(lease.grant)
            assert rows is not None
            assert rows.read(lease.grant, self._landing, lease.chain_id)
            assert rows.write(lease.grant, self._landing, lease.chain_id)
            token = lease.grant.token
        else:
            assert lease.position is not None
            np.copyto(self._landing, lease.position)
            position = self._landing
        return MovedChains.of(
            lease,
            position=position,
            energy=self._zeros,
            log_weight=self._zeros,
            version=1,
            num_steps=1,
            token=token,
        )


class Holder:
    """Weights of a module, sent and received."""

    def __init__(self, sizes: list[int]) -> None:
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self._module = nn.Sequential(*layers).requires_grad_(False)
        self._layout = FlatLayout.of(self._module)

    def publish(self) -> np.ndarray:
        return self._layout.pack(self._module).numpy()

    def receive(self, flat: np.ndarray, bind: bool) -> float:
        """Seconds until the module has the weights."""
        began = time.perf_counter()
        if bind:
            self._layout.bind_(self._module, flat)
        else:  # as before 2026-11-23
            self._layout.load_(self._module, torch.from_numpy(np.array(flat)))
        return time.perf_counter() - began


def chains(backend: RayBackend, batch: int, options: Any) -> list[dict]:
    capacity = options.slots
    handle = backend.spawn(
        partial(
            open_shard,
            config=BufferConfig(capacity=capacity, reinit_prob=0.0),
            data=None,
            spec=EventSpec(EVENT, "image"),
            index=0,
            num_shards=1,
            capacity=capacity,
            max_lease=batch,
            seed=0,
            num_grants=5,
        ),
        f"shard-{batch}",
        ActorOptions(num_threads=1, any_order=True, shared=True),
    )
    movers = [backend.spawn(partial(Mover, batch=batch), f"mover-{i}") for i in range(2)]
    backend.await_started([handle, *movers])
    shard = ShardClient(handle)
    ids = iter(range(1 << 62))

    def arm(by_rows: bool) -> float:
        under_way: deque = deque()
        began = time.perf_counter()
        for number in range(options.rounds + 4):
            if number < options.rounds:
                lease_id = next(ids)
                lease = shard.checkout(lease_id, batch, by_rows)
                moved = movers[number % 2].call("run_round", lease)
                reply = shard.checkin(moved, lease_id)
                under_way.append((reply, lease_id))
            if number >= 4:
                reply, lease_id = under_way.popleft()
                answer = backend.get(reply, 60.0)
                assert answer.accepted
                assert answer.by_rows == by_rows, answer.notes
                ready, _ = shard.take(lease_id)
                assert backend.get(ready, 60.0)
        return (time.perf_counter() - began) / options.rounds

    for by_rows in (True, False):
        arm(by_rows)
    times = interleaved(
        {"by rows": lambda: arm(True), "by value": lambda: arm(False)}, options.repetitions
    )
    middle = medians(times)
    rows = [
        {
            "batch": batch,
            "lease": name,
            "ms_a_round": round(taken * 1e3, 2),
            "chains_per_s": round(batch / taken),
            "rows_are_faster": round(taken / middle["by rows"], 2),
            "spread": round(spread(times[name]), 2),
        }
        for name, taken in middle.items()
    ]
    for part in (handle, *movers):
        backend.kill(part)
    return rows


def weights(backend: RayBackend, name: str, options: Any) -> list[dict]:
    sender, receiver = (
        backend.spawn(
            partial(Holder, sizes=SIZES[name]), f"{role}-{name}", ActorOptions(num_threads=1)
        )
        for role in ("sender", "receiver")
    )
    backend.await_started([sender, receiver])

    def publish() -> float:
        began = time.perf_counter()
        backend.wait([sender.call("publish")], 60.0)
        return time.perf_counter() - began

    def receive(bind: bool) -> float:
        return backend.get(receiver.call("receive", sender.call("publish"), bind), 60.0)

    arms = {
        "pack and publish": publish,
        "receive, bound": lambda: receive(True),
        "receive, copied": lambda: receive(False),
    }
    for once in arms.values():
        once()
    times = interleaved(arms, 3 * options.repetitions)
    for part in (sender, receiver):
        backend.kill(part)
    return [
        {
            "parameters": name,
            "step": arm,
            "ms": round(taken * 1e3, 3),
            "spread": round(spread(times[arm]), 2),
        }
        for arm, taken in medians(times).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20 rounds, 2 repetitions")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repetitions = 20, 2
    print(machine())
    backend = RayBackend(
        "local", namespace="transfers", start_timeout_s=120.0, object_store_bytes=2 << 30
    )
    rows: list[dict] = []
    try:
        for batch in (64, 256):
            rows += chains(backend, batch, options)
            print(*rows[-2:], sep="\n", flush=True)
        for name in SIZES:
            rows += weights(backend, name, options)
            print(*rows[-3:], sep="\n", flush=True)
    finally:
        backend.close()
    keep("transfers", rows, options.out, event=list(EVENT), slots=options.slots)


if __name__ == "__main__":
    main()
