"""Actors of Ray from when they are asked for until they have started: who they are, and where."""

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
    """By us: Ray knows it a moment later, and a process that is stopped dies seconds later."""

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
        """`handle` is asked for; `ready` is what its `Host.ready` will answer."""
        self._starting.append((handle, ready))

    def note(self) -> None:
        """Keep, and log, the process of each part that has started since."""
        for handle, ref in list(self._starting):
            if not self._ray.wait([ref], timeout=0)[0]:
                continue
            self._starting.remove((handle, ref))
            with contextlib.suppress(self._errors.RayError):  # whoever calls it will see
                pid, address, handle.runs_on = self._ray.get(ref, timeout=30.0)
                log.info("%s runs as process %d on %s", handle.name, pid, address)
                self._latest = time.monotonic()

    def wait(
        self, backend: Backend, handles: Sequence[Handle], timeout_s: float
    ) -> tuple[Handle, PartDied] | None:
        """See `Backend.await_started`.

        The time begins anew with each that has started: where they read their modules from one slow
        disk, they come one after the other.
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


def constructor_error(error: Exception) -> BaseException | None:
    """What the constructor of an actor raised, where Ray kept it."""
    inner = getattr(error, "cause", None) or error.__cause__
    return getattr(inner, "cause", None) or inner


_UNREADABLE = re.compile(r"could not be computed:\s*\S*RaySystemError: System error: (.*)")


def unreadable_argument(error: Exception) -> str | None:
    """What to say where an actor could not read what it was given, for want of a user's module.

    Ray keeps of such an error its text alone.
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
    """What to say where an argument that `make` is bound to cannot be pickled, as an object of the
    user may not be; None where `dumps` takes each."""
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
