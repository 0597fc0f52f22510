"""The training loop: rounds to workers, negatives to learners, weights back, cuts to disk.

Any part but this one may die. Workers are the pool's to replace, the hub and the evaluator their
links'. A learner rank takes the model's last updates with it: the group starts anew from the
last checkpoint. In `sync` mode a shard's death does the same to the whole run, which then
repeats those updates bit for bit; in `async` mode the others do not go back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist import checkpoint
from ebm_dist.actors.cut import (
    Progress,
    read_manifest,
    restore_shards,
    write_cut,
    write_manifest,
)
from ebm_dist.actors.flow import POLL_S, NegativeFlow, RollBack
from ebm_dist.actors.graph import Graph, Schedule, View
from ebm_dist.actors.handles import Handle, PartDied, Ref
from ebm_dist.actors.lookout import Lookout
from ebm_dist.actors.pool import MAX_ATTEMPTS, RoundPool
from ebm_dist.actors.window import MetricWindow
from ebm_dist.buffer.policy import FlowConfig
from ebm_dist.errors import RunFailed
from ebm_dist.learner import LearnerConfig, learning_rate


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
        self._graph = graph
        self._schedule = schedule
        self._flow = flow
        self._learner = learner
        self._run_dir = run_dir
        self._view = view
        self._should_stop = should_stop
        self._meta = meta
        self._backend = graph.backend
        self._window = MetricWindow()
        self._flat: Ref = None
        self._ema: Ref = None
        self._last_cut = -1
        self._farthest = 0
        self._failures = 0
        self._pool = RoundPool(
            graph.backend,
            graph.shards,
            graph.workers,
            respawn_worker=graph.respawn_worker,
            respawn_shard=self._respawn_shard,
            on_rejected=self._on_rejected,
            say=view.say,
            num_chains=schedule.num_chains,
            depth=2,
            hang_s=2.0 * graph.lease_timeout_s,
        )
        self._negatives = NegativeFlow(
            graph, schedule, flow, self._pool, self.progress, self._window.count
        )
        self._lookout = Lookout(
            graph,
            schedule,
            self._pool,
            self.progress,
            self._window,
            timeout=flow.stall_timeout_s,
            save_grid=save_grid,
        )

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the last update; returns False if told to stop before it."""
        start = time.monotonic() - self.progress.wall_s
        self._publish_current()
        self._window.reset()
        while True:
            try:
                if self._should_stop():
                    self.cut(f"stopped at update {self.progress.step}")
                    return False
                # At update 0 as well: whatever dies before the second cut has one to go back to.
                if self._cut_is_due():
                    self.cut()
                if self.progress.step >= self._schedule.num_updates:
                    break
                self._update()
                self.progress.wall_s = time.monotonic() - start
                self._lookout.observe(self._flat, self._ema)
            except PartDied as died:
                self._recover(died)
            except TimeoutError as error:
                raise RunFailed(
                    f"update {self.progress.step}: a part gave no answer within "
                    f"{self._flow.stall_timeout_s:.0f} s (flow.stall_timeout_s): {error}"
                ) from error
        self._lookout.finish()
        return True

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return self._lookout.metrics

    def evaluate(self) -> None:
        """Measure the weights as they are, and wait for it."""
        self._lookout.evaluate(self._flat, self._ema)
        self._lookout.finish()

    def _cut_is_due(self) -> bool:
        step = self.progress.step
        due = step % self._schedule.checkpoint_every == 0 or step >= self._schedule.num_updates
        return due and step != self._last_cut

    def _update(self) -> None:
        step = self.progress.step
        consumed = self._negatives.take_negatives() if self._graph.needs_negatives else None
        lr = learning_rate(self._learner, step, self._schedule.num_updates)
        learners = self._graph.learners
        auditor = self._graph.auditor
        replies = learners.update(
            step,
            lr,
            self._schedule.batch_size,
            consumed.negatives if consumed else None,
            auditor.extra() if auditor and consumed else None,
        )
        began = time.monotonic()
        self._wait(
            [reply[0] for reply in replies], self._flow.stall_timeout_s, each=learners.result
        )
        waited = time.monotonic() - began
        metrics = learners.result(replies[0][0])
        self.progress.step += 1
        self._publish(replies[0][1], replies[0][2])
        self._window.add_update(metrics)
        self._window.add_wait(consumed.wait_s if consumed else 0.0, waited)
        if consumed is not None:
            self._window.add_lag([consumed.version - lease.version for lease in consumed.leases])
            for lease in consumed.leases:
                self._window.add_round(lease.stats)
        self._view.update(
            self.progress.step, {**self._lookout.metrics, **metrics}, self._window.bottleneck()
        )

    def _wait(
        self,
        refs: Sequence[Ref],
        timeout: float,
        *,
        each: Callable[[Ref], Any] | None = None,
    ) -> None:
        """Keep rounds going until `refs` are done; `each` sees them as they come.

        Raises:
            RunFailed: they were not done in `timeout` seconds.
        """
        start = time.monotonic()
        pending = list(refs)
        while pending:
            done = self._pool.poll(POLL_S, *pending)
            for ref in done:
                if each is not None:
                    each(ref)
            pending = [ref for ref in pending if ref not in done]
            if self._flow.mode == "async" and self._graph.needs_negatives:
                self._negatives.top_up()
            if time.monotonic() - start > timeout:
                raise RunFailed(
                    f"update {self.progress.step}: the learner ranks gave no answer within "
                    f"{timeout:.0f} s (flow.stall_timeout_s)"
                )

    # --- weights ------------------------------------------------------------------------------

    def _publish_current(self) -> None:
        """Hand the weights as they are to the pool, at the start of a run."""
        self._flat = self._ema = self._graph.learners.weights(self._wait)
        self._pool.set_weights(self._flat, self.progress.version)

    def _publish(self, flat: Ref, ema: Ref) -> None:
        self.progress.version += 1
        self._flat, self._ema = flat, ema
        self._pool.set_weights(flat, self.progress.version)

    # --- checkpoints ----------------------------------------------------------------------------

    def cut(self, why: str = "") -> Path | None:
        """Write one consistent cut between two updates; on a full disk, say so and go on."""
        progress, timeout = self.progress, self._flow.stall_timeout_s
        shard_refs = [shard.call("snapshot") for shard in self._graph.shards]
        ranks = self._graph.learners.state(self._wait)
        shards = [self._backend.get(ref, timeout) for ref in shard_refs]
        # A part that dies up to here has this cut tried again; a disk that refuses does not.
        self._last_cut = progress.step
        meta = {**self._meta, "tracking": self._graph.hub.info(60.0)}
        try:
            path = write_cut(self._run_dir, progress, ranks, shards, meta, keep=self._schedule.keep)
        except OSError as error:
            self._view.say(
                f"checkpoint at update {progress.step} not written ({error.strerror}): "
                f"{self._run_dir}; the one before it is still valid, training goes on"
            )
            return None
        self._view.say(f"checkpoint {path.name}" + (f" ({why})" if why else ""))
        return path

    def restore(self, found: checkpoint.CheckpointDir) -> None:
        """Continue from `found`, whatever its numbers of ranks and shards were."""
        self._load_learners(found)
        self._load_shards(found)
        newest = read_manifest(self._run_dir)
        # In place: the flow of negatives holds the same object.
        progress = self.progress
        progress.step, progress.next_lease = found.step, int(found.meta["next_lease"])
        # Those of the manifest were given out by an attempt that then went back.
        progress.version = max(int(found.meta["version"]), newest.get("version", 0))
        progress.epoch = max(int(found.meta["epoch"]), newest.get("epoch", 0)) + 1
        progress.wall_s = float(found.meta["wall_s"])
        self._farthest = self._last_cut = found.step

    def _load_learners(self, found: checkpoint.CheckpointDir) -> None:
        learner, ema = found.tensors("learner"), found.tensors("ema") or None
        self._graph.learners.load(learner, ema, found.meta["ranks"], self._wait)

    def _load_shards(self, found: checkpoint.CheckpointDir) -> None:
        refs = restore_shards(self._graph.shards, found, self._graph.capacities)
        for ref in refs:
            self._backend.get(ref, self._flow.stall_timeout_s)

    # --- when parts die -------------------------------------------------------------------------

    def _recover(self, died: PartDied) -> None:
        """Replace what is dead, and go back to the last checkpoint where state was lost.

        Raises:
            RunFailed: it happened `MAX_ATTEMPTS` times without a new update between.
        """
        if self.progress.step > self._farthest:
            self._farthest, self._failures = self.progress.step, 0
        back = isinstance(died, RollBack)
        while True:
            self._failures += 1
            if self._failures > MAX_ATTEMPTS:
                raise RunFailed(
                    f"update {self._farthest} was not reached in {MAX_ATTEMPTS} attempts; the "
                    f"last one ended with: {died}"
                ) from died
            try:
                if back or self._graph.learners.lost():
                    self._go_back(died)
                self._pool.check()
                return
            except PartDied as again:
                died, back = again, back or isinstance(again, RollBack)

    def _go_back(self, died: PartDied) -> None:
        """Continue from the last checkpoint: the learners, and in sync mode the chains as well."""
        start = time.monotonic()
        found = checkpoint.latest(self._run_dir)
        if found is None:
            raise RunFailed(f"{died}, and there is no checkpoint to go back to") from died
        lost = self.progress.step - found.step
        what = " and ".join(self._graph.learners.dead())
        why = f"{what} died ({died})" if what else str(died)
        self._view.say(f"{why}: going back {lost} updates to {found.path.name}")
        if self._flow.mode == "sync":
            self._pool.forget_all()
        if self._graph.learners.lost():
            self._graph.learners.rebuild(self._wait)
        self._load_learners(found)
        if self._flow.mode == "sync":
            self._load_shards(found)
        progress = self.progress
        progress.step, progress.epoch = found.step, progress.epoch + 1
        # The counter goes on: a lag is a difference of versions, and never negative.
        progress.version += 1
        self._last_cut = found.step
        write_manifest(self._run_dir, found.path.name, progress, self._meta["name"])
        self._publish_current()
        self._view.say(f"the learners go on after {time.monotonic() - start:.1f} s")

    def _respawn_shard(self, index: int) -> Handle:
        """A process that takes over the chains of shard `index`, or what the last cut had."""
        start = time.monotonic()
        shard = self._graph.shards[index] = self._graph.respawn_shard(index)
        if self._flow.mode == "sync":
            raise RollBack(f"shard {index} died with the leases of this update")
        status = self._backend.get(shard.call("status"), self._flow.stall_timeout_s)
        what = f"all {status['counts']['capacity']} chains"
        if not status["attached"]:
            found = checkpoint.latest(self._run_dir)
            refs = restore_shards(self._graph.shards, found, self._graph.capacities, only=index)
            for ref in refs:
                self._backend.get(ref, self._flow.stall_timeout_s)
            what = f"{status['counts']['capacity']} chains rolled back to update " + (
                str(found.step) if found is not None and refs else "0"
            )
        self._view.say(f"{shard.name} is back with {what} after {time.monotonic() - start:.1f} s")
        return shard

    def _on_rejected(self, shard: int) -> None:
        # Drawn again, the lease would have other slots than in a run where nothing was late.
        if self._flow.mode == "sync":
            raise RollBack(f"shard {shard} refused a round of this update (it came too late)")
