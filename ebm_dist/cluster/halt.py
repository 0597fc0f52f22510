"""Ends a run before its last update, after a signal or when its Ray is dying.

Between two updates the run ends at once, with a checkpoint. Within an update it waits a little
longer, so that the update can finish; after that it ends without that update.
"""

from __future__ import annotations

import time
from collections.abc import Callable

GRACE_S = 30.0
"""Seconds for which a wait may continue after the stop request. Kubernetes gives a pod of `launch/`
150 s to end."""

IDLE_GRACE_S = 2.0
"""The same for waits on which no update depends."""


class Halted(Exception):
    """The run is to end, and a wait did not finish in time."""

    def __init__(self, ailing: str | None) -> None:
        super().__init__(ailing or "the run was told to stop")
        self.is_failure = ailing is not None


class Halt:
    """Why a run is to end, and since when. Every wait of the training loop checks it."""

    def __init__(
        self,
        told: Callable[[], bool] = lambda: False,
        ailing: Callable[[], str | None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            told: whether the run was asked to stop.
            ailing: the process of Ray that has died, if the run cannot continue without it although
                its parts still answer; None while there is none.
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
            began: the start of the wait; a wait that begins after the request has the whole time.
        """
        if not self.due:
            return
        assert self._since is not None
        since = self._since if began is None else max(began, self._since)
        if self._clock() - since >= grace_s:
            raise Halted(self.ailing())
