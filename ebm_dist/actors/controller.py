"""The training loop: rounds to workers, negatives to learners, weights back, cuts to disk.

Any part but this one may die. Workers are the pool's to replace, the hub and the evaluator their
links'. A learner rank takes the model's last updates with it: the group starts anew from the
last checkpoint. In `sync` mode a shard's death does the same to the whole run, which then
repeats those updates bit for bit; in `async` mode the others do not go back. From numbers that
are not finite everything goes back, and the updates are not repeated but tried with other noise.

Weights are handed out before they have left the learner, which sends them beside its next update.
Every wait looks whether they came: rounds that were given lost ones do not come back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist import checkpoint
from ebm_dist.actors.attempts import Attempts
from ebm_dist.actors.checkpointer import Checkpointer
from ebm_dist.actors.cut import Progress, read_manifest, restore_shards, write_manifest
from ebm_dist.actors.delivery import Delivery
from ebm_dist.actors.elastic import Steward
from ebm_dist.actors.flow import POLL_S, NegativeFlow, RollBack
from ebm_dist.actors.graph import Graph, Schedule, View
from ebm_dist.actors.handles import Handle, PartDied, Ref
from ebm_dist.actors.leaving import RankMover
from ebm_dist.actors.lookout import Lookout
from ebm_dist.actors.moving import Mover
from ebm_dist.actors.pool import RoundPool
from ebm_dist.actors.stall import SHARDS, UPDATES, Stalled, answer
from ebm_dist.actors.window import MetricWindow
from ebm_dist.buffer.policy import FlowConfig
from ebm_dist.errors import NonFinite, RunFailed
from ebm_dist.learner import LearnerConfig, learning_rate

LEAVING_S = 30.0
"""A run that fails waits this long for the checkpoint that is being written."""

RETRY_S = 0.5
"""Between two attempts to go back: what has just died is known to be dead a moment later."""


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
        self._attempts = Attempts()
        self._chains_go_back = False
        """Whether rounds rest until the chains are those of a checkpoint again."""
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
            start_timeout_s=graph.start_timeout_s,
        )
        self._negatives = NegativeFlow(
            graph, schedule, flow, self._pool, self.progress, self._window.count, self._tend
        )
        self._delivery = Delivery(
            graph, schedule, flow, self._pool, self._negatives, self._meanwhile
        )
        self._steward = None
        if graph.elasticity is not None:
            self._steward = Steward(
                self._pool.crew, self._negatives.waits, graph.elasticity, view.say
            )
        self._mover = Mover(graph, self._pool, say=view.say, timeout=flow.stall_timeout_s)
        self._rank_mover = RankMover(
            graph, self.progress, self._attempts, self._wait, self._publish_current, say=view.say
        )
        self._cuts = Checkpointer(
            graph, schedule, run_dir, meta=meta, timeout=flow.stall_timeout_s, say=view.say
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
        while self._flat is None:
            try:
                self._publish_current()
            except PartDied as died:
                self._recover(died)
        self._window.reset()
        try:
            while True:
                try:
                    if self._should_stop():
                        self._cuts.finish(self.progress, f"stopped at update {self.progress.step}")
                        return False
                    if self.progress.step >= self._schedule.num_updates:
                        self._lookout.catch_up(self._flat, self._ema)
                        self._cuts.finish(self.progress)
                        break
                    self._cuts.take_if_due(self.progress)
                    if self.progress.step == 0:  # from here on there is one to go back to
                        self._cuts.settle(self._flow.stall_timeout_s)
                    self._mover.between_updates()
                    self._rank_mover.between_updates()
                    self._update()
                    self.progress.wall_s = time.monotonic() - start
                    self._lookout.observe(self._flat, self._ema)
                except (PartDied, NonFinite) as trouble:
                    self._recover(trouble)
        except TimeoutError as error:
            raise RunFailed(
                f"update {self.progress.step}: a part gave no answer within "
                f"{self._flow.stall_timeout_s:.0f} s (flow.stall_timeout_s): {error}"
            ) from error
        except BaseException:
            # The cut under way is whole, whatever came after it.
            with contextlib.suppress(Exception):
                self._cuts.settle(LEAVING_S)
            raise
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

    def _update(self) -> None:
        step = self.progress.step
        consumed = self._negatives.take_negatives() if self._graph.needs_negatives else None
        if consumed is not None:
            self._delivery.bring(consumed, step)
        lr = learning_rate(self._learner, step, self._schedule.num_updates)
        lr *= self.progress.lr_factor
        learners, auditor = self._graph.learners, self._graph.auditor
        average = self._lookout.reads_average(step + 1)
        replies = learners.update(
            step,
            lr,
            self._schedule.num_negatives,
            consumed.negatives if consumed else None,
            auditor.extra() if auditor and consumed else None,
        )
        began = time.monotonic()
        pending = [*replies, *learners.publishing]  # the weights of the update before, as well
        self._wait(pending, self._flow.stall_timeout_s, each=learners.result)
        waited = time.monotonic() - began
        metrics = learners.result(replies[0])
        flat, ema = learners.publish(average=average)
        self.progress.step += 1
        self._publish(flat, ema if average else self._ema)
        self._window.add_update(metrics)
        self._window.add_wait(consumed.wait_s if consumed else 0.0, waited)
        if consumed is not None:
            self._window.add_lag([consumed.version - lease.version for lease in consumed.leases])
            for lease in consumed.leases:
                self._window.add_round(lease.stats)
        self._view.update(
            self.progress.step, {**self._lookout.metrics, **metrics}, self._window.bottleneck()
        )
        if average:  # these are read now, the last of a run as well: they must have come
            learners.settle(self._wait)

    def _wait(
        self, refs: Sequence[Ref], timeout: float, *, each: Callable[[Ref], Any] | None = None
    ) -> None:
        """Keep rounds going until `refs` are done; `each` sees them as they come.

        Raises:
            Stalled: they were not done in `timeout` seconds.
        """
        start = time.monotonic()
        pending = list(refs)
        while pending:
            done = self._pool.poll(POLL_S, *pending)
            self._meanwhile()
            for ref in done:
                if each is not None:
                    each(ref)
            pending = [ref for ref in pending if ref not in done]
            if time.monotonic() - start > timeout:
                raise Stalled(UPDATES, timeout, f"update {self.progress.step}")

    def _ask_shard(self, ref: Ref, what: str) -> Any:
        detail = f"update {self.progress.step}: a shard was told {what}"
        return answer(self._backend, ref, self._flow.stall_timeout_s, SHARDS, detail)

    def _meanwhile(self) -> None:
        """What goes on while something is waited for."""
        self._tend()
        ahead = self._flow.mode == "async" and self._graph.needs_negatives
        if ahead and not self._chains_go_back:
            self._negatives.top_up()

    def _tend(self) -> None:
        self._graph.learners.look()
        if self._steward is not None:
            self._steward.tend()

    # --- weights ------------------------------------------------------------------------------

    def _publish_current(self) -> None:
        """Hand the weights as they are to the pool, at the start of a run."""
        self._flat = self._ema = self._graph.learners.weights(self._wait)
        self._pool.set_weights(self._flat, self.progress.version)

    def _publish(self, flat: Ref, ema: Ref) -> None:
        self.progress.version += 1
        self._flat, self._ema = flat, ema
        self._pool.set_weights(flat, self.progress.version)

    # --- going back -----------------------------------------------------------------------------

    def restore(self, found: checkpoint.CheckpointDir) -> None:
        """Continue from `found`, whatever its numbers of ranks and shards were."""
        # First: it names the noise of this attempt. In place: the flow of negatives holds it.
        self.progress.resume(found.step, found.meta, read_manifest(self._run_dir))
        self._attempts.reached(found.step)
        self._cuts.stands_at(found.step)
        try:
            self._load_learners(found)
            self._load_shards(found)
        except PartDied as died:
            self._chains_go_back = True
            self._recover(RollBack(f"while the run was restored: {died}"))

    def _load_learners(self, found: checkpoint.CheckpointDir) -> None:
        learner, ema = found.tensors("learner"), found.tensors("ema") or None
        self._graph.learners.load(
            learner, ema, found.meta["ranks"], self._wait, attempt=self.progress.rollbacks
        )

    def _load_shards(self, found: checkpoint.CheckpointDir) -> None:
        refs = restore_shards(self._graph.shards, found, self._graph.capacities)
        for ref in refs:
            self._ask_shard(ref, "to take the chains of a checkpoint")

    def _recover(self, trouble: PartDied | NonFinite) -> None:
        """Replace what is dead, and go back to the last checkpoint where state was lost or is
        worth nothing.

        Raises:
            NonFinite: learner.on_nonfinite says so, or it happened too often.
            RunFailed: parts died too often without a new update between.
        """
        self._attempts.reached(self.progress.step)
        back = False
        while True:
            if isinstance(trouble, NonFinite):
                self._try_otherwise(trouble)
            else:
                self._attempts.failed(trouble)
            back = back or isinstance(trouble, RollBack | NonFinite)
            try:
                if back or self._graph.learners.lost():
                    self._attempts.begin_start()
                    self._go_back(trouble)
                    self._attempts.started()
                self._pool.check()
                return
            except (PartDied, NonFinite) as again:
                trouble = again
                time.sleep(RETRY_S)

    def _try_otherwise(self, trouble: NonFinite) -> None:
        """Count a roll-back from `trouble`; the next attempt has other noise and a smaller rate."""
        learner, progress = self._learner, self.progress
        if learner.on_nonfinite == "stop":
            raise trouble
        if progress.rollbacks >= learner.max_rollbacks:
            raise NonFinite(
                f"{trouble}. The run went back {progress.rollbacks} times already "
                "(learner.max_rollbacks)"
            ) from trouble
        progress.rollbacks += 1
        progress.lr_factor *= learner.rollback_lr_factor
        progress.next_lease = max(progress.next_lease, progress.lease_of(0))
        self._chains_go_back = True

    def _go_back(self, trouble: PartDied | NonFinite) -> None:
        """Continue from the last checkpoint: the learners, and the chains as well in sync mode
        and where they are worth nothing."""
        start = time.monotonic()
        self._chains_go_back = self._chains_go_back or self._flow.mode == "sync"
        if self._chains_go_back:
            self._pool.forget_all()
        found = self._cuts.latest()
        untouched = not self._chains_go_back or self._pool.num_started == 0
        if found is None and self.progress.step == 0 and untouched:
            # Nothing is learnt or moved yet: ranks and chains begin with what the seed gives them.
            self._graph.learners.rebuild(self._wait)
            self._replace_dead_shards()
            self._chains_go_back = False
            self._publish_current()
            self._pool.redo_lost()
            return
        if found is None:
            raise RunFailed(f"{trouble}, and there is no checkpoint to go back to") from trouble
        lost = self.progress.step - found.step
        what = " and ".join(self._graph.learners.dead())
        why = f"{what} died ({trouble})" if what else str(trouble)
        self._view.say(f"{why}: going back {lost} updates to {found.path.name}")
        if self._graph.learners.lost():
            self._graph.learners.rebuild(self._wait)
        self._load_learners(found)
        if self._chains_go_back:
            self._replace_dead_shards()
            self._load_shards(found)
            self._chains_go_back = False
        progress = self.progress
        progress.step, progress.epoch = found.step, progress.epoch + 1
        # The counter goes on: a lag is a difference of versions, and never negative.
        progress.version += 1
        self._cuts.stands_at(found.step)
        write_manifest(self._run_dir, found.path.name, progress, self._meta["name"])
        self._publish_current()
        self._pool.redo_lost()
        rate = f", learning rate x {progress.lr_factor:g}" if progress.rollbacks else ""
        seconds = time.monotonic() - start
        self._view.say(f"the learners go on after {seconds:.1f} s{rate}")

    def _replace_dead_shards(self) -> None:
        for index, shard in enumerate(self._graph.shards):
            if not self._backend.alive(shard):
                # What it asks for, to go back as a whole, is under way.
                with contextlib.suppress(RollBack):
                    self._pool.replace_shard(index, "its process is gone")

    def _respawn_shard(self, index: int) -> Handle:
        """A process that takes over the chains of shard `index`, or what the last cut had."""
        start = time.monotonic()
        shard = self._graph.shards[index] = self._graph.respawn_shard(index)
        if self._flow.mode == "sync":
            raise RollBack(f"shard {index} died with the leases of this update")
        status = self._ask_shard(shard.call("status"), "to take its chains over")
        what = f"all {status['counts']['capacity']} chains"
        if not status["attached"]:
            found = self._cuts.latest()
            refs = restore_shards(self._graph.shards, found, self._graph.capacities, only=index)
            for ref in refs:
                self._ask_shard(ref, "to take the chains of a checkpoint")
            what = f"{status['counts']['capacity']} chains rolled back to update " + (
                str(found.step) if found is not None and refs else "0"
            )
        self._view.say(f"{shard.name} is back with {what} after {time.monotonic() - start:.1f} s")
        return shard

    def _on_rejected(self, shard: int) -> None:
        # Drawn again, the lease would have other slots than in a run where nothing was late.
        if self._flow.mode == "sync":
            raise RollBack(f"shard {shard} refused a round of this update (it came too late)")
