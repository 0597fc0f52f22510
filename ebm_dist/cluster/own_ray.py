"""The processes of a Ray that the run has started: whether they live, without asking Ray.

Ray itself is no help then. Without its raylet, the next look into the object store ends the process
that looks, and every part is reported as dead. Without its control store everything goes on that is
under way, but who asks it something waits for 60 s, and then his process is ended too.
"""

from __future__ import annotations

import signal
import subprocess
from typing import Any

from ebm_dist.core.errors import RunFailed


class RayDied(RunFailed):
    """The Ray that the run started is gone, and its parts with it."""


class OwnRay:
    """Looks at the children of this process that are Ray's."""

    def __init__(self, ray: Any) -> None:
        known = ray._private.worker.global_worker.node.all_processes
        self._processes: dict[str, subprocess.Popen[bytes]] = {
            name: infos[0].process for name, infos in known.items() if infos
        }

    def check(self) -> None:
        """Raise `RayDied` where no part can be reached any more."""
        if (how := self._ended("raylet")) is not None:
            raise RayDied(f"Ray on this machine died: its raylet {how}, and every part with it")

    def ailing(self) -> str | None:
        """What is gone of Ray, if the parts still answer; no other can be started."""
        how = self._ended("gcs_server")
        return None if how is None else f"Ray on this machine died: its control store {how}"

    @property
    def well(self) -> bool:
        """Whether Ray can be asked anything."""
        return self._ended("raylet") is None and self._ended("gcs_server") is None

    def _ended(self, name: str) -> str | None:
        process = self._processes.get(name)
        code = process.poll() if process is not None else None
        if code is None:
            return None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
