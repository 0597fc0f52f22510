"""Waits for Ray's actors to start, records where they run, and explains why they cannot."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ebm_dist.cluster.backend import Backend, Handle, PartDied, Ref
from ebm_dist.cluster.stall import HALT_CHECK_S
from ebm_dist.core.errors import RunFailed, one_line

log = logging.getLogger("ebm_dist")


@dataclass(slots=True, eq=False)
class RayHandle:
    name: str
    actor: Any
    node: str | None = None
    runs_on: str | None = None
    """Id of the node, once it has started."""
    num_gpus: float = 0.0
    killed: bool = False
    """Whether we killed it. Ray records the death a little later."""

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        return self.actor.call.options(num_returns=num_returns).remote(method, *args)

    def aside(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        return self.actor.aside.options(num_returns=num_returns).remote(method, *args)


class Starts:
    """The actors that have not started yet."""

    def __init__(self, ray: Any, errors: Any) -> None:
        """
        Args:
            ray, errors: the modules `ray` and `ray.exceptions`.
        """
        self._ray = ray
        self._errors = errors
        self._starting: list[tuple[RayHandle, Ref[tuple[int, str, str]]]] = []
        self._latest = 0.0

    def begin(self, handle: RayHandle, ready: Ref[tuple[int, str, str]]) -> None:
        """Record that `handle` is starting; `ready` is the reference of its `Host.ready`."""
        self._starting.append((handle, ready))

    def note(self) -> None:
        """Record and log the process of each part that has started since the last call."""
        for handle, ref in list(self._starting):
            if not self._ray.wait([ref], timeout=0)[0]:
                continue
            try:
                self._starting.remove((handle, ref))
            except ValueError:  # another thread, as the one that writes checkpoints, was first
                continue
            with contextlib.suppress(self._errors.RayError):  # the next call raises it again
                pid, address, handle.runs_on = self._ray.get(ref, timeout=30.0)
                log.info("%s runs as process %d on %s", handle.name, pid, address)
                self._latest = time.monotonic()

    def wait(
        self, backend: Backend, handles: Sequence[Handle], timeout_s: float
    ) -> tuple[Handle, PartDied] | None:
        """See `Backend.await_started`.

        The timeout restarts whenever a part has started, because parts that read their modules from
        one slow disk start one after another.
        """
        began = time.monotonic()
        pending: dict[Ref, RayHandle] = {}
        for handle in handles:
            assert isinstance(handle, RayHandle)
            pending[handle.actor.ready.remote()] = handle
        while pending:
            backend.halt.check(grace_s=0.0)
            for ref in backend.wait(list(pending), HALT_CHECK_S):
                handle = pending.pop(ref)
                try:
                    backend.get(ref, 30.0)
                except PartDied as died:
                    return handle, died
            if pending and time.monotonic() - max(began, self._latest) > timeout_s:
                names = ", ".join(handle.name for handle in pending.values())
                raise RunFailed(
                    f"{names} did not start in {timeout_s:.0f} s; the cluster has "
                    f"{self._ray.available_resources()} free. Lower workers.num_workers, or raise "
                    "runtime.start_timeout_s"
                )
        self.note()
        return None


_UNREADABLE = re.compile(r"could not be computed:\s*\S*RaySystemError: System error: (.*)")


def unreadable_argument(error: Exception) -> str | None:
    """The message if an actor could not unpickle an argument, because a user's module is missing;
    else None. Ray keeps only the text of such an error.
    """
    text = str(error)
    if (found := _UNREADABLE.search(text)) is None:
        return None
    node = re.search(r"\bip=([^,)\s]+)", text)
    return (
        f"runtime.working_dir: the node {node[1] if node else 'of an actor'} cannot read a section "
        f"or object of yours ({found[1].strip()}); install its module there, or set this key to "
        "the directory that holds it, which Ray then ships to every node"
    )


def unsendable_argument(make: Callable[..., object], dumps: Callable[[Any], bytes]) -> str | None:
    """The message if a keyword argument bound to `make` cannot be pickled; None if all can."""
    for key, value in getattr(make, "keywords", {}).items():
        try:
            dumps(value)
        except Exception as error:
            return (
                f"{key}: cannot be sent to Ray's processes "
                f"({one_line(f'{type(error).__name__}: {error}')}); let the object make what "
                "cannot be pickled, such as a lock or an open file, when it is first used, or set "
                "runtime.backend: inline"
            )
    return None
