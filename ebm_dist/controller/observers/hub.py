"""The link to the metric hub. No update waits for the hub.

If the hub dies, training continues: calls that it has not confirmed are repeated on its successor.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from ebm_dist.cluster.backend import Backend, Handle, PartDied, Ref
from ebm_dist.controller.clients import HubClient
from ebm_dist.core.errors import NonFinite, RunFailed, UserError, one_line
from ebm_dist.metrics.hub import HubInfo, unknown_hub

log = logging.getLogger("ebm_dist.run")

MAX_UNCONFIRMED = 1000
"""Most calls that are kept for a successor of the hub; the oldest are dropped first."""

RESTART_S = 10.0
"""Time between two attempts to start a hub that fails to start, as on a full disk."""

LAST_WORDS_S = 10.0
"""Longest time that a failing run waits for the hub to write, and again to end the W&B run."""

_Given = ParamSpec("_Given")
_Call = Callable[[HubClient], Ref[None]]
_LOST = (PartDied, UserError, OSError)


class HubLink:
    """Sends metrics to the hub, and replaces it after its death."""

    def __init__(
        self,
        backend: Backend,
        spawn: Callable[[str | None], HubClient],
        *,
        resume_id: str | None,
    ) -> None:
        """
        Args:
            spawn: starts a hub, which continues the W&B run of the given id.
        """
        self.restarts = 0
        self.client = spawn(resume_id)
        self._backend = backend
        self._spawn = spawn
        self._info = unknown_hub(resume_id)
        self._not_before = 0.0
        self._unconfirmed: deque[tuple[Ref[None], _Call]] = deque(maxlen=MAX_UNCONFIRMED)

    @property
    def handles(self) -> list[Handle]:
        return [self.client.handle]

    def send(
        self,
        method: Callable[Concatenate[HubClient, _Given], Ref[None]],
        *args: _Given.args,
        **kwargs: _Given.kwargs,
    ) -> None:
        """Call `method` on the hub, e.g. `send(HubClient.log, step, epoch, values)`."""
        try:
            self._confirm()
        except _LOST as error:
            self._lost(error)
        self._call(lambda hub: method(hub, *args, **kwargs))

    @property
    def known(self) -> HubInfo:
        """What the hub last reported of the W&B run, without a call."""
        return self._info

    def info(self, timeout: float) -> HubInfo:
        """What the hub reports of the W&B run; its last report if it does not answer."""
        try:
            self._info = self._backend.get(self.client.info(), timeout)
        except TimeoutError:
            pass
        except _LOST as error:
            self._lost(error)
        return self._info

    def flush(self, timeout: float) -> None:
        """Wait until everything sent is written, for at most `timeout` seconds per attempt."""
        for _ in range(2):
            try:
                self._confirm()
                self._backend.get(self.client.flush(), timeout)
                return
            except TimeoutError:
                return
            except _LOST as error:
                self._lost(error)

    def close(self, timeout: float, exit_code: int = 0) -> None:
        """Let the hub write its queue and end the W&B run; ignore a late answer."""
        with contextlib.suppress(Exception):
            self._backend.get(self.client.close(exit_code), timeout)

    def fail(self, step: int, failure: RunFailed) -> None:
        """Tell W&B that the run failed at update `step`, and why."""
        diverged = isinstance(failure, NonFinite)
        title = "Training diverged and ended" if diverged else "The run failed"
        text = f"{one_line(failure)}. The same command goes on from the last checkpoint."
        with contextlib.suppress(Exception):  # `failure` is what the user is told
            self.send(HubClient.alert, step, title, text, "ERROR")
            self.flush(LAST_WORDS_S)
        self.close(LAST_WORDS_S, exit_code=1)

    def _call(self, call: _Call) -> None:
        self._unconfirmed.append((call(self.client), call))

    def _confirm(self) -> None:
        """Drop the calls that the hub has answered; raises if it is dead or cannot write."""
        while self._unconfirmed:
            ref = self._unconfirmed[0][0]
            if not self._backend.wait([ref], 0.0):
                return
            self._backend.get(ref, 30.0)
            self._unconfirmed.popleft()

    def _lost(self, error: Exception) -> None:
        """Replace the hub: at once if it died, at most every RESTART_S if it fails to start.
        Unconfirmed calls stay here until a hub has confirmed them."""
        if not isinstance(error, PartDied):
            if time.monotonic() < self._not_before:
                return
            self._not_before = time.monotonic() + RESTART_S
        self._replace(error)

    def _replace(self, died: Exception) -> None:
        log.info(f"the metric hub died ({died}); another one goes on in its place")
        self.start_anew()
        again = list(self._unconfirmed)
        self._unconfirmed.clear()
        for _, call in again:
            self._call(call)

    def start_again(self, dead: Handle) -> None:
        """Replace a hub that died before the run began."""
        self.start_anew()

    def start_anew(self) -> None:
        """End the hub and start its successor."""
        self.restarts += 1
        self._backend.kill(self.client.handle)
        self.client = self._spawn(self._info["id"])
