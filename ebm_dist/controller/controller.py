"""The training loop: rounds to workers, negatives to learners, weights back, cuts to disk.

Any part but this one may die. Workers and shards are the scheduler's to replace, the hub and the
evaluator their links'; `recovery.py` has what follows for the learners.

Weights are handed out before they have left the learner, which sends them beside its next update.
Every wait looks whether they came: rounds that were given lost ones do not come back.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import PartDied, Ref, T
from ebm_dist.cluster.halt import GRACE_S, IDLE_GRACE_S, Halted
from ebm_dist.config.run_config import RunConfig
from ebm_dist.controller.checkpointer import Checkpointer
from ebm_dist.controller.draining.ranks import RankMover
from ebm_dist.controller.draining.shards import ShardMover
from ebm_dist.controller.negatives import MODES
from ebm_dist.controller.negatives.delivery import Delivery
from ebm_dist.controller.negatives.source import POLL_S
from ebm_dist.controller.observers.callbacks import Callbacks
from ebm_dist.controller.observers.metric_window import SKIPPED, MetricWindow
from ebm_dist.controller.observers.monitor import Monitor
from ebm_dist.controller.parts import Parts, View
from ebm_dist.controller.recovery import TROUBLE, Recovery, Trouble
from ebm_dist.controller.retry import Attempts
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.controller.workers.autoscaler import Autoscaler
from ebm_dist.core.errors import NonFinite, RunFailed
from ebm_dist.learner import learning_rate

log = logging.getLogger("ebm_dist.run")

LEAVING_S = 30.0
"""A run that fails waits this long for the checkpoint that is being written."""


class Controller:
    """Runs in the driver process and owns the weight references: a learner that dies takes
    no weights with it."""

    def __init__(
        self,
        parts: Parts,
        config: RunConfig,
        *,
        run_dir: Path,
        view: View,
        meta: dict[str, Any],
        save_grid: Callable[[np.ndarray, int], Path | None],
        callbacks: Callbacks,
    ) -> None:
        self.progress = Progress()
        self._parts = parts
        self._config = config
        self._flow = flow = config.flow
        self._run_dir = run_dir
        self._view = view
        self._callbacks = callbacks
        self._halt = parts.backend.halt
        self._window = MetricWindow()
        self._flat: Ref[np.ndarray] | None = None
        self._ema: Ref[np.ndarray] | None = None
        self._is_whole = True
        """Whether the parts stand where a checkpoint can be taken: no update has half begun."""
        attempts = Attempts()
        self._cuts = Checkpointer(
            parts,
            config.checkpoint,
            run_dir,
            meta=meta,
            timeout=flow.stall_timeout_s,
            on_checkpoint=callbacks.on_checkpoint,
        )
        self._recovery = Recovery(
            parts,
            flow,
            config.learner,
            self.progress,
            attempts,
            self._cuts,
            wait=self._wait,
            publish=self._publish_current,
            run_dir=run_dir,
            name=meta["name"],
        )
        self._scheduler = RoundScheduler(
            parts.backend,
            parts.shards,
            parts.workers,
            on_replaced=self._recovery.on_replaced,
            on_rejected=self._recovery.on_rejected,
            num_chains=config.workers.num_chains,
            depth=2,
            hang_s=2.0 * parts.lease_timeout_s,
        )
        self._negatives = MODES[flow.mode](
            parts.backend,
            parts.shards,
            flow,
            self._scheduler,
            self.progress,
            self._window.count,
            self._tend,
            num_negatives=config.num_negatives,
            num_chains=config.workers.num_chains,
            num_steps=config.sampler.num_steps,
        )
        self._recovery.serve(self._scheduler, self._negatives)
        self._delivery = Delivery(
            parts.backend,
            parts.learners,
            self._scheduler,
            self._negatives,
            self._meanwhile,
            num_negatives=config.num_negatives,
            timeout=flow.stall_timeout_s,
        )
        self._autoscaler = None
        if parts.elasticity is not None:
            self._autoscaler = Autoscaler(
                self._scheduler.workers, self._negatives.waits, parts.elasticity
            )
        self._mover = ShardMover(
            parts.backend,
            parts.shards,
            parts.relocation,
            self._scheduler,
            timeout=flow.stall_timeout_s,
        )
        self._rank_mover = RankMover(
            parts.backend,
            parts.learners,
            parts.relocation,
            self.progress,
            attempts,
            self._wait,
            self._publish_current,
        )
        self._monitor = Monitor(
            parts,
            config,
            self._scheduler,
            self.progress,
            self._window,
            timeout=flow.stall_timeout_s,
            save_grid=save_grid,
            on_evaluation=callbacks.on_evaluation,
        )

    # --- the loop -----------------------------------------------------------------------------

    def restore(self, found: checkpoint.CheckpointDir) -> None:
        """Continue from `found`, whatever its numbers of ranks and shards were."""
        self._recovery.restore(found)

    def run(self) -> bool:
        """Train to the last update; returns False if told to stop before it.

        Raises:
            RunFailed: it cannot be gone on with. What could be kept is in a checkpoint.
        """
        start = time.monotonic() - self.progress.wall_s
        try:
            while self._flat is None:
                try:
                    self._publish_current()
                except TROUBLE as trouble:
                    self._recover(trouble)
            self._window.reset()
            while True:
                try:
                    if self._halt.due:
                        why = f"{self._callbacks.why_stopped} at update {self.progress.step}"
                        self._cuts.finish(self.progress, why)
                        break
                    if self.progress.step >= self._config.run.steps:
                        self._monitor.catch_up(*self._weights)
                        self._cuts.finish(self.progress)
                        self._monitor.finish()
                        return True
                    self._cuts.take_if_due(self.progress)
                    if self.progress.step == 0:  # from here on there is one to go back to
                        self._cuts.settle(self._flow.stall_timeout_s)
                    self._is_whole = False  # of a part that moves, two have half of what it holds
                    self._mover.between_updates()
                    self._rank_mover.between_updates()
                    self._update()
                    self.progress.wall_s = time.monotonic() - start
                    self._monitor.observe(*self._weights)
                except TROUBLE as trouble:
                    self._recover(trouble)
        except TimeoutError as error:
            raise RunFailed(
                f"update {self.progress.step}: a part gave no answer within "
                f"{self._flow.stall_timeout_s:.0f} s (flow.stall_timeout_s): {error}"
            ) from error
        except Halted:
            self._keep_what_is_whole()
        except BaseException:
            # The cut under way is whole, whatever came after it.
            with contextlib.suppress(Exception):
                self._cuts.settle(LEAVING_S)
            raise
        if (why := self._halt.ailing()) is not None:
            raise RunFailed(why)
        return False

    def _recover(self, trouble: Trouble) -> None:
        self._is_whole = False
        self._recovery.recover(trouble)
        self._is_whole = True

    def _keep_what_is_whole(self) -> None:
        """Take a checkpoint of a run that ends within a wait, where the parts still allow it."""
        step = self.progress.step
        try:
            if self._is_whole:
                why = f"{self._callbacks.why_stopped} at update {step}"
                self._cuts.finish(self.progress, why)
            else:
                log.info(f"stopped within update {step}: it is repeated from its checkpoint")
                self._cuts.settle(LEAVING_S)
        except (PartDied, Halted, NonFinite, RunFailed) as trouble:
            log.info(f"stopped at update {step}, without a checkpoint of it: {trouble}")

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return self._monitor.metrics

    def evaluate(self) -> None:
        """Measure the weights as they are, and wait for it."""
        self._monitor.finish()
        self._monitor.evaluate(*self._weights)
        self._monitor.finish()

    def _update(self) -> None:
        step = self.progress.step
        # Of an exact one the rounds move the chains that a repetition would have to begin with.
        self._is_whole = not self._negatives.exact
        consumed = self._negatives.take_negatives() if self._parts.needs_negatives else None
        if consumed is not None:
            self._delivery.bring(consumed, step)
        lr = learning_rate(self._config.learner, step, self._config.run.steps)
        lr *= self.progress.lr_factor
        learners, auditor = self._parts.learners, self._parts.auditor
        average = self._monitor.reads_average(step + 1)
        self._is_whole = False
        replies = learners.update(
            step,
            lr,
            self._config.num_negatives,
            consumed.negatives if consumed else None,
            auditor.extra() if auditor and consumed else None,
        )
        began = time.monotonic()
        pending = [*replies, *learners.publishing]  # the weights of the update before, as well
        self._wait(pending, self._flow.stall_timeout_s, each=learners.result)
        waited = time.monotonic() - began
        metrics = dict(learners.result(replies[0]))
        if metrics.pop(SKIPPED, None) is not None:  # each rank's own, where they may be left out
            skipped = sum(learners.result(reply)[SKIPPED] for reply in replies)
            self._window.count(SKIPPED, int(skipped))
        flat, ema = learners.publish(average=average)
        self.progress.step += 1
        self._is_whole = True
        self._publish(flat, ema if average else self._ema)
        self._window.add_update(metrics)
        self._window.add_wait(consumed.wait_s if consumed else 0.0, waited)
        if consumed is not None:
            self._window.add_lag([consumed.version - lease.version for lease in consumed.leases])
            for lease in consumed.leases:
                self._window.add_round(lease.stats)
        latest = {**self._monitor.metrics, **metrics}
        self._view.update(self.progress.step, latest, self._window.bottleneck())
        self._callbacks.on_update(self.progress.step, latest)
        if average:  # these are read now, the last of a run as well: they must have come
            learners.settle(self._wait)

    def _wait(
        self,
        refs: Sequence[Ref[T]],
        timeout: float,
        *,
        each: Callable[[Ref[T]], object] | None = None,
    ) -> None:
        """Keep rounds going until `refs` are done; `each` sees them as they come.

        Raises:
            PartDied: they were not done in `timeout` seconds, so that the learners are replaced.
        """
        start = time.monotonic()
        pending = list(refs)
        while pending:
            done = self._scheduler.poll(POLL_S, *pending)
            self._meanwhile()
            for ref in done:
                if each is not None:
                    each(ref)
            pending = [ref for ref in pending if ref not in done]
            if pending and time.monotonic() - start > timeout:
                self._parts.learners.broken = True
                raise PartDied(
                    f"update {self.progress.step}: the learner ranks gave no answer for "
                    f"{timeout:.0f} s; raise flow.stall_timeout_s if an update is only slow, or "
                    "runtime.start_timeout_s if a start is"
                )

    def _meanwhile(self) -> None:
        """What goes on while something is waited for."""
        self._tend()
        if self._parts.needs_negatives and not self._recovery.chains_go_back:
            self._negatives.top_up()

    def _tend(self) -> None:
        self._halt.check(grace_s=IDLE_GRACE_S if self._is_whole else GRACE_S)
        self._parts.learners.look()
        if self._autoscaler is not None:
            self._autoscaler.tend()

    # --- weights ------------------------------------------------------------------------------

    @property
    def _weights(self) -> tuple[Ref[np.ndarray], Ref[np.ndarray]]:
        """The flat weights and the averaged ones, once they have been published."""
        assert self._flat is not None
        assert self._ema is not None
        return self._flat, self._ema

    def _publish_current(self) -> None:
        """Hand the weights as they are to the workers, at the start of a run."""
        self._flat = self._ema = self._parts.learners.weights(self._wait)
        self._scheduler.set_weights(self._flat, self.progress.version)

    def _publish(self, flat: Ref[np.ndarray], ema: Ref[np.ndarray] | None) -> None:
        self.progress.version += 1
        self._flat, self._ema = flat, ema
        self._scheduler.set_weights(flat, self.progress.version)
