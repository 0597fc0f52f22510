"""Negatives reach the nodes of the learner ranks before an update begins, or others do instead.

They go from shard to rank through the object stores of the nodes. One that is lost with its node
keeps the call from being made that it was to go to: in an update the other ranks would wait for
that one in a collective, and the group would have to start anew from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ebm_dist.cluster.backend import Backend
from ebm_dist.cluster.stall import DELIVERY, Stalled
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.negatives.source import POLL_S, Consumed, NegativeSource
from ebm_dist.controller.rounds.scheduler import RoundScheduler

LOSS_CHECK_S = 1.0
"""Time between two checks whether negatives in transit are lost with their node."""


class Delivery:
    """Sees the negatives of an update to the ranks, where nodes lie between."""

    def __init__(
        self,
        backend: Backend,
        learners: LearnerGroup,
        scheduler: RoundScheduler,
        negatives: NegativeSource,
        meanwhile: Callable[[], None],
        *,
        num_negatives: int,
        timeout: float,
    ) -> None:
        """
        Args:
            meanwhile: is called while the negatives are on their way.
            num_negatives: of an update.
            timeout: seconds after which those that do not come end the run.
        """
        self._backend = backend
        self._learners = learners
        self._scheduler = scheduler
        self._negatives = negatives
        self._num_negatives = num_negatives
        self._timeout = timeout
        self._meanwhile = meanwhile

    def bring(self, consumed: Consumed, step: int) -> None:
        """Return when the negatives of update `step` are where the ranks are.

        Raises:
            PartDied: a rank is gone.
            RollBack: negatives are lost, and the run's mode knows no others.
            Stalled: they did not come.
        """
        if not self._backend.scattered:
            return
        began = time.monotonic()
        while not self._has_come(consumed, began, step):
            if lost := self._lost(consumed):
                self._negatives.replace(consumed, lost)
                began = time.monotonic()
            else:  # a call was told of a loss that is none: ask again
                time.sleep(POLL_S)

    def _has_come(self, consumed: Consumed, began: float, step: int) -> bool:
        """Wait for the negatives; False as soon as some are known to be lost."""
        pending = self._learners.fetch(self._num_negatives, consumed.negatives)
        check_at = time.monotonic() + LOSS_CHECK_S
        while pending:
            done = self._scheduler.poll(POLL_S, *pending)
            self._meanwhile()
            if not all(self._learners.arrived(ref) for ref in done):
                return False
            pending = [ref for ref in pending if ref not in done]
            now = time.monotonic()
            if pending and now > check_at:
                if self._lost(consumed):
                    return False
                check_at = now + LOSS_CHECK_S
            if now - began > self._timeout:
                raise Stalled(DELIVERY, self._timeout, f"update {step}")
        return True

    def _lost(self, consumed: Consumed) -> list[int]:
        negatives = consumed.negatives
        return [i for i, (_, ref) in enumerate(negatives) if self._backend.lost(ref)]
