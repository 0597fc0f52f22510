"""Moves the learner ranks off a draining node without the loss of an update.

Between two updates the driver reads the full state, ends the ranks, and starts a new group, which
loads this state like a checkpoint. No update is repeated, and the version of the weights stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ebm_dist.checkpoint.cut import Progress
from ebm_dist.cluster.backend import Backend, PartDied
from ebm_dist.controller.learners import LearnerGroup, Wait
from ebm_dist.controller.parts import Relocation
from ebm_dist.controller.retry import Attempts
from ebm_dist.controller.workers.autoscaler import DRAIN_CHECK_S

log = logging.getLogger("ebm_dist.run")


class RankMover:
    """Checks for ranks on draining nodes, and moves the group between two updates.

    The group moves as a whole, since each rank holds a part of the model. The old ranks end before
    the new ones start, which may need the same GPUs.
    """

    def __init__(
        self,
        backend: Backend,
        learners: LearnerGroup,
        relocation: Relocation | None,
        progress: Progress,
        attempts: Attempts,
        wait: Wait,
        publish: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            progress, attempts: shared with the controller.
            publish: hands out the current weights again, since the node of the old ones ends.
        """
        self._backend = backend
        self._learners = learners
        self._relocation = relocation
        self._progress = progress
        self._attempts = attempts
        self._wait = wait
        self._publish = publish
        self._clock = clock
        self._checked_at = clock()
        self._unplaced: list[str] = []
        """Ranks that could not leave; each list is logged once."""

    def between_updates(self) -> None:
        """Move the group if a rank is on a draining node and the ranks fit elsewhere.

        Raises:
            PartDied: a rank died before its state was read. The group then goes back.
            RunFailed: no new group could be started.
        """
        now = self._clock()
        if self._relocation is None or now - self._checked_at < DRAIN_CHECK_S:
            return
        self._checked_at = now
        held = [self._backend.where(rank.handle) for rank in self._learners.ranks]
        draining = self._relocation.draining() if any(held) else set()
        leaving = [rank.name for rank, at in zip(self._learners.ranks, held) if at in draining]
        if not leaving:
            return
        if (nodes := self._relocation.place_ranks(held)) is not None:
            self._move(leaving, nodes, now)
        elif leaving != self._unplaced:
            self._unplaced = leaving
            log.info(
                f"{' and '.join(leaving)} cannot leave the draining node: there is no room for the "
                "learner ranks elsewhere. When the node ends, they go back to the last checkpoint"
            )

    def _move(self, leaving: list[str], nodes: list[str], since: float) -> None:
        states = self._learners.read(self._wait)
        cursors = [state.data for state in states]
        where: list[str] | None = nodes
        while True:
            self._attempts.begin_start()
            try:
                self._learners.replace(self._wait, where)
                assert states[0].learner is not None
                self._learners.load(
                    states[0].learner,
                    states[0].ema,
                    cursors,
                    self._wait,
                    attempt=self._progress.rollbacks,
                )
                self._publish()
                break
            except PartDied as died:
                self._attempts.failed(died)
                where = None  # one of the nodes may be gone: let Ray choose
        self._attempts.started()
        log.info(
            f"{' and '.join(leaving)} left the node, which is draining: the learners go on from "
            f"update {self._progress.step} after {self._clock() - since:.1f} s"
        )
