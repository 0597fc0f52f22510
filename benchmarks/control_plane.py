"""What the controller can dispatch: the pool and the flow of negatives against simulated workers.

No Ray, no sampling. A round is a sleep of `--round-s` on its worker; an update takes whole leases
and no time of its own. Time is simulated, and the controller's own computing is charged to it as
measured, so that what comes out is the rate that one controller process on this machine would
reach, and the share of the ideal one (workers / round-s).

    python benchmarks/control_plane.py --workers 256
    python benchmarks/control_plane.py --workers 256 --call-us 150   # with the cost of Ray's calls
"""

from __future__ import annotations

import argparse
import cProfile
import heapq
import pstats
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ebm_dist.actors.cut import Progress
from ebm_dist.actors.flow import NegativeFlow
from ebm_dist.actors.pool import RoundPool
from ebm_dist.buffer.policy import FlowConfig

CHAINS, STEPS = 64, 40
COUNTS = {"free": 0, "leased": 0, "ready": 0, "capacity": 0, "age_mean": 0.0}


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
            reply = {
                "accepted": True,
                "lease_id": args[1],
                "version": moved.version,
                "num_steps": STEPS,
                "num_chains": CHAINS,
                "stats": {},
                "counts": COUNTS,
            }
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


def simulate(
    num_workers: int, num_shards: int, num_updates: int, round_s: float, call_s: float
) -> dict[str, float]:
    """Make updates; returns rates and costs."""
    backend = Simulated(round_s, call_s)
    shards = [Part(backend, f"shard-{i}") for i in range(num_shards)]
    workers = [Part(backend, f"worker-{i}") for i in range(num_workers)]
    progress = Progress()
    pool = RoundPool(
        backend,  # type: ignore[arg-type]
        shards,  # type: ignore[arg-type]
        workers,  # type: ignore[arg-type]
        respawn_worker=lambda index: workers[index],  # type: ignore[arg-type]
        respawn_shard=lambda index: shards[index],  # type: ignore[arg-type]
        on_rejected=lambda shard: None,
        say=print,
        num_chains=CHAINS,
        depth=2,
        hang_s=1e9,
        clock=backend.now,
    )
    leases = max(1, num_workers // 4)
    flow = NegativeFlow(
        SimpleNamespace(backend=backend, shards=shards, capacities=[10**6] * num_shards),  # type: ignore[arg-type]
        SimpleNamespace(num_negatives=leases * CHAINS, num_chains=CHAINS, num_steps=STEPS),  # type: ignore[arg-type]
        FlowConfig(mode="async", max_lag=8),
        pool,
        progress,
        lambda name, num: None,
    )
    pool.set_weights(None, 0)
    start, first = backend.now(), 0
    computed = waits = calls = 0.0
    for update in range(num_updates):
        if update == 8:  # every worker has two rounds before it from here on
            start, first = backend.now(), pool.mcmc_steps
            computed, waits, calls = backend.computed(), backend.num_waits, backend.num_calls
        flow.take_negatives()
        progress.step += 1
        progress.version += 1
        pool.set_weights(None, progress.version)
    rounds = (pool.mcmc_steps - first) / (CHAINS * STEPS)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--round-s", type=float, default=1.0)
    parser.add_argument("--call-us", type=float, default=0.0, help="charged for each remote call")
    parser.add_argument(
        "--profile", action="store_true", help="where the time goes, at the last size"
    )
    options = parser.parse_args()
    print(f"{'workers':>8}", end="")
    for index, num in enumerate(options.workers):
        with cProfile.Profile() if options.profile else _Nothing() as profile:
            row = simulate(
                num, options.shards, options.updates, options.round_s, 1e-6 * options.call_us
            )
        if index == 0:
            print("".join(f"{name:>18}" for name in row))
        print(f"{num:>8}" + "".join(f"{value:>18.4g}" for value in row.values()))
    if isinstance(profile, cProfile.Profile):
        pstats.Stats(profile).sort_stats("cumulative").print_stats(18)


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


if __name__ == "__main__":
    main()
