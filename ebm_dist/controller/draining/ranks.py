"""Learner ranks leave a node whose end has been announced, with every update made.

Between two updates the whole state is read into this process, which does not go with that node. A
new group starts elsewhere from it, as one does from a checkpoint after a death; but nothing is
repeated, and the version of the weights stays, since they do.
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
    """Looks for ranks that have to leave, and moves the group between two updates.

    The group as a whole: the state of a rank is a part of the model that the others lack. It stands
    still meanwhile, where a successor could start beside it: that one would claim the GPUs twice.
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
            progress, attempts: the controller's own.
            publish: hands out the weights as they are; those of before lie on the node that goes.
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
        self._stays: list[str] = []

    def between_updates(self) -> None:
        """Move the group if a rank has to leave and there is room elsewhere.

        Raises:
            PartDied: a rank died before its state was read; the group goes back to a checkpoint.
            RunFailed: no new group could be started.
        """
        now = self._clock()
        if self._relocation is None or now - self._checked_at < DRAIN_CHECK_S:
            return
        self._checked_at = now
        held = [self._backend.where(rank.handle) for rank in self._learners.ranks]
        gone = self._relocation.draining() if any(held) else set()
        leaving = [rank.name for rank, at in zip(self._learners.ranks, held) if at in gone]
        if not leaving:
            return
        if (nodes := self._relocation.place_ranks(held)) is not None:
            self._move(leaving, nodes, now)
        elif leaving != self._stays:
            self._stays = leaving
            log.info(
                f"{' and '.join(leaving)} cannot leave the node, which is about to leave: there is "
                "no room for the learner ranks elsewhere. With the node they go back to the last "
                "checkpoint"
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
                where = None  # one of the nodes may be gone: Ray knows which are there
        self._attempts.started()
        log.info(
            f"{' and '.join(leaving)} left the node, which is about to leave: the learners go on "
            f"from update {self._progress.step} after {self._clock() - since:.1f} s"
        )
