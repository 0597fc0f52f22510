"""Brings the negatives of an update to the nodes of the learner ranks, and replaces lost ones.

Negatives go from shard to rank through the object stores of the nodes. Ray does not run a call
whose argument was lost with its node. In an update the other ranks would then wait for that rank in
a collective, and the group would have to restart from the last checkpoint.
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
    """Brings the negatives of an update to the ranks, in a run on several nodes."""

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
            meanwhile: called repeatedly while the negatives are in transit.
            num_negatives: negatives per update.
            timeout: seconds after which missing negatives end the run.
        """
        self._backend = backend
        self._learners = learners
        self._scheduler = scheduler
        self._negatives = negatives
        self._num_negatives = num_negatives
        self._timeout = timeout
        self._meanwhile = meanwhile

    def bring(self, consumed: Consumed, step: int) -> None:
        """Return when the negatives of update `step` are on the nodes of the ranks.

        Raises:
            PartDied: a rank died.
            RollBack: negatives are lost and have no replacement.
            Stalled: they did not arrive within the timeout.
        """
        if not self._backend.scattered:
            return
        began = time.monotonic()
        while not self._have_arrived(consumed, began, step):
            if lost := self._lost(consumed):
                self._negatives.replace(consumed, lost)
                began = time.monotonic()
            else:  # the call failed although nothing is lost: try again
                time.sleep(POLL_S)

    def _have_arrived(self, consumed: Consumed, began: float, step: int) -> bool:
        """Wait for the negatives; return False as soon as some are known to be lost."""
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
        """Indices of the leases whose negatives are lost."""
        negatives = consumed.negatives
        return [i for i, (_, ref) in enumerate(negatives) if self._backend.lost(ref)]
