"""A run that is to end before its last update: told to by a signal, or because its Ray is dying.

Between two updates it ends at once, with a checkpoint. What it waits for then gets a little time,
so that the update comes to its end; after that the run leaves with what it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable

GRACE_S = 30.0
"""What is waited for may take this long from when the run was told to end. A pod as launched by
`launch/` is given 150 s."""

IDLE_GRACE_S = 2.0
"""The same of waits that keep no update from being whole."""


class Halted(Exception):
    """The run is to end, and what it waits for did not come in time."""

    def __init__(self, ailing: str | None) -> None:
        super().__init__(ailing or "the run was told to stop")
        self.is_failure = ailing is not None


class Halt:
    """Knows why a run is to end, and since when. Each wait of the training loop looks at it."""

    def __init__(
        self,
        told: Callable[[], bool] = lambda: False,
        ailing: Callable[[], str | None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            told: whether somebody asked the run to stop.
            ailing: what has died so that the run cannot go on, though its parts still answer.
        """
        self._told = told
        self.ailing = ailing
        self._clock = clock
        self._since: float | None = None

    @property
    def due(self) -> bool:
        """Whether the run is to end."""
        if self._since is None and (self._told() or self.ailing() is not None):
            self._since = self._clock()
        return self._since is not None

    def check(self, began: float | None = None, *, grace_s: float = GRACE_S) -> None:
        """Raise `Halted` where the run is to end and has waited `grace_s` since then.

        Args:
            began: when the wait began; waits that begin later have their own time.
        """
        if not self.due:
            return
        assert self._since is not None
        since = self._since if began is None else max(began, self._since)
        if self._clock() - since >= grace_s:
            raise Halted(self.ailing())
