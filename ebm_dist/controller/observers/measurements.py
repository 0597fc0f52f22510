"""Links to the evaluator and the auditor, which measure while training continues.

If one of them dies, the measurement in progress is given up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import numpy as np

from ebm_dist.actors.auditor import AuditFindings
from ebm_dist.actors.evaluator import Evaluation
from ebm_dist.buffer.answers import WeightedChains
from ebm_dist.cluster.backend import Backend, Handle, PartDied, Ref, first_line
from ebm_dist.controller.clients import AuditorClient, EvaluatorClient
from ebm_dist.core.types import ChainSample, NegativeArrays
from ebm_dist.evaluation.config import EvaluationConfig

log = logging.getLogger("ebm_dist.run")

C = TypeVar("C", EvaluatorClient, AuditorClient)
T = TypeVar("T")


class MeasurementLink(Generic[C, T]):
    """Runs one measurement at a time, and replaces the process after its death."""

    part: ClassVar[str]
    failure: ClassVar[str]
    """First words of the log line for a failed measurement."""
    without: ClassVar[str]
    """Last words of the log line for a measurement that is given up."""

    def __init__(self, backend: Backend, spawn: Callable[[], C]) -> None:
        self.restarts = 0
        self.client = spawn()
        self._backend = backend
        self._spawn = spawn
        self._pending: tuple[int, Ref[T]] | None = None

    @property
    def handles(self) -> list[Handle]:
        return [self.client.handle]

    @property
    def busy(self) -> bool:
        """Whether a measurement is in progress."""
        return self._pending is not None

    def _result(self, timeout: float) -> tuple[int, T] | None:
        """(update, result) of the measurement in progress, if done within `timeout` seconds."""
        if self._pending is None:
            return None
        step, ref = self._pending
        if not self._backend.wait([ref], timeout):
            return None
        self._pending = None
        try:
            return step, self._backend.get(ref, 60.0)
        except PartDied as died:
            log.info(f"{self.part} died ({died}); update {step} {self.without}")
            self.start_anew()
        except Exception as error:  # a measurement that fails must not cost the run
            log.info(f"{self.failure} update {step} failed: {first_line(error)}")
        return None

    def give_up(self, why: str) -> None:
        """Give up the measurement in progress, and restart the process."""
        if self._pending is not None:
            log.info(f"update {self._pending[0]} {self.without}: {why}")
            self._pending = None
            self.start_anew()

    def start_again(self, dead: Handle) -> None:
        """Replace a process that died before the run began."""
        self.start_anew()

    def start_anew(self) -> None:
        """End the process and start its successor."""
        self.restarts += 1
        self._backend.kill(self.client.handle)
        self.client = self._spawn()


class EvaluatorLink(MeasurementLink[EvaluatorClient, Evaluation]):
    """The link to the evaluator, which measures chains and weights."""

    part, failure, without = "the evaluator", "evaluation at", "goes unmeasured"

    def start(
        self,
        step: int,
        chains: ChainSample,
        ema: Ref[np.ndarray],
        flat: Ref[np.ndarray],
        *weighted: Ref[WeightedChains],
    ) -> None:
        """Start to measure `chains` and the weights of update `step`; must not be `busy`."""
        assert self._pending is None
        self._pending = step, self.client.evaluate(step, chains, ema, flat, *weighted)

    def collect(self, timeout: float) -> tuple[int, Evaluation] | None:
        """(update, result) of the measurement in progress, if done within `timeout` seconds."""
        return self._result(timeout)


class AuditLink(MeasurementLink[AuditorClient, AuditFindings]):
    """The link to the auditor; with evaluation.audit_feedback its findings become negatives."""

    part, failure, without = "the auditor", "the audit of", "goes without an audit"

    def __init__(
        self,
        backend: Backend,
        spawn: Callable[[], AuditorClient],
        config: EvaluationConfig,
        *,
        batch_size: int,
        divisor: int,
        from_chains: bool,
        wait_s: float,
    ) -> None:
        """
        Args:
            batch_size: negatives of an update without those fed back.
            divisor: the number of negatives fed back is a multiple of this.
            from_chains: audits start from the buffer's chains.
            wait_s: longest time that training waits for an audit. In sync mode the findings must
                enter at the same update in every run.
        """
        super().__init__(backend, spawn)
        assert config.audit_every is not None
        self.from_chains = from_chains
        self.every: int = config.audit_every
        self.num_chains = config.audit_chains
        self.wait_s = wait_s
        self._config = config
        self._batch_size = batch_size
        self._divisor = divisor
        self._extra: tuple[int, Ref[NegativeArrays]] | None = None
        self._left = 0
        self._fed_back = 0

    def start(self, step: int, flat: Ref[np.ndarray], chains: ChainSample | None) -> None:
        """Start to audit the weights of update `step`; must not be `busy`."""
        assert self._pending is None
        self._pending = step, self.client.audit(step, flat, chains)

    def collect(self, timeout: float, version: int) -> tuple[int, dict[str, float]] | None:
        """(update, metrics) of the audit in progress, if it is done within `timeout` seconds.

        Args:
            version: version of the learner's weights, for the negatives fed back from now on.
        """
        if (done := self._result(timeout)) is None:
            return None
        step, found = done
        if found.alarm is not None:
            log.info(f"update {step}: {found.alarm}")
        if self._config.audit_feedback:
            self._feed_back(found.negatives, found.energies, version)
        return step, {**found.values, "audit/fed_back": float(self._fed_back)}

    def extra(self) -> tuple[int, Ref[NegativeArrays]] | None:
        """(number, reference) of further negatives for the next update, or None."""
        if self._left == 0:
            return None
        self._left -= 1
        return self._extra

    def _feed_back(self, chains: ChainSample, energy: np.ndarray, version: int) -> None:
        self._extra, self._left = None, 0
        if len(energy) == 0:
            return
        num = -(-len(energy) // self._divisor) * self._divisor
        index = np.arange(num) % len(energy)
        share = self._config.audit_feedback_weight
        # Chains of the buffer have log-weight 0; these get the fraction `share` of all weight.
        log_weight = math.log(share / (1 - share) * self._batch_size / num)
        negatives = NegativeArrays(
            x=chains.x[index],
            energy=energy[index],
            version=np.full(num, version, np.int64),
            log_weight=np.full(num, log_weight, np.float32),
            context={name: value[index] for name, value in chains.context.items()},
        )
        self._extra = num, self._backend.put(negatives)
        self._left = self._config.audit_feedback_updates
        self._fed_back += len(energy)
