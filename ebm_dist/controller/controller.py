"""The training loop: rounds to workers, negatives to learners, weights to workers, checkpoints.

Any part except the controller may die. The scheduler replaces workers and shards, the links replace
the hub, the evaluator and the auditor, and `recovery.py` restores the learners.

Workers get the reference of new weights before the learner has sent them, which it does during its
next update. Every wait checks that they arrive, since rounds under lost weights never return.
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
from ebm_dist.core.types import ChainSample
from ebm_dist.learner import learning_rate

log = logging.getLogger("ebm_dist.run")

LAST_WRITE_S = 30.0
"""Longest time that a failing run waits for the checkpoint in progress."""


class Controller:
    """Runs in the driver process and owns the weight references, so that published weights survive
    the death of a learner."""

    def __init__(
        self,
        parts: Parts,
        config: RunConfig,
        *,
        run_dir: Path,
        view: View,
        meta: dict[str, Any],
        save_grid: Callable[[ChainSample, str, int], Path | None],
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
        self._is_consistent = True
        """Whether a checkpoint can be taken: no update or move is half done."""
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
            self._check_parts,
            num_negatives=config.num_negatives,
            num_chains=config.workers.num_chains,
            num_steps=config.sampler.num_steps,
        )
        self._recovery.connect(self._scheduler, self._negatives)
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
            draws_extremes=meta["event"]["kind"] == "image",
            on_evaluation=callbacks.on_evaluation,
        )

    # --- the loop -----------------------------------------------------------------------------

    def restore(self, found: checkpoint.CheckpointDir) -> None:
        """Continue from `found`, of any number of ranks and shards."""
        self._recovery.restore(found)
        self._monitor.alerts.rollbacks = self.progress.rollbacks

    def run(self) -> bool:
        """Train to the last update; return False if stopped before it.

        Raises:
            RunFailed: the run cannot continue. A checkpoint holds what could be saved.
        """
        start = time.monotonic() - self.progress.wall_s
        try:
            while self._flat is None:
                try:
                    self._publish_current()
                except TROUBLE as trouble:
                    self._recover(trouble)
            if self._parts.needs_negatives and self._config.sampler.engine == "compiled":
                waits = "the first round waits for it"
                if self._flow.mode == "async":
                    waits = "rounds run in single steps until it is done"
                log.info(f"sampler.engine: compiled compiles the steps now, and {waits}")
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
                    if self.progress.step == 0:  # recovery needs a checkpoint to return to
                        self._cuts.settle(self._flow.stall_timeout_s)
                    self._is_consistent = False  # a part that moves is split over two processes
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
            self._save_if_consistent()
        except BaseException:
            # The checkpoint in progress is valid, whatever failed after it was taken.
            with contextlib.suppress(Exception):
                self._cuts.settle(LAST_WRITE_S)
            raise
        if (why := self._halt.ailing()) is not None:
            raise RunFailed(why)
        return False

    def _recover(self, trouble: Trouble) -> None:
        self._is_consistent = False
        self._recovery.recover(trouble)
        self._is_consistent = True

    def _save_if_consistent(self) -> None:
        """Take a checkpoint of a run that was stopped during a wait, if its state is consistent."""
        step = self.progress.step
        try:
            if self._is_consistent:
                why = f"{self._callbacks.why_stopped} at update {step}"
                self._cuts.finish(self.progress, why)
            else:
                log.info(f"stopped during update {step}: a resumed run goes back to a checkpoint")
                self._cuts.settle(LAST_WRITE_S)
        except (PartDied, Halted, NonFinite, RunFailed) as trouble:
            log.info(f"stopped at update {step}, without a checkpoint of this update: {trouble}")

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return self._monitor.metrics

    @property
    def evaluation_s(self) -> float:
        """Seconds that this attempt has waited for evaluations."""
        return self._monitor.evaluation_s

    def evaluate(self) -> None:
        """Evaluate the current weights and wait for the result."""
        self._monitor.finish()
        self._monitor.evaluate(*self._weights)
        self._monitor.finish()

    def _update(self) -> None:
        step = self.progress.step
        # In an exact mode these rounds move chains whose present state a repeated update needs.
        self._is_consistent = not self._negatives.exact
        consumed = self._negatives.take_negatives() if self._parts.needs_negatives else None
        if consumed is not None:
            self._delivery.bring(consumed, step)
        lr = learning_rate(self._config.learner, step, self._config.run.steps)
        lr *= self.progress.lr_factor
        learners, auditor = self._parts.learners, self._parts.auditor
        average = self._monitor.reads_average(step + 1)
        self._is_consistent = False
        replies = learners.update(
            step,
            lr,
            self._config.num_negatives,
            consumed.negatives if consumed else None,
            auditor.extra() if auditor and consumed else None,
        )
        began = time.monotonic()
        pending = [*replies, *learners.publishing]  # with the weights of the update before
        self._wait(pending, self._flow.stall_timeout_s, each=learners.result)
        waited = time.monotonic() - began
        metrics = dict(learners.result(replies[0]))
        if metrics.pop(SKIPPED, None) is not None:  # each rank counts its own
            skipped = sum(learners.result(reply)[SKIPPED] for reply in replies)
            self._window.count(SKIPPED, int(skipped))
        flat, ema = learners.publish(average=average)
        self.progress.step += 1
        self._is_consistent = True
        self._publish(flat, ema if average else self._ema)
        self._window.add_update(metrics)
        self._window.add_wait(consumed.wait_s if consumed else 0.0, waited)
        if consumed is not None:
            self._window.add_lag([consumed.version - lease.version for lease in consumed.leases])
            for lease in consumed.leases:
                self._window.add_round(lease.stats)
        latest = {**self._monitor.metrics, **metrics}
        num_compiling = self._scheduler.workers.members.num_compiling
        self._view.update(self.progress.step, latest, self._window.bottleneck(), num_compiling)
        self._callbacks.on_update(self.progress.step, latest)
        if average:  # they are read now, also after the last update
            learners.settle(self._wait)

    def _wait(
        self,
        refs: Sequence[Ref[T]],
        timeout: float,
        *,
        each: Callable[[Ref[T]], object] | None = None,
    ) -> None:
        """Keep rounds going until `refs` are done; call `each` with each as it finishes.

        Raises:
            PartDied: not done in `timeout` seconds. The learners are then replaced.
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
        """Check the parts and start further rounds, during every wait."""
        self._check_parts()
        if self._parts.needs_negatives and not self._recovery.chains_go_back:
            self._negatives.top_up()

    def _check_parts(self) -> None:
        """Check for a halt and for published weights, and adjust the worker pool."""
        self._halt.check(grace_s=IDLE_GRACE_S if self._is_consistent else GRACE_S)
        self._parts.learners.check_published()
        if self._autoscaler is not None:
            self._autoscaler.adjust()

    # --- weights ------------------------------------------------------------------------------

    @property
    def _weights(self) -> tuple[Ref[np.ndarray], Ref[np.ndarray]]:
        """The flat and the averaged weights, after the first publication."""
        assert self._flat is not None
        assert self._ema is not None
        return self._flat, self._ema

    def _publish_current(self) -> None:
        """Hand the learners' current weights to the workers, under the current version."""
        self._flat = self._ema = self._parts.learners.weights(self._wait)
        self._scheduler.set_weights(self._flat, self.progress.version)

    def _publish(self, flat: Ref[np.ndarray], ema: Ref[np.ndarray] | None) -> None:
        self.progress.version += 1
        self._flat, self._ema = flat, ema
        self._scheduler.set_weights(flat, self.progress.version)
