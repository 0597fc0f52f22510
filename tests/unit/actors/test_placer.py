"""Learner ranks get whole GPUs, workers all that is left, and nobody waits for a device in vain.

Ray packs claims into devices by best fit; `packing.Machine` does so here, and one test compares it
with a Ray.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from packing import Machine, part
from small_runs import run
from worlds import said as lines_said

from ebm_dist.cluster.inline import InlineBackend
from ebm_dist.config.sections import RuntimeConfig
from ebm_dist.core.errors import UserError
from ebm_dist.run.placement.gpu_shares import Shares, share_out
from ebm_dist.run.placement.placer import VIEW_S, Placer
from ebm_dist.run.placement.places import await_gpus, shard_notice
from ebm_dist.run.placement.plan import plan


class Cluster:
    """Machines, a placer, and the parts that it has placed, in the order of `assemble`."""

    def __init__(self, machines: list[Machine], num_ranks: int, num_workers: int, **options: Any):
        self.machines = {machine.id: machine for machine in machines}
        self.now = VIEW_S
        self.shards: list[Any] = []
        self.workers: list[Any] = []
        self.devices: dict[str, tuple[str, int]] = {}
        """Where each part runs."""
        num_gpus = sum(machine.num_gpus for machine in machines)
        options = {"mode": "async", "worker_threads": None, "learner_threads": None} | options
        made = plan(
            RuntimeConfig(),
            num_workers=num_workers,
            num_ranks=num_ranks,
            num_cores=64,
            num_gpus=num_gpus,
            **options,
        )
        self.placer = Placer(
            self.look,
            self.shards,
            self.workers,
            made,
            cpus_per_worker=1.0,
            num_workers=num_workers,
            num_ranks=num_ranks,
            clock=lambda: self.now,
        )
        self.num_ranks = num_ranks
        self.num_workers = num_workers

    def look(self) -> list:
        return [machine.seen() for machine in self.machines.values() if machine.alive]

    def start(self, num_shards: int = 1) -> Cluster:
        for index in range(num_shards):
            self.shards.append(part(f"shard-{index}", self.placer.for_shard(), 0.0))
        self.start_ranks()
        for index in range(self.num_workers):
            self.start_worker(f"worker-{index}")
        return self

    def start_ranks(self) -> list[str]:
        ranks = self.placer.for_ranks()
        assert ranks is not None
        for worker in ranks.yielding:
            self.end(worker)
        for index, place in enumerate(ranks.places):
            self.run(f"rank-{index}", place.node, place.num_gpus)
        return [worker.name for worker in ranks.yielding]

    def start_worker(self, name: str) -> None:
        before = next((worker for worker in self.workers if worker.name == name), None)
        place = self.placer.for_worker(instead_of=before)
        if before is not None:
            self.workers.remove(before)
        if place is not None:
            self.run(name, place.node, place.num_gpus, cpus=1.0)
            self.workers.append(part(name, place.node, place.num_gpus))

    def run(self, name: str, node: str | None, gpus: float, cpus: float = 0.0) -> None:
        assert node is not None
        device = self.machines[node].place(gpus, cpus)
        assert device is not None, f"{name} waits for {gpus} GPUs on {node}"
        self.devices[name] = (node, device)

    def end(self, worker: Any) -> None:
        node, device = self.devices.pop(worker.name)
        self.machines[node].free[device] += round(worker.num_gpus * 10_000)
        self.machines[node].cpus_free += 1.0

    def lose(self, node: str) -> list[str]:
        """The node ends with all that is on it."""
        self.machines[node].alive = False
        lost = [name for name, (at, _) in self.devices.items() if at == node]
        for name in lost:
            del self.devices[name]
        return lost


def cluster(num_nodes: int, num_gpus: int, num_ranks: int, num_workers: int, **options) -> Cluster:
    machines = [Machine(f"node-{i}", 64.0, num_gpus) for i in range(num_nodes)]
    return Cluster(machines, num_ranks, num_workers, **options)


def load(made: Cluster) -> Counter[tuple[str, int]]:
    return Counter(device for name, device in made.devices.items() if name.startswith("worker"))


@pytest.mark.parametrize(
    ("num_nodes", "num_gpus", "num_ranks", "num_workers"),
    [
        (8, 8, 1, 126),
        (2, 8, 1, 30),
        (4, 8, 1, 62),
        (8, 8, 1, 64),
        (8, 8, 1, 63),
        (8, 8, 8, 56),
        (8, 8, 8, 57),
        (2, 8, 3, 90),
        (1, 8, 1, 15),
        (1, 2, 1, 1),
        (3, 2, 4, 5),
        (1, 1, 1, 3),
    ],
)
def test_every_rank_has_a_gpu_and_no_other_gpu_is_without_a_worker(
    num_nodes: int, num_gpus: int, num_ranks: int, num_workers: int
) -> None:
    made = cluster(num_nodes, num_gpus, num_ranks, num_workers).start()
    assert len(made.workers) == num_workers
    left = num_nodes * num_gpus - num_ranks
    ranks = [device for name, device in made.devices.items() if name.startswith("rank")]
    assert len(ranks) == num_ranks
    if left > 0:
        assert len(set(ranks)) == num_ranks
        assert not set(ranks) & set(load(made))
        assert len(load(made)) == min(left, num_workers)
        assert max(load(made).values()) <= max(1, 2 * (num_workers // left))


def test_workers_have_a_whole_gpu_each_where_there_are_enough() -> None:
    made = cluster(8, 8, 1, 63).start()
    assert {worker.num_gpus for worker in made.workers} == {1.0}


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 7, 16, 17, 40])
def test_claims_fit_whatever_their_order(num_gpus: int, num_workers: int) -> None:
    shares = share_out(num_gpus, 1, num_workers)
    claims = [shares.rank]
    for _ in range(num_workers):
        claims.append(shares.next(claims[1:]))
    for seed in range(20):
        machine = Machine("a", 64.0, num_gpus)
        random.Random(seed).shuffle(claims)
        assert all(machine.place(claim) is not None for claim in claims)


def test_several_ranks_cannot_share_one_gpu() -> None:
    with pytest.raises(UserError, match=r"learner\.num_ranks: 2 ranks and 2 workers need"):
        share_out(1, 2, 2)


def test_a_run_places_its_ranks_before_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    spawn = InlineBackend.spawn

    def noted(backend: InlineBackend, make: Any, name: str, *options: Any) -> Any:
        started.append(name)
        return spawn(backend, make, name, *options)

    monkeypatch.setattr(InlineBackend, "spawn", noted)
    run(tmp_path / "run", "run.steps=1")
    assert started.index("learner-0") < started.index("worker-0")


# --- ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "num_ranks", "expected"),
    [
        ([8, 8, 8], 8, [8]),
        ([4, 8, 2], 2, [2]),
        ([4, 8, 2], 5, [5]),
        ([4, 8, 4], 10, [2, 8]),
    ],
)
def test_ranks_are_packed_on_as_few_nodes_as_hold_them(
    gpus: list[int], num_ranks: int, expected: list[int]
) -> None:
    machines = [Machine(f"node-{i}", 64.0, num) for i, num in enumerate(gpus)]
    ranks = Cluster(machines, num_ranks, 1).placer.for_ranks()
    assert ranks is not None
    assert sorted(Counter(place.node for place in ranks.places).values()) == expected


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 15), (1, 30), (4, 12), (8, 8), (8, 40)])
def test_after_a_lost_node_workers_yield_to_the_ranks(num_ranks: int, num_workers: int) -> None:
    made = cluster(2, 8, num_ranks, num_workers).start()
    home = made.devices["rank-0"][0]
    assert all(made.devices[f"rank-{i}"][0] == home for i in range(num_ranks))
    lost = made.lose(home)
    if num_ranks == 8:
        made.machines["node-2"] = Machine("node-2", 64.0, 1)  # else there is no GPU for a worker
    yielded = made.start_ranks()
    # Those without a process are found one by one, and get what is left.
    for name in [*(n for n in lost if n.startswith("worker")), *yielded]:
        made.start_worker(name)
    ranks = {device for name, device in made.devices.items() if name.startswith("rank")}
    assert len(ranks) == num_ranks
    assert not ranks & set(load(made))
    assert made.workers


def test_a_rank_that_died_alone_comes_back_where_it_was_and_nobody_yields() -> None:
    made = cluster(2, 8, 2, 28).start()
    before = dict(made.devices)
    ranks = made.placer.for_ranks()  # their claims are not free yet
    assert ranks is not None
    assert ranks.yielding == []
    assert [place.node for place in ranks.places] == [before["rank-0"][0], before["rank-1"][0]]


def test_a_worker_that_died_comes_back_in_its_place_where_all_others_are_taken() -> None:
    made = cluster(2, 2, 1, 6).start()
    assert made.placer.for_worker() is None
    place = made.placer.for_worker(instead_of=made.workers[0])  # its claim is not free yet
    assert place is not None
    assert place.node == made.workers[0].node
    assert place.num_gpus == made.workers[0].num_gpus


def test_gpus_of_other_programs_are_left_alone() -> None:
    made = cluster(2, 8, 1, 10)
    for _ in range(4):
        made.machines["node-0"].place(1.0)
    made.start()
    assert len(made.workers) == 10
    assert all(free >= 0 for machine in made.machines.values() for free in machine.free)


# --- CPUs, threads and shards -------------------------------------------------------------------


def test_the_cores_of_a_node_are_shared_by_its_own_workers() -> None:
    made = cluster(8, 0, 1, 64)
    threads = []
    for index in range(64):
        place = made.placer.for_worker()
        assert place is not None
        threads.append(place.num_threads)
        made.workers.append(part(f"worker-{index}", place.node, 0.0))
    assert threads == [8] * 64
    assert Counter(worker.node for worker in made.workers) == {f"node-{i}": 8 for i in range(8)}
    big = Cluster([Machine("a", 4.0, 0), Machine("b", 64.0, 0)], 1, 8)
    for index in range(8):
        place = big.placer.for_worker()
        assert place is not None
        assert place.num_threads == {"a": 1, "b": 16}[str(place.node)]
        big.workers.append(part(f"worker-{index}", place.node, 0.0))


@pytest.mark.parametrize(("mode", "expected"), [("sync", 64), ("async", 32)])
def test_ranks_without_gpus_are_spread_and_have_the_cores_of_their_nodes(
    mode: str, expected: int
) -> None:
    ranks = cluster(3, 0, 3, 3, mode=mode).placer.for_ranks()
    assert ranks is not None
    assert len({place.node for place in ranks.places}) == 3
    assert {place.num_threads for place in ranks.places} == {expected}


def test_a_head_without_cpus_gets_no_shard_no_rank_and_no_worker() -> None:
    machines = [Machine("head", 0.0, 0), Machine("a", 4.0, 0), Machine("b", 4.0, 0)]
    made = Cluster(machines, 3, 8).start(num_shards=4)
    assert Counter(shard.node for shard in made.shards) == {"a": 2, "b": 2}
    assert "head" not in {node for node, _ in made.devices.values()}
    assert len(made.workers) == 8


@pytest.mark.parametrize(
    ("num_shards", "num_workers", "num_nodes", "said"),
    [
        (1, 2, 1, None),
        (1, 16, 1, "buffer.num_shards=2"),
        (1, 8, 4, "buffer.num_shards=4"),
        (2, 64, 8, "buffer.num_shards=8"),
        (8, 64, 8, None),
        (0, 64, 8, None),
    ],
)
def test_shards_too_few_for_the_workers_are_said(
    num_shards: int, num_workers: int, num_nodes: int, said: str | None
) -> None:
    line = shard_notice(num_shards, num_workers, {f"node-{i}" for i in range(num_nodes)})
    assert (said in line and "\n" not in line) if said and line else line is said


# --- GPUs that are still coming -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "num_ranks", "counts", "expected", "said"),
    [
        ("auto", 1, [0, 8], 0, "runtime.device=cuda waits"),
        ("auto", 4, [8], 8, None),
        ("auto", 8, [4, 4, 12], 12, "4 of the 9 GPUs"),
        ("cuda", 1, [0, 0, 2], 2, "0 of the 1 GPUs"),
        ("cuda", 1, [0], 0, "at most 30 s"),
        ("cpu", 1, [0], 0, None),
    ],
)
def test_gpu_nodes_that_are_still_coming_are_waited_for_or_said(
    device: Any, num_ranks: int, counts: list[int], expected: int, said: str | None
) -> None:
    lines = lines_said()
    times = iter(range(1000))
    left = iter(counts)
    num = await_gpus(
        RuntimeConfig(device=device, start_timeout_s=30),
        lambda: next(left, counts[-1]),
        num_ranks=num_ranks,
        clock=lambda: float(next(times)),
        sleep=lambda seconds: None,
    )
    assert num == expected
    assert (not lines) if said is None else (said in lines[0] and len(lines) == 1)


# --- Ray itself ---------------------------------------------------------------------------------


@pytest.mark.ray
def test_ray_packs_claims_as_this_test_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    shares = share_out(5, 1, 6)
    assert shares == Shares(1.0, 1.0, 2, 0.5)
    claims = [0.5, 1.0, 0.5, 0.5, 1.0, 1.0, 0.5]  # the ranks and large ones late
    machine = Machine("a", 8.0, 5)
    # Local: other runs on this machine may have a cluster that it would join.
    ray.init("local", num_cpus=1, num_gpus=5, include_dashboard=False, logging_level=40)
    try:

        @ray.remote(num_cpus=0)
        class Part:
            def devices(self) -> list[int]:
                return ray.get_gpu_ids()

        parts, theirs, ours = [], [], []
        for claim in claims:
            parts.append(Part.options(num_gpus=claim).remote())
            theirs.append(ray.get(parts[-1].devices.remote(), timeout=120))
            ours.append(machine.place(claim))
    finally:
        ray.shutdown()
    # Devices by who shares them: which of several free ones comes first does not matter.
    shared = [{i for i, ids in enumerate(theirs) if ids == chosen} for chosen in theirs]
    assert shared == [{i for i, device in enumerate(ours) if device == mine} for mine in ours]
