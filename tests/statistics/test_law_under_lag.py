"""What lag does to the law of the negatives, measured through the pool, a shard and a worker.

The precision of E(x) = alpha_k x^2 / 2 grows as a scripted learner publishes alpha_k = 1 + k/1000.
Langevin chains of step h=.05 at T=1 follow it with a variance known in closed form.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.inline import InlineBackend, InlineHandle
from ebm_dist.config.sections import FlowConfig
from ebm_dist.controller.clients import ShardClient, WorkerClient
from ebm_dist.controller.negatives.asynchronous import AsyncNegatives
from ebm_dist.controller.negatives.source import Consumed
from ebm_dist.controller.retry import Redo
from ebm_dist.controller.rounds.round import Committed
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.core.section import Section
from ebm_dist.core.types import EventSpec, NegativeArrays
from ebm_dist.energies import EnergyConfig
from ebm_dist.objectives.weighting import staleness_log_weight
from ebm_dist.samplers import SamplerConfig

H = 0.05
SPEC = EventSpec((1,), "real")
TABLE = {0: 0.527638, 50: 0.540527, 200: 0.583541}
"""V_1000 by lag, from V_{k+1} = (1 - h alpha_{k-lag})^2 V_k + 2 T h."""


def alpha(k: int) -> float:
    return 1 + k / 1000


def after(variance: float, precision: float, num_steps: int) -> float:
    """The variance `num_steps` Langevin steps later."""
    for _ in range(num_steps):
        variance = (1 - H * precision) ** 2 * variance + 2 * H
    return variance


def without_lag(k: int) -> float:
    variance = 1.0
    for j in range(k - 400, k):
        variance = after(variance, alpha(j), 1)
    return variance


REMAINDER = {0: 0.0, 50: -0.003, 200: -0.010}
"""What weighting leaves by lag, of the variance without any."""


class Part(Section):
    energy: EnergyConfig
    sampler: SamplerConfig


class LateBackend(InlineBackend):
    """Runs each call at once; the answers of some rounds are seen only `delay` updates later."""

    concurrent = True

    def __init__(self, every: int, delay: int, num_steps: int) -> None:
        super().__init__()
        self.now = 0
        self._plan = every, delay, num_steps
        self._num_rounds = 0
        self._seen_at: dict[Any, int] = {}

    def note(self, ref: Any) -> None:
        every, delay, num_steps = self._plan
        if ref.value.accepted and ref.value.num_steps == num_steps:
            self._num_rounds += 1
            self._seen_at[ref] = self.now + (delay if self._num_rounds % every == 0 else 0)

    def wait(self, refs: Any, timeout: float) -> list[Any]:
        return [ref for ref in refs if self._seen_at.get(ref, 0) <= self.now]


class LateShard(InlineHandle):
    __slots__ = ("backend",)

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        ref = super().call(method, *args, num_returns=num_returns)
        if method == "checkin":
            self.backend.note(ref)
        return ref


class Scripted:
    """A pool, one shard, one worker, and a learner that publishes what it is told to."""

    def __init__(
        self,
        num_chains: int,
        capacity: int,
        num_steps: int,
        start_std: float,
        backend: InlineBackend | None = None,
        num_handles: int = 1,
        **flow: Any,
    ) -> None:
        self.backend = backend or InlineBackend()
        part = Part.model_validate(
            {
                "energy": {"name": "quadratic", "precision": [1.0], "learnable": True},
                "sampler": {"name": "langevin", "step_size": H, "temperature": 1.0},
            }
        )
        buffer = BufferConfig(capacity=capacity, reinit_prob=0.0, init_std=start_std)
        shard = Shard(buffer, SPEC, index=0, capacity=capacity, max_lease=num_chains, seed=5)
        handle = InlineHandle("shard", shard, None)
        if backend is not None:
            handle = LateShard("shard", shard, None)
            handle.backend = backend
        client = ShardClient(handle)
        mover = Worker(part.energy, part.sampler, SPEC)
        worker = WorkerClient(InlineHandle("worker", mover, None))
        self.progress = Progress()
        ticks = itertools.count()
        clock = lambda: next(ticks) / 100  # noqa: E731
        shards = Shards(self.backend, [capacity])
        shards.start(lambda index: client)
        workers = WorkerPool(self.backend, clock=clock)
        workers.start(num_handles, lambda index: worker)
        self.scheduler = RoundScheduler(
            self.backend,
            shards,
            workers,
            on_replaced=lambda shard: Redo(),
            on_rejected=lambda shard: Redo(),
            num_chains=num_chains,
            depth=2,
            hang_s=1e9,
            # By which rounds are tried again: with the machine's own, no two runs would be alike.
            clock=clock,
        )
        self.flow = AsyncNegatives(
            self.backend,
            shards,
            FlowConfig(mode="async", stall_timeout_s=60, **flow),
            self.scheduler,
            self.progress,
            lambda name, num: None,
            num_negatives=num_chains,
            num_chains=num_chains,
            num_steps=num_steps,
        )
        self.moved_at: dict[int, int] = {}
        """By lease of a repair, the version that its chains were moved under before."""
        self._note_repairs()

    def _note_repairs(self) -> None:
        usable, start, late = self.flow._is_usable, self.scheduler.start, []

        def is_usable(lease: Committed) -> bool:
            late[:] = [lease.version]
            return usable(lease)

        def noted(lease_id: int, *args: Any, **options: Any) -> None:
            if options.get("purpose") == "repair":
                self.moved_at[lease_id] = late[0]
            start(lease_id, *args, **options)

        self.flow._is_usable = is_usable  # type: ignore[method-assign]
        self.scheduler.start = noted  # type: ignore[method-assign]

    def update(self, step: int, published: int) -> tuple[Consumed, NegativeArrays]:
        """Update `step`, while workers are given the weights of update `published`."""
        self.progress.step = self.progress.version = step
        flat = np.array([alpha(published)], np.float32)
        self.scheduler.set_weights(self.backend.put(flat), published)
        taken = self.flow.take_negatives()
        (_, ref), *_ = taken.negatives
        return taken, self.backend.get(ref, 1.0)


def measure(lag: int, num_chains: int) -> NegativeArrays:
    """Negatives of the update that follows version 999 - lag."""
    run = Scripted(num_chains, num_chains, 1, 0.75, stale="reweight", max_lag=1)
    for step in range(999 - 80, 1000):
        taken, negatives = run.update(step, max(0, step - lag))
        assert taken.version - taken.leases[0].version == lag
    return negatives


def weighted_variance(x: np.ndarray, log_weight: torch.Tensor) -> tuple[float, float]:
    """Its value and standard error."""
    w = torch.softmax(log_weight.double(), 0).numpy()
    square = x.astype(np.float64) ** 2
    value = float((w * square).sum())
    return value, float(np.sqrt((w**2 * (square - value) ** 2).sum()))


@pytest.mark.parametrize("lag", [0, 50, 200])
def test_lag_widens_the_law_as_predicted_and_reweighting_brings_it_back(lag: int) -> None:
    num = 100_000
    negatives = measure(lag, num)
    x = negatives.x[:, 0]
    error = TABLE[lag] * math.sqrt(2 / num)
    assert abs(float(np.mean(x**2)) - TABLE[lag]) < 4 * error
    if lag:
        assert TABLE[lag] - TABLE[0] > 4 * error, "the test could see no effect"
    now = torch.from_numpy(0.5 * alpha(999) * x**2)
    log_weight = staleness_log_weight(now, torch.from_numpy(negatives.energy), 1.0)
    value, error = weighted_variance(x, log_weight)
    # The energies recorded are those under the weights that moved the chain. Weighting multiplies
    # its law by exp(-(alpha_now - alpha_then) x^2 / 2): a Gaussian again, of this variance.
    predicted = 1 / (1 / TABLE[lag] + alpha(999) - alpha(999 - lag))
    assert abs(value - predicted) < 4 * error
    # It is not quite that of no lag, by as much as docs/flow.md says.
    assert predicted / TABLE[0] - 1 == pytest.approx(REMAINDER[lag], abs=5e-4)
    if lag <= 50:
        assert abs(value - TABLE[0]) < 4 * error


@pytest.mark.parametrize(("lag", "repair_steps"), [(50, 24), (200, 4), (200, 24)])
def test_repair_leaves_of_the_error_what_its_steps_do_not_forget(
    lag: int, repair_steps: int
) -> None:
    # Every fourth round is a straggler: it comes back `lag` updates late, past the bound.
    num_chains, num_steps, last = 3000, 25, 1000
    first, max_lag = last - lag - (200 if lag == 50 else 100), lag // 2
    run = Scripted(
        num_chains,
        num_chains * (lag // 3 + 10),
        num_steps,
        math.sqrt(without_lag(first)),
        LateBackend(every=4, delay=lag, num_steps=num_steps),
        num_handles=64,
        stale="repair",
        max_lag=max_lag,
        repair_steps=repair_steps,
    )
    ratios, unrepaired, repaired = [], [], []
    for step in range(first, last):
        run.backend.now = step  # type: ignore[attr-defined]
        taken, negatives = run.update(step, step)
        assert taken.version - taken.leases[0].version <= max_lag
        if taken.leases[0].num_steps != repair_steps:
            continue
        # Repaired chains wait their turn like others: what the repair did is judged by the weights
        # that it ran with, `version`, and not by those of the update that took them.
        version = taken.leases[0].version
        target = without_lag(version)
        ratios.append(float(np.mean(negatives.x**2)) / target)
        # Of a straggler that is back others come first, so that it is staler than by its lag alone.
        before = run.moved_at[taken.leases[0].lease_id]
        assert version - before >= lag
        stale = after(without_lag(before), alpha(before), num_steps)
        unrepaired.append(stale / target)
        repaired.append(after(stale, alpha(version), repair_steps) / target)
    error = math.sqrt(2 / (num_chains * len(ratios)))
    ratio, predicted = float(np.mean(ratios)), float(np.mean(repaired))
    assert len(ratios) > 20
    assert abs(ratio - predicted) < 4 * error
    assert float(np.mean(unrepaired)) - 1 > 4 * error, "the test could see no effect"
    # (1 - h alpha)^2 a step: 24 of them bring the law back, 4 do not.
    assert (abs(ratio - 1) < 4 * error) == (repair_steps == 24)
