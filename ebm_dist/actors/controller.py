"""The training loop: rounds to workers, negatives to learners, weights back, cuts to disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ebm_dist import checkpoint
from ebm_dist.actors.handles import Backend, Handle, Ref
from ebm_dist.actors.pool import Committed, RoundPool
from ebm_dist.actors.window import MetricWindow
from ebm_dist.buffer.policy import FlowConfig
from ebm_dist.errors import RunFailed
from ebm_dist.learner import LearnerConfig, learning_rate

_POLL_S = 0.2


class View(Protocol):
    """What the person watching sees; `metrics.progress.Progress` is one."""

    def update(self, step: int, metrics: dict[str, float], waits: str) -> None: ...
    def say(self, line: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """When things happen, in updates, and how much of each."""

    num_updates: int
    batch_size: int
    num_chains: int
    num_steps: int
    """MCMC steps of a round."""
    log_every: int
    checkpoint_every: int
    keep: int
    evaluate_every: int | None
    num_grid: int
    num_samples: int
    temperature: float


@dataclass(slots=True)
class Graph:
    """The parts, wired."""

    backend: Backend
    shards: list[Handle]
    workers: list[Handle]
    ranks: list[Handle]
    hub: Handle
    evaluator: Handle | None
    respawn_worker: Callable[[int], Handle]
    needs_negatives: bool


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers of the controller."""

    step: int = 0
    version: int = 0
    epoch: int = 0
    next_lease: int = 0
    mcmc_steps: int = 0
    wall_s: float = 0.0


@dataclass(slots=True)
class _Consumed:
    leases: list[Committed]
    negatives: list[Ref]
    wait_s: float


class Controller:
    """Runs in the driver process and owns the weight references: a learner that dies takes
    no weights with it."""

    def __init__(
        self,
        graph: Graph,
        schedule: Schedule,
        *,
        flow: FlowConfig,
        learner: LearnerConfig,
        run_dir: Path,
        view: View,
        should_stop: Callable[[], bool],
        meta: dict[str, Any],
        save_grid: Callable[[np.ndarray, int], Path | None],
    ) -> None:
        self.progress = Progress()
        self.metrics: dict[str, float] = {}
        self._graph = graph
        self._schedule = schedule
        self._flow = flow
        self._learner = learner
        self._run_dir = run_dir
        self._view = view
        self._should_stop = should_stop
        self._meta = meta
        self._save_grid = save_grid
        self._backend = graph.backend
        self._window = MetricWindow()
        self._flat: Ref = None
        self._ema: Ref = None
        self._evaluation: tuple[int, Ref] | None = None
        self._leases_per_update = schedule.batch_size // schedule.num_chains
        inline = not hasattr(graph.backend, "local")
        # Inline rounds run where they are started: starting them early would only age them.
        updates_ahead = 1 if inline else max(1, flow.max_lag)
        rounds_ahead = self._leases_per_update * updates_ahead
        self._ahead = (
            rounds_ahead
            if inline
            else min(rounds_ahead, max(2 * len(graph.workers), 2 * self._leases_per_update))
        )
        self._pool = RoundPool(
            graph.backend,
            graph.shards,
            graph.workers,
            respawn_worker=graph.respawn_worker,
            num_chains=schedule.num_chains,
            depth=2,
        )

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the last update; returns False if told to stop before it."""
        start = time.monotonic() - self.progress.wall_s
        self._publish_current()
        self._window.reset()
        while self.progress.step < self._schedule.num_updates:
            if self._should_stop():
                self.cut(f"stopped at update {self.progress.step}")
                return False
            self._update()
            self.progress.wall_s = time.monotonic() - start
            step = self.progress.step
            if step % self._schedule.log_every == 0 or step == self._schedule.num_updates:
                self._log()
            if (every := self._schedule.evaluate_every) is not None and step % every == 0:
                self.evaluate()
            self._collect_evaluation(block=False)
            if step % self._schedule.checkpoint_every == 0 and step < self._schedule.num_updates:
                self.cut()
        self.finish_evaluation()
        self.cut()
        return True

    def _update(self) -> None:
        consumed = self._take_negatives() if self._graph.needs_negatives else None
        replies = self._start_update(consumed)
        waited = self._await_learners(replies)
        metrics = self._backend.get(replies[0][0], timeout=30.0)
        self.progress.step += 1
        self._publish(replies[0][1], replies[0][2])
        self._window.add_update(metrics)
        self._window.add_wait(consumed.wait_s if consumed else 0.0, waited)
        if consumed is not None:
            lags = [self.progress.version - 1 - lease.version for lease in consumed.leases]
            self._window.add_lag(lags)
            for lease in consumed.leases:
                self._window.add_round(lease.stats)
        self._view.update(
            self.progress.step, {**self.metrics, **metrics}, self._window.bottleneck()
        )

    def _start_update(self, consumed: _Consumed | None) -> list[list[Ref]]:
        step = self.progress.step
        lr = learning_rate(self._learner, step, self._schedule.num_updates)
        replies = []
        num_ranks = len(self._graph.ranks)
        per_rank = self._schedule.batch_size // num_ranks
        for index, rank in enumerate(self._graph.ranks):
            parts: list[tuple[int, int]] = []
            refs: list[Ref] = []
            if consumed is not None:
                low, high = index * per_rank, (index + 1) * per_rank
                offset = 0
                for lease, ref in zip(consumed.leases, consumed.negatives):
                    first, last = max(low, offset), min(high, offset + lease.num_chains)
                    if first < last:
                        parts.append((first - offset, last - offset))
                        refs.append(ref)
                    offset += lease.num_chains
            replies.append(rank.call("update", step, lr, parts, *refs, num_returns=3))
        return replies

    def _await_learners(self, replies: list[list[Ref]]) -> float:
        """Keep rounds going until every rank is done; returns the seconds that took."""
        start = time.monotonic()
        pending = [reply[0] for reply in replies]
        while pending:
            done = self._pool.poll(_POLL_S, *pending)
            for ref in done:
                self._backend.get(ref, timeout=30.0)  # a rank that failed fails the run here
            pending = [ref for ref in pending if ref not in done]
            if self._flow.mode == "async":
                self._top_up()
            if time.monotonic() - start > self._flow.stall_timeout_s:
                raise RunFailed(
                    f"update {self.progress.step} did not end within "
                    f"{self._flow.stall_timeout_s:.0f} s (flow.stall_timeout_s): learner ranks hang"
                )
        return time.monotonic() - start

    # --- negatives ----------------------------------------------------------------------------

    def _take_negatives(self) -> _Consumed:
        """Leases of one update, moved under its own weights (sync) or within max_lag (async)."""
        start = time.monotonic()
        if self._flow.mode == "sync":
            first = self.progress.step * self._leases_per_update
            wanted = range(first, first + self._leases_per_update)
            self.progress.next_lease = wanted.stop
            for lease_id in wanted:
                self._pool.start(lease_id, self._shard_of(lease_id), self._schedule.num_steps)
            self._poll_until(lambda: all(i in self._pool.committed for i in wanted))
            chosen = [self._pool.committed.pop(i) for i in wanted]
        else:
            self._top_up()
            chosen: list[Committed] = []
            while len(chosen) < self._leases_per_update:
                self._poll_until(lambda: bool(self._pool.committed))
                oldest = self._pool.committed.pop(next(iter(self._pool.committed)))
                if self._is_usable(oldest):
                    chosen.append(oldest)
                self._top_up(reserved=len(chosen))
        negatives = [self._graph.shards[c.shard].call("take", c.lease_id) for c in chosen]
        return _Consumed(chosen, negatives, time.monotonic() - start)

    def _is_usable(self, lease: Committed) -> bool:
        """Whether the learner may consume `lease` now; if not, do what flow.stale says."""
        lag = self.progress.version - lease.version
        if lag <= self._flow.max_lag or self._flow.stale == "reweight":
            return True
        if self._flow.stale == "drop":
            self._graph.shards[lease.shard].call("release", lease.lease_id)
            self._window.count("flow/dropped", lease.num_chains)
            return False
        steps = self._flow.repair_steps or max(1, self._schedule.num_steps // 4)
        self._pool.start(self._new_lease(), lease.shard, steps, ready_id=lease.lease_id)
        self._window.count("flow/repaired", lease.num_chains)
        return False

    def _top_up(self, reserved: int = 0) -> None:
        """Start rounds while there is credit for them and a worker to run them."""
        while (
            self._pool.outstanding + len(self._pool.committed) + reserved < self._ahead
            and self._pool.has_room
        ):
            lease_id = self._new_lease()
            self._pool.start(lease_id, self._shard_of(lease_id), self._schedule.num_steps)

    def _new_lease(self) -> int:
        lease_id = self.progress.next_lease
        self.progress.next_lease += 1
        return lease_id

    def _shard_of(self, lease_id: int) -> int:
        return lease_id % len(self._graph.shards)

    def _poll_until(self, condition: Callable[[], bool]) -> None:
        last = time.monotonic()
        seen = (self._pool.mcmc_steps, self._pool.num_rejected, self._pool.restarts)
        while not condition():
            self._pool.poll(_POLL_S)
            now = (self._pool.mcmc_steps, self._pool.num_rejected, self._pool.restarts)
            if now != seen:
                seen, last = now, time.monotonic()
            if time.monotonic() - last > self._flow.stall_timeout_s:
                raise RunFailed(
                    f"the learner waited {self._flow.stall_timeout_s:.0f} s for negatives "
                    f"(flow.stall_timeout_s) while {self._pool.outstanding} rounds were with the "
                    "workers; lower sampler.num_steps or workers.num_chains if they are only slow"
                )

    # --- weights ------------------------------------------------------------------------------

    def _publish_current(self) -> None:
        """Hand the weights as they are to the pool, at the start of a run."""
        refs = [rank.call("weights") for rank in self._graph.ranks]
        for ref in refs[1:]:
            self._backend.get(ref, timeout=self._flow.stall_timeout_s)
        self._flat = self._ema = refs[0]
        self._pool.set_weights(self._flat, self.progress.version)

    def _publish(self, flat: Ref, ema: Ref) -> None:
        self.progress.version += 1
        self._flat, self._ema = flat, ema
        self._pool.set_weights(flat, self.progress.version)

    # --- what is seen ---------------------------------------------------------------------------

    def _log(self) -> None:
        steps = self._pool.mcmc_steps
        values = self._window.close(mcmc_steps=steps, idle_s=self._pool.take_idle_seconds())
        values["sampler/temperature"] = self._schedule.temperature
        values["weights/version"] = float(self.progress.version)
        values["fault/restarts"] = float(self._pool.restarts)
        counts = self._pool.counts.values()
        for name in ("free", "leased", "ready", "capacity", "late_checkins", "expired_leases"):
            values[f"buffer/{name}"] = float(sum(c[name] for c in counts))
        if counts:
            values["chain/age_mean"] = sum(c["age_mean"] for c in counts) / len(counts)
        self.metrics.update(values)
        self._graph.hub.call("log", self.progress.step, self.progress.epoch, values)

    def evaluate(self) -> None:
        """Write the sample grid and start the measurements, which are logged when they come."""
        step = self.progress.step
        chains = self.chains(max(self._schedule.num_samples, self._schedule.num_grid))
        picture = self._save_grid(chains[: self._schedule.num_grid], step)
        if picture is not None:
            self._graph.hub.call("images", "samples/chains", step, str(picture))
        if self._graph.evaluator is None:
            return
        self._collect_evaluation(block=True)
        ref = self._graph.evaluator.call("evaluate", step, chains, self._ema)
        self._evaluation = (step, ref)

    def chains(self, num: int) -> np.ndarray:
        """`num` chains as they are now, (num, *event): from the shards, or drawn for the occasion
        where the objective trains without chains."""
        key = self.progress.step
        if self._graph.needs_negatives:
            shards = self._graph.shards
            share = -(-num // len(shards))
            refs = [shard.call("peek", share, key) for shard in shards]
        else:
            worker = self._graph.workers[0]
            refs = [worker.call("sample", num, self._schedule.num_steps, self._ema, key)]
        timeout = self._flow.stall_timeout_s
        pieces = [np.asarray(self._backend.get(ref, timeout)) for ref in refs]
        # Interleaved, so that the first k show every shard.
        order = np.argsort(np.concatenate([np.arange(len(p)) for p in pieces]), kind="stable")
        return np.concatenate(pieces)[order][:num]

    def finish_evaluation(self) -> None:
        """Wait for the measurements under way."""
        self._collect_evaluation(block=True)

    def _collect_evaluation(self, *, block: bool) -> None:
        if self._evaluation is None:
            return
        step, ref = self._evaluation
        if not block and ref not in self._backend.wait([ref], 0.0):
            return
        self._evaluation = None
        try:
            values = self._backend.get(ref, timeout=self._flow.stall_timeout_s)
        except Exception as error:  # a measurement that fails must not cost the run
            self._view.say(f"evaluation at update {step} failed: {str(error).splitlines()[0]}")
            return
        self.metrics.update(values)
        self._graph.hub.call("log", step, self.progress.epoch, values)

    # --- checkpoints ----------------------------------------------------------------------------

    def cut(self, why: str = "") -> Path | None:
        """Write one consistent cut between two updates; on a full disk, say so and go on."""
        timeout = self._flow.stall_timeout_s
        rank_refs = [rank.call("state") for rank in self._graph.ranks]
        shard_refs = [shard.call("snapshot") for shard in self._graph.shards]
        hub = self._backend.get(self._graph.hub.call("info"), timeout)
        ranks = [self._backend.get(ref, timeout) for ref in rank_refs]
        shards = [self._backend.get(ref, timeout) for ref in shard_refs]
        tensors = {"learner": ranks[0]["learner"], "ema": ranks[0]["ema"] or {}}
        tensors |= {f"shard_{i:04d}": shard["arrays"] for i, shard in enumerate(shards)}
        self.progress.mcmc_steps = self._pool.mcmc_steps
        meta = {
            **self._meta,
            "version": self.progress.version,
            "epoch": self.progress.epoch,
            "next_lease": self.progress.next_lease,
            "wall_s": self.progress.wall_s,
            "ranks": [rank["data"] for rank in ranks],
            "shards": [shard["meta"] for shard in shards],
            "tracking": hub,
        }
        step = self.progress.step
        try:
            path = checkpoint.save(self._run_dir, step, tensors, meta, keep=self._schedule.keep)
            manifest = {"format": checkpoint.FORMAT, "latest": path.name, "step": step}
            checkpoint.write_manifest(self._run_dir, {**manifest, "run": self._meta["name"]})
        except OSError as error:
            self._view.say(
                f"checkpoint at update {step} not written ({error.strerror}): {self._run_dir}; "
                "the one before it is still valid, training goes on"
            )
            return None
        self._view.say(f"checkpoint {path.name}" + (f" ({why})" if why else ""))
        return path

    def restore(self, found: checkpoint.CheckpointDir, shard_capacities: list[int]) -> None:
        """Continue from `found`, whatever its numbers of ranks and shards were."""
        meta, timeout = found.meta, self._flow.stall_timeout_s
        learner, ema = found.tensors("learner"), found.tensors("ema") or None
        cursors = meta["ranks"]
        refs = [
            rank.call("load", learner, ema, cursors[i] if i < len(cursors) else cursors[0])
            for i, rank in enumerate(self._graph.ranks)
        ]
        refs += restore_shards(self._graph.shards, found, shard_capacities)
        for ref in refs:
            self._backend.get(ref, timeout)
        self.progress = Progress(
            step=found.step,
            version=int(meta["version"]),
            epoch=int(meta["epoch"]) + 1,
            next_lease=int(meta["next_lease"]),
            wall_s=float(meta["wall_s"]),
        )


def restore_shards(
    shards: list[Handle], found: checkpoint.CheckpointDir, capacities: list[int]
) -> list[Ref]:
    """Deal the chains of the checkpoint out to today's shards, none lost and none doubled.

    Raises:
        RunFailed: they do not fit.
    """
    names = [name for name in found.names if name.startswith("shard_")]
    if not names:
        return []
    saved = [found.arrays(name) for name in names]
    merged = {key: np.concatenate([part[key] for part in saved]) for key in saved[0]}
    total, room = len(merged["generation"]), sum(capacities)
    if total > room:
        raise RunFailed(
            f"the checkpoint holds {total} chains, buffer.capacity has room for {room}; "
            f"set buffer.capacity to {total} or more"
        )
    metas = found.meta["shards"]
    # Chains change shards: an identity given out anywhere must not be given out again.
    next_chain = max(int(meta["next_chain"]) for meta in metas)
    refs, start = [], 0
    for index, (shard, capacity) in enumerate(zip(shards, capacities)):
        stop = min(start + capacity, total)
        arrays = {key: value[start:stop] for key, value in merged.items()}
        cursor = metas[index]["data"] if index < len(metas) else None
        refs.append(shard.call("restore", arrays, {"next_chain": next_chain, "data": cursor}))
        start = stop
    return refs
