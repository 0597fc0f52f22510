"""Links to the parts that no update waits for: the metric hub and the evaluator.

They may die at any moment and the training does not notice: what they were told and did not
confirm is told again to their successor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from ebm_dist.cluster.backend import Backend, Handle, PartDied, Ref, first_line
from ebm_dist.core.errors import UserError

MAX_UNCONFIRMED = 1000
"""Calls kept for a successor of the hub; the oldest are forgotten first."""

RESTART_S = 10.0
"""Between two attempts to start a hub where the disk refused the one before."""

_LOST = (PartDied, UserError, OSError)


class HubLink:
    """Sends metrics to the hub, and starts another one where it died."""

    def __init__(
        self,
        backend: Backend,
        spawn: Callable[[str | None], Handle],
        *,
        resume_id: str | None,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            spawn: starts a hub that continues the W&B run of the given id.
            say: is told that a hub was replaced.
        """
        self.restarts = 0
        self.handle = spawn(resume_id)
        self._backend = backend
        self._spawn = spawn
        self._say = say
        self._info: dict[str, Any] = {"id": resume_id}
        self._not_before = 0.0
        self._unconfirmed: deque[tuple[Ref, str, tuple[Any, ...]]] = deque(maxlen=MAX_UNCONFIRMED)

    def log(self, step: int, epoch: int, values: dict[str, float]) -> None:
        self._send("log", step, epoch, values)

    def images(self, name: str, step: int, path: str) -> None:
        self._send("images", name, step, path)

    def histogram(self, name: str, step: int, values: np.ndarray) -> None:
        self._send("histogram", name, step, values)

    @property
    def known(self) -> dict[str, Any]:
        """The W&B run as the hub told it last, without asking again."""
        return self._info

    def info(self, timeout: float) -> dict[str, Any]:
        """The W&B run as the hub knows it; as last known where it does not answer."""
        try:
            self._info = self._backend.get(self.handle.call("info"), timeout)
        except TimeoutError:
            pass
        except _LOST as error:
            self._lost(error)
        return self._info

    def flush(self, timeout: float) -> None:
        """Wait until what was sent is written, at most `timeout` seconds."""
        for _ in range(2):
            try:
                self._confirm()
                self._backend.get(self.handle.call("flush"), timeout)
                return
            except TimeoutError:
                return
            except _LOST as error:
                self._lost(error)

    def _send(self, method: str, *args: Any) -> None:
        try:
            self._confirm()
        except _LOST as error:
            self._lost(error)
        self._unconfirmed.append((self.handle.call(method, *args), method, args))

    def _confirm(self) -> None:
        """Forget the calls that the hub has answered; raises PartDied where it cannot any more."""
        while self._unconfirmed:
            ref = self._unconfirmed[0][0]
            if not self._backend.wait([ref], 0.0):
                return
            self._backend.get(ref, 30.0)
            self._unconfirmed.popleft()

    def _lost(self, error: Exception) -> None:
        """Start another hub: at once for one that died, and now and then where one cannot start,
        as on a full disk. What was sent stays here until one has taken it."""
        if not isinstance(error, PartDied):
            if time.monotonic() < self._not_before:
                return
            self._not_before = time.monotonic() + RESTART_S
        self._replace(error)

    def _replace(self, died: Exception) -> None:
        self._say(f"the metric hub died ({died}); another one goes on in its place")
        self.start_anew()
        again = list(self._unconfirmed)
        self._unconfirmed.clear()
        for _, method, args in again:
            self._unconfirmed.append((self.handle.call(method, *args), method, args))

    def start_anew(self) -> None:
        """Another process in place of one that is dead."""
        self.restarts += 1
        self._backend.kill(self.handle)
        self.handle = self._spawn(self._info.get("id"))


class EvaluatorLink:
    """One measurement at a time, whose result is logged when it comes."""

    def __init__(
        self, backend: Backend, spawn: Callable[[], Handle], *, say: Callable[[str], None]
    ) -> None:
        self.restarts = 0
        self.handle = spawn()
        self._backend = backend
        self._spawn = spawn
        self._say = say
        self._pending: tuple[int, Ref] | None = None

    def start(self, step: int, chains: Any, *weights: Ref) -> None:
        """Measure `chains` and `weights` of update `step`; nothing may be pending."""
        assert self._pending is None
        self._pending = step, self.handle.call("evaluate", step, chains, *weights)

    def collect(self, timeout: float) -> tuple[int, dict[str, float]] | None:
        """The pending measurement if it is done within `timeout` seconds, as (step, metrics)."""
        if self._pending is None:
            return None
        step, ref = self._pending
        if not self._backend.wait([ref], timeout):
            return None
        self._pending = None
        try:
            return step, self._backend.get(ref, 60.0)
        except PartDied as died:
            self._say(f"the evaluator died ({died}); update {step} goes unmeasured")
            self.start_anew()
        except Exception as error:  # a measurement that fails must not cost the run
            self._say(f"evaluation at update {step} failed: {first_line(error)}")
        return None

    @property
    def busy(self) -> bool:
        """Whether a measurement is under way."""
        return self._pending is not None

    def give_up(self, why: str) -> None:
        """Do without the measurement under way."""
        if self._pending is not None:
            self._say(f"update {self._pending[0]} goes unmeasured: {why}")
            self._pending = None
            self.start_anew()

    def start_anew(self) -> None:
        """Another process in place of one that is dead, or is not waited for any more."""
        self.restarts += 1
        self._backend.kill(self.handle)
        self.handle = self._spawn()
