"""Logs metrics during a run, writes sample grids, and starts evaluations and audits."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import PartDied, Ref, T, fault_of_the_machine
from ebm_dist.cluster.stall import HALT_CHECK_S, answer
from ebm_dist.config.run_config import RunConfig
from ebm_dist.controller.clients import HubClient, ShardClient, WorkerClient
from ebm_dist.controller.observers.alerts import Alerts
from ebm_dist.controller.observers.measurements import AuditLink, EvaluatorLink
from ebm_dist.controller.observers.metric_window import MetricWindow
from ebm_dist.controller.parts import Parts
from ebm_dist.controller.rounds.scheduler import RoundScheduler
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import ChainSample

log = logging.getLogger("ebm_dist.run")

_COUNTED = ("free", "leased", "ready", "capacity", "late_checkins", "expired_leases")
"""Counts that a shard reports with each round, for the metrics `buffer/*`."""


@dataclass(frozen=True, slots=True)
class _Drawing:
    """Samples that a worker draws for an evaluation while training continues."""

    step: int
    worker: WorkerClient
    samples: Ref[ChainSample]
    flat: Ref[np.ndarray]
    ema: Ref[np.ndarray]
    began: float


class Monitor:
    """Observes the parts between two updates. Evaluations and audits run beside training.

    Every method raises PartDied if a part dies that it has asked.
    """

    def __init__(
        self,
        parts: Parts,
        config: RunConfig,
        scheduler: RoundScheduler,
        progress: Progress,
        window: MetricWindow,
        *,
        timeout: float,
        save_grid: Callable[[ChainSample, str, int], Path | None],
        draws_extremes: bool,
        on_evaluation: Callable[[int, dict[str, float]], None],
    ) -> None:
        """
        Args:
            progress: shared with the controller, and only read, `alerts` apart.
            window: filled by the controller, and closed here at each log row.
            timeout: seconds within which a part must answer.
            save_grid: writes chains as the image of a name and an update.
            draws_extremes: also draw the oldest, the newest and the lowest chains.
            on_evaluation: called with the update and the metrics of each evaluation.
        """
        self.metrics: dict[str, float] = {}
        """The last value of each metric."""
        self.evaluation_s = 0.0
        """Seconds that training has waited for the start or the end of measurements."""
        self._parts = parts
        self._config = config
        self._temperature = config.sampler.build().temperature
        self._scheduler = scheduler
        self._progress = progress
        self._window = window
        self._timeout = timeout
        self._save_grid = save_grid
        self._draws_extremes = draws_extremes
        self._backend = parts.backend
        self._on_evaluation = on_evaluation
        self._owed_since = math.inf  # the last update at which an evaluation was due
        self._drawing: _Drawing | None = None
        self._averaged = -1  # the update whose averaged weights were requested
        self._said_busy = False
        self.alerts = Alerts(
            partial(parts.hub.send, HubClient.alert),
            max_lag=config.flow.max_lag if config.flow.mode == "async" else None,
            nodes=parts.backend.nodes,
            sent_at=progress.alerts,
        )

    def reads_average(self, step: int) -> bool:
        """Whether the averaged weights of update `step` are needed."""
        auditor, config = self._parts.auditor, self._config
        every = [config.evaluation.every, auditor.every if auditor else None]
        due = step == config.run.steps or any(n is not None and step % n == 0 for n in every)
        if not due and step > self._owed_since:
            self._collect_evaluation(0.0)
            due = not self._is_measuring
        self._averaged = step if due else -1
        return due

    @property
    def _is_measuring(self) -> bool:
        evaluator = self._parts.evaluator
        return self._drawing is not None or (evaluator is not None and evaluator.busy)

    def observe(self, flat: Ref[np.ndarray], ema: Ref[np.ndarray]) -> None:
        """Log and measure what is due after an update with the weights `flat` and `ema`."""
        step = self._progress.step
        if (every := self._config.evaluation.every) is not None and step % every == 0:
            self._owed_since = step
        if step % self._config.tracking.log_every == 0 or step == self._config.run.steps:
            self._log()
        self.catch_up(flat, ema)
        self._collect_evaluation(0.0)
        if self._parts.auditor is not None:
            self._audit(self._parts.auditor, flat, ema)

    def catch_up(self, flat: Ref[np.ndarray], ema: Ref[np.ndarray]) -> None:
        """Start the evaluation that is due, also if a death or an evaluation postponed it."""
        # A run that went back has not reached the update whose evaluation is due.
        step = self._progress.step
        if step < self._owed_since or step != self._averaged:
            return
        if step == self._config.run.steps:
            self.finish()
        self._collect_evaluation(0.0)
        if self._is_measuring:
            if not self._said_busy:
                log.info(
                    f"the previous evaluation is still under way at update {step}; one evaluation "
                    "follows it in place of all that are due until then (raise evaluation.every)"
                )
            self._said_busy = True
            return
        self.evaluate(flat, ema)
        self._owed_since = math.inf

    def _audit(self, auditor: AuditLink, flat: Ref[np.ndarray], ema: Ref[np.ndarray]) -> None:
        """Start the audit that is due, unless one is in progress, and log a finished one."""
        step = self._progress.step
        if step % auditor.every == 0 and not auditor.busy:
            chains = self.chains(auditor.num_chains) if auditor.from_chains else None
            auditor.start(step, flat, chains)
        self._collect_audit(auditor.wait_s)
        if auditor.wait_s and auditor.busy:
            auditor.give_up(f"it took more than {auditor.wait_s:.0f} s (flow.stall_timeout_s)")

    def _collect_audit(self, timeout: float) -> None:
        auditor = self._parts.auditor
        if auditor is None:
            return
        done = self._collect(
            auditor, lambda wait_s: auditor.collect(wait_s, self._progress.version), timeout
        )
        if done is not None:
            self.metrics.update(done[1])
            self._parts.hub.send(HubClient.log, done[0], self._progress.epoch, done[1])

    @property
    def restarts(self) -> int:
        """Number of replaced processes so far."""
        parts = self._parts
        observers = parts.hub.restarts + (parts.evaluator.restarts if parts.evaluator else 0)
        observers += parts.auditor.restarts if parts.auditor else 0
        return self._scheduler.restarts + parts.learners.restarts + observers

    def _log(self) -> None:
        steps = self._scheduler.mcmc_steps
        values = self._window.close(
            mcmc_steps=steps, idle_s=self._scheduler.workers.members.take_idle_seconds()
        )
        values["sampler/temperature"] = self._temperature
        values["weights/version"] = float(self._progress.version)
        values["fault/restarts"] = float(self.restarts)
        values["fault/rollbacks"] = float(self._progress.rollbacks)
        values["workers/alive"] = float(self._scheduler.workers.members.num_serving)
        if self._scheduler.num_local:
            values["flow/local_rounds"] = self._scheduler.num_local / self._scheduler.num_started
        if self._scheduler.num_started:
            values["flow/rounds_by_rows"] = (
                self._scheduler.num_by_rows / self._scheduler.num_started
            )
        counts = self._scheduler.counts.values()
        if self._parts.needs_negatives:
            for name in _COUNTED:
                values[f"buffer/{name}"] = float(sum(getattr(c, name) for c in counts))
        # A shard reports its counts with each round; before its first one all chains are free.
        for index in range(len(self._parts.shards)):
            if index not in self._scheduler.counts:
                values["buffer/free"] += self._parts.shards.capacities[index]
                values["buffer/capacity"] += self._parts.shards.capacities[index]
        if counts:
            values["chain/age_mean"] = sum(c.age_mean for c in counts) / len(counts)
        if self._config.buffer.jarzynski:
            values["likelihood/resampled"] = float(sum(c.resampled for c in counts))
        try:
            if self._parts.chain_monitor is not None:
                values |= self._parts.chain_monitor.check()
        finally:  # the row is logged even if a shard dies here
            self.metrics.update(values)
            self._parts.hub.send(HubClient.log, self._progress.step, self._progress.epoch, values)
            chains = self._parts.chain_monitor
            self.alerts.look(self._progress.step, values, chains.alarm if chains else None)

    def evaluate(self, flat: Ref[np.ndarray], ema: Ref[np.ndarray]) -> None:
        """Write the sample grid and start an evaluation, whose metrics are logged later."""
        with self._waiting():
            self._evaluate(flat, ema)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.evaluation_s += time.monotonic() - began

    def _evaluate(self, flat: Ref[np.ndarray], ema: Ref[np.ndarray]) -> None:
        step, config = self._progress.step, self._config.evaluation
        num = max(config.num_samples, config.num_grid)
        if self._parts.needs_negatives:
            self._measure(step, self.chains(num), flat, ema)
            return
        worker = next(iter(self._parts.workers))
        seed = derive_seed(self._config.run.seed, "samples", step)
        std, num_steps = self._config.buffer.init_std, self._config.sampler.num_steps
        samples = worker.sample(num, num_steps, ema, seed, std)
        self._drawing = _Drawing(step, worker, samples, flat, ema, time.monotonic())

    def _collect_drawing(self, wait: bool) -> None:
        """Measure the samples of the drawing in progress, if it is done or too late, or `wait`."""
        if (drawing := self._drawing) is None:
            return
        late = time.monotonic() - drawing.began > self._timeout
        if not (wait or late or self._backend.wait([drawing.samples], 0.0)):
            return
        self._drawing = None
        try:
            samples = self._answer(drawing.worker, drawing.samples, "samples from noise")
        except PartDied:
            self._owed_since = min(self._owed_since, drawing.step)
            raise
        self._measure(drawing.step, samples, drawing.flat, drawing.ema)

    def _measure(
        self, step: int, chains: ChainSample, flat: Ref[np.ndarray], ema: Ref[np.ndarray]
    ) -> None:
        config, parts = self._config.evaluation, self._parts
        shown = slice(config.num_grid)
        if (label := chains.context.get("label")) is not None:
            shown = np.argsort(label[shown], kind="stable")  # one class per row, if they fit
        context = {name: value[shown] for name, value in chains.context.items()}
        self._draw(ChainSample(chains.x[shown], context), "samples/chains", step)
        self._draw_extremes(step)
        self._log_distributions(step)
        if self._parts.evaluator is None:
            return
        weighs = self._config.buffer.jarzynski
        weighted = [shard.weighted() for shard in parts.shards] if weighs else []
        self._parts.evaluator.start(step, chains, ema, flat, *weighted)

    def _draw(self, chains: ChainSample, name: str, step: int) -> None:
        picture = self._save_grid(chains, name, step)
        if picture is not None:
            self._parts.hub.send(HubClient.images, name, step, str(picture))

    def _draw_extremes(self, step: int) -> None:
        shards = self._parts.shards
        if len(shards) == 0 or not self._draws_extremes:
            return
        share = -(-self._config.evaluation.num_grid // len(shards))
        asked = [(shard, shard.extremes(share)) for shard in shards]
        answers = [self._answer(shard, ref, "its extreme chains") for shard, ref in asked]
        for name in answers[0]:
            chains = np.concatenate([part[name] for part in answers])
            if len(chains):
                self._draw(ChainSample(chains), name, step)

    def _log_distributions(self, step: int) -> None:
        asked = [(shard, shard.distribution()) for shard in self._parts.shards]
        answers = [self._answer(shard, ref, "the energies of the chains") for shard, ref in asked]
        if answers:
            hub = self._parts.hub
            energy = np.concatenate([part.energy for part in answers])
            age = np.concatenate([part.age for part in answers])
            hub.send(HubClient.histogram, "histogram/energy_negative", step, energy)
            hub.send(HubClient.histogram, "histogram/age", step, age)

    def chains(self, num: int) -> ChainSample:
        """`num` chains of the shards, as they are now."""
        shards = self._parts.shards
        share = -(-num // len(shards))
        asked = [(shard, shard.peek(share, self._progress.step)) for shard in shards]
        pieces = [self._answer(*call, "samples of the chains") for call in asked]
        # Interleaved, so that the first k come from all shards.
        order = np.argsort(np.concatenate([np.arange(len(p.x)) for p in pieces]), kind="stable")
        order = order[:num]
        context = {
            name: np.concatenate([piece.context[name] for piece in pieces])[order]
            for name in pieces[0].context
        }
        return ChainSample(np.concatenate([piece.x for piece in pieces])[order], context)

    def _answer(self, part: ShardClient | WorkerClient, ref: Ref[T], what: str) -> T:
        detail = f"update {self._progress.step}: waited for {what}"
        try:
            return answer(self._backend, part.handle, ref, self._timeout, detail)
        except Exception as error:
            if (fault := fault_of_the_machine(error)) is None:
                raise
            # As after a failed round: another process may run on another device.
            self._backend.kill(part.handle)
            raise PartDied(f"{detail}: {part.name} failed: {fault}") from error

    def finish(self) -> None:
        """Wait for the measurements in progress, and give up those that take too long."""
        self._collect_evaluation(self._timeout)
        with self._waiting():
            self._collect_audit(self._timeout)
        for link in (self._parts.evaluator, self._parts.auditor):
            if link is not None and link.busy:
                link.give_up(
                    f"it was not done {self._timeout:.0f} s later (flow.stall_timeout_s), or the "
                    "run was told to stop"
                )

    def _collect_evaluation(self, timeout: float) -> None:
        with self._waiting():
            self._collect_drawing(wait=timeout > 0.0)
            self._collect_metrics(timeout)

    def _collect_metrics(self, timeout: float) -> None:
        evaluator = self._parts.evaluator
        if evaluator is None:
            return
        if (done := self._collect(evaluator, evaluator.collect, timeout)) is not None:
            step, found = done
            values = found.values
            self.metrics.update(values)
            self._parts.hub.send(HubClient.log, step, self._progress.epoch, values)
            self._parts.hub.send(HubClient.table, "evaluation", step, values)
            self._on_evaluation(step, values)
            if found.neighbours is not None:
                self._draw(ChainSample(found.neighbours), "samples/neighbours", step)

    def _collect(
        self,
        link: EvaluatorLink | AuditLink,
        collect: Callable[[float], T | None],
        timeout: float,
    ) -> T | None:
        """The result of `collect` within `timeout` seconds; None if there is none, or at a halt."""
        deadline, found = time.monotonic() + timeout, None
        while link.busy and found is None:
            left = deadline - time.monotonic()
            found = collect(max(0.0, min(left, HALT_CHECK_S)))
            if left <= 0.0 or self._backend.halt.due:
                break
        return found
