"""Decisions after a death (go on or go back), and the limits at which a run fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ebm_dist.cluster.backend import UNREACHABLE_S, PartDied, Unreachable
from ebm_dist.core.errors import RunFailed

MAX_ATTEMPTS = 5
"""Attempts at one update or one round, and deaths of one worker or shard without a commit between
them, before the run fails."""

MAX_STARTS = 20
"""Failed starts in a row, of a worker or of the learner ranks, before the run fails.

A start takes some 10 s. If something dies every few seconds, most starts fail and the one that
succeeds counts; if none can succeed, 20 of them fail within minutes.
"""

RETRY_S = 0.5
"""Time between two attempts. By then Ray usually knows whether a part is dead."""


@dataclass(frozen=True, slots=True)
class Redo:
    """The update goes on: everything that was lost has been started again."""


@dataclass(frozen=True, slots=True)
class GoBack:
    """The run goes back to its last checkpoint: this update cannot be completed."""

    reason: str


Decision = Redo | GoBack


class RollBack(RunFailed):
    """Ends an update from anywhere within it, after the decision to go back."""

    def __init__(self, decision: GoBack) -> None:
        super().__init__(decision.reason)


def obey(decision: Decision) -> None:
    """Return if the update goes on; raise RollBack if the run goes back."""
    if isinstance(decision, GoBack):
        raise RollBack(decision)


class Attempts:
    """Counts failed attempts at the next update, and separately failed starts of parts.

    A failed start is no attempt at the update. An unreachable part does not count for
    UNREACHABLE_S, the time in which Ray decides whether it is dead.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unreachable_since: float | None = None
        self._farthest = 0
        self._num_failed = 0
        self._num_starts = 0
        self._starting = False

    def reached(self, step: int) -> None:
        """Note that `step` updates are made; a new maximum resets the counts."""
        if step > self._farthest:
            self._farthest, self._num_failed = step, 0
            self._unreachable_since = None

    def begin_start(self) -> None:
        """Note that parts are started and loaded with state."""
        self._starting = True

    def started(self) -> None:
        """Note that the start succeeded."""
        self._starting, self._num_starts = False, 0

    def failed(self, died: PartDied | RollBack) -> None:
        """Count a death during an update or a start; wait if the part is only unreachable.

        Raises:
            RunFailed: the limit is reached.
        """
        if isinstance(died, Unreachable):
            now = self._clock()
            if self._unreachable_since is None:
                self._unreachable_since = now
            if now - self._unreachable_since <= UNREACHABLE_S:
                time.sleep(RETRY_S)
                return
        if self._starting:
            self._num_starts += 1
            if self._num_starts >= MAX_STARTS:
                raise RunFailed(
                    f"the learner ranks were started {MAX_STARTS} times in a row and lost a part "
                    f"each time before the first update; the last one ended with: {died}. If "
                    "memory ran out, lower data.batch_size or learner.num_ranks, or set "
                    "learner.zero_stage; run.log names who died"
                ) from died
            return
        self._num_failed += 1
        if self._num_failed > MAX_ATTEMPTS:
            raise RunFailed(
                f"update {self._farthest} was not reached in {MAX_ATTEMPTS} attempts; the last one "
                f"ended with: {died}. If memory ran out, lower data.batch_size or "
                "workers.num_chains; if parts are killed more often than a checkpoint is written, "
                "lower checkpoint.every; run.log names who died"
            ) from died
