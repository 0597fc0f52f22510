"""What the controller can dispatch: the pool and the flow of negatives against simulated workers.

No Ray, no sampling. A round is a sleep of `--round-s` on its worker; an update takes whole leases
and no time of its own. Time is simulated, and the controller's own computing is charged to it as
measured, so that what comes out is the rate that one controller process on this machine would
reach, and the share of the ideal one (workers / round-s).

    python benchmarks/control_plane.py --workers 256
    python benchmarks/control_plane.py --workers 256 --call-us 150   # with the cost of Ray's calls
    python benchmarks/control_plane.py --ray --workers 64 256 --shards 2   # through Ray

With `--ray` the workers are threads of a few actors that sleep, the shards real ones of a million
slots each, and chains go by value; the machine is shared by all of them.
"""

from __future__ import annotations

import argparse
import cProfile
import heapq
import os
import pstats
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import keep

from ebm_dist.buffer.answers import CheckinReply, ShardCounts
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import ActorOptions
from ebm_dist.cluster.ray_backend import RayBackend
from ebm_dist.config.sections import FlowConfig
from ebm_dist.controller.clients import ShardClient, WorkerClient
from ebm_dist.controller.negatives.asynchronous import AsyncNegatives
from ebm_dist.controller.retry import Redo
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.core.types import EventSpec, Lease, MovedChains

CHAINS, STEPS, SLOTS = 64, 40, 10**6
COUNTS = ShardCounts(0, 0, 0, 0, 0.0, 0, 0, 0, 0)


@dataclass(slots=True, eq=False)
class Ref:
    value: Any = None


@dataclass(slots=True, eq=False)
class Moved:
    """What stands for chains on their way: who moves them, and under which weights."""

    worker: Part
    version: int


@dataclass(slots=True, eq=False)
class Part:
    """A worker or a shard; `call` books what it would cost and when it would answer."""

    backend: Simulated
    name: str
    node: str | None = None
    free_at: float = 0.0

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        backend = self.backend
        backend.num_calls += 1
        if method == "run_round":
            return Ref(Moved(self, args[2]))
        if method == "checkin":
            moved = args[0].value
            worker = moved.worker
            worker.free_at = max(worker.free_at, backend.now()) + backend.round_s
            reply = CheckinReply(
                True,
                args[1],
                COUNTS,
                version=moved.version,
                num_steps=STEPS,
                num_chains=CHAINS,
            )
            ref = Ref(reply)
            heapq.heappush(backend.events, (worker.free_at, backend.num_calls, ref))
            return ref
        if method == "take":
            return [Ref(True), Ref(None)]
        return Ref(None)


@dataclass
class Simulated:
    """A backend whose clock is the computing done so far and the waits in between."""

    round_s: float
    call_s: float
    concurrent: bool = True
    scattered: bool = False
    skipped: float = 0.0
    num_calls: int = 0
    num_waits: int = 0
    events: list[tuple[float, int, Ref]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def computed(self) -> float:
        return time.perf_counter() - self.began

    def now(self) -> float:
        return self.computed() + self.skipped + self.call_s * self.num_calls

    def wait(self, refs: Any, timeout: float) -> list[Ref]:
        self.num_waits += 1
        now, events = self.now(), self.events
        if events and events[0][0] > now:
            pause = min(events[0][0] - now, timeout)
            self.skipped += pause
            now += pause
        # `hold` has been answered by the first wait.
        done = [ref for ref in refs if ref.value is None] if self.num_waits == 1 else []
        while events and events[0][0] <= now:
            done.append(heapq.heappop(events)[2])
        return done

    def get(self, ref: Ref, timeout: float) -> Any:
        return ref.value

    def alive(self, handle: Part, timeout: float = 5.0) -> bool:
        return True

    def kill(self, handle: Part) -> None: ...


def _flow(
    backend: Any, parts: list[ShardClient], workers: list[WorkerClient], **options: Any
) -> tuple[RoundScheduler, Progress, Callable[[], None]]:
    """A pool, its progress, and what makes an update of a quarter as many leases as workers."""
    progress, num_workers = Progress(), len(workers)
    shards, pool = Shards(backend, [SLOTS] * len(parts)), WorkerPool(backend, **options)
    shards.start(lambda index: parts[index])
    pool.start(num_workers, lambda index: workers[index])
    scheduler = RoundScheduler(
        backend,
        shards,
        pool,
        on_replaced=lambda shard: Redo(),
        on_rejected=lambda shard: Redo(),
        num_chains=CHAINS,
        depth=2,
        hang_s=1e9,
        **options,
    )
    flow = AsyncNegatives(
        backend,
        shards,
        FlowConfig(mode="async", max_lag=8),
        scheduler,
        progress,
        lambda name, num: None,
        num_negatives=max(1, num_workers // 4) * CHAINS,
        num_chains=CHAINS,
        num_steps=STEPS,
    )

    def update() -> None:
        flow.take_negatives()
        progress.step += 1
        progress.version += 1
        scheduler.set_weights(scheduler.workers.weights, progress.version)

    return scheduler, progress, update


def simulate(
    num_workers: int, num_shards: int, num_updates: int, round_s: float, call_s: float
) -> dict[str, float]:
    """Make updates; returns rates and costs."""
    backend = Simulated(round_s, call_s)
    shards = [ShardClient(Part(backend, f"shard-{i}")) for i in range(num_shards)]
    workers = [WorkerClient(Part(backend, f"worker-{i}")) for i in range(num_workers)]
    scheduler, _, make_update = _flow(backend, shards, workers, clock=backend.now)
    scheduler.set_weights(Ref(), 0)
    start, first = backend.now(), 0
    computed = waits = calls = 0.0
    for update in range(num_updates):
        if update == 8:  # every worker has two rounds before it from here on
            start, first = backend.now(), scheduler.mcmc_steps
            computed, waits, calls = backend.computed(), backend.num_waits, backend.num_calls
        make_update()
    rounds = (scheduler.mcmc_steps - first) / (CHAINS * STEPS)
    cost = (backend.computed() - computed) / rounds
    calls = (backend.num_calls - calls) / rounds
    rate = rounds / (backend.now() - start)
    return {
        "rounds/s": rate,
        "of ideal": rate * round_s / num_workers,
        "us/round": 1e6 * cost,
        "calls/round": calls,
        "waits/round": (backend.num_waits - waits) / rounds,
        "ceiling rounds/s": 1.0 / (cost + calls * call_s),
    }


class Host:
    """Some workers of a pool, as threads of one actor; each does one round at a time."""

    def __init__(self, num: int, round_s: float) -> None:
        self._locks = [threading.Lock() for _ in range(num)]
        self._round_s = round_s

    def hold(self, index: int, weights: Any, version: int) -> int:
        return version

    def run_round(
        self, index: int, lease: Lease | None, weights: Any, version: int, num_steps: int
    ) -> MovedChains | None:
        if lease is None:
            return None
        with self._locks[index]:
            time.sleep(self._round_s)
        assert lease.position is not None
        return MovedChains.of(
            lease,
            position=lease.position,
            energy=lease.position.sum(1),
            log_weight=lease.log_weight,
            version=version,
            num_steps=num_steps,
        )


@dataclass(slots=True)
class Hosted:
    """The handle of one of a host's workers."""

    actor: Any
    index: int
    name: str
    node: str | None = None

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        return getattr(self.actor, method).remote(self.index, *args)


def through_ray(
    num_workers: int, num_shards: int, num_updates: int, round_s: float, num_hosts: int
) -> dict[str, float]:
    """The same on a local Ray, in real time."""
    backend = RayBackend("local", namespace="control-plane", start_timeout_s=300.0)
    try:
        import ray

        share = -(-num_workers // num_hosts)
        host = ray.remote(Host).options(num_cpus=0, max_concurrency=2 * share + 2)
        hosts = [host.remote(share, round_s) for _ in range(num_hosts)]
        workers = [
            WorkerClient(Hosted(hosts[i % num_hosts], i // num_hosts, f"worker-{i}"))
            for i in range(num_workers)
        ]
        config = BufferConfig(capacity=num_shards * SLOTS, num_shards=num_shards, reinit_prob=0.0)
        handles = [
            backend.spawn(
                partial(
                    Shard,  # without a directory: chains go by value, as between machines
                    config,
                    EventSpec((8,), "real"),
                    index=i,
                    capacity=SLOTS,
                    max_lease=CHAINS,
                    seed=1,
                ),
                f"shard-{i}",
                ActorOptions(any_order=True),
            )
            for i in range(num_shards)
        ]
        backend.await_started(handles)
        shards = [ShardClient(handle) for handle in handles]
        scheduler, progress, update = _flow(backend, shards, workers)
        scheduler.set_weights(backend.put(None), 0)
        for _ in range(12):
            update()
        start, first = time.perf_counter(), scheduler.mcmc_steps
        computed = time.process_time()
        for _ in range(num_updates):
            update()
        seconds = time.perf_counter() - start
        rounds = (scheduler.mcmc_steps - first) / (CHAINS * STEPS)
        assert progress.version == 12 + num_updates
        return {
            "rounds/s": rounds / seconds,
            "of ideal": rounds / seconds * round_s / num_workers,
            "us/round": 1e6 * (time.process_time() - computed) / rounds,
            "load": os.getloadavg()[0],
        }
    finally:
        backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--quick", action="store_true", help="fewer updates through Ray")
    parser.add_argument("--out", type=Path, help="also write the result there, as JSON")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--updates", type=int, help="80 when left out, or 20 if quick")
    parser.add_argument("--round-s", type=float, default=1.0)
    parser.add_argument("--call-us", type=float, default=0.0, help="charged for each remote call")
    parser.add_argument("--ray", action="store_true", help="through Ray, in real time")
    parser.add_argument(
        "--hosts", type=int, default=4, help="actors that hold the workers of --ray"
    )
    parser.add_argument(
        "--profile", action="store_true", help="where the time goes, at the last size"
    )
    options = parser.parse_args()
    # Simulated ones cost little, and the first of them are those of an empty pool.
    updates = options.updates or (20 if options.quick and options.ray else 80)
    print(f"{'workers':>8}", end="")
    rows = []
    for index, num in enumerate(options.workers):
        with cProfile.Profile() if options.profile else _Nothing() as profile:
            row = (
                through_ray(num, options.shards, updates, options.round_s, options.hosts)
                if options.ray
                else simulate(num, options.shards, updates, options.round_s, 1e-6 * options.call_us)
            )
        if index == 0:
            print("".join(f"{name:>18}" for name in row))
        print(f"{num:>8}" + "".join(f"{value:>18.4g}" for value in row.values()), flush=True)
        rows.append({"workers": num, **row})
    keep("control_plane", rows, options.out, through_ray=options.ray, updates=updates)
    if isinstance(profile, cProfile.Profile):
        pstats.Stats(profile).sort_stats("cumulative").print_stats(18)


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


if __name__ == "__main__":
    main()
