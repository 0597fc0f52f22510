"""Starts Ray, and checks whether its processes are alive, without calling Ray.

Without the raylet, the next access to the object store ends the calling process, and Ray reports
every part as dead. Without the control store, running calls continue, but a request to it waits for
60 s and then ends the calling process.
"""

from __future__ import annotations

import signal
import subprocess
from typing import Any

from ebm_dist.core.errors import RunFailed


class RayDied(RunFailed):
    """The Ray that the run started is gone, and its parts with it."""


def init_ray(ray: Any, options: dict[str, Any], *, attempts: int) -> None:
    """Call `ray.init`, up to `attempts` times if the raylet does not start within Ray's 30 s."""
    while True:
        attempts -= 1
        try:
            ray.init(**options)
            return
        except Exception as error:
            if not attempts or "timed out" not in str(error):
                raise
            ray.shutdown()
        except BaseException:  # a signal: stop the processes that were started
            ray.shutdown()
            raise


class OwnRay:
    """The child processes of this process that belong to Ray."""

    def __init__(self, ray: Any) -> None:
        known = ray._private.worker.global_worker.node.all_processes
        self._processes: dict[str, subprocess.Popen[bytes]] = {
            name: infos[0].process for name, infos in known.items() if infos
        }

    def check(self) -> None:
        """Raise `RayDied` if the raylet is dead, so that no part can be reached."""
        if (how := self._ended("raylet")) is not None:
            raise RayDied(f"Ray on this machine died: its raylet {how}, and every part with it")

    def ailing(self) -> str | None:
        """A line about the control store if it is dead; parts still answer, but none can start."""
        how = self._ended("gcs_server")
        return None if how is None else f"Ray on this machine died: its control store {how}"

    @property
    def well(self) -> bool:
        """Whether calls of Ray's API are safe."""
        return self._ended("raylet") is None and self._ended("gcs_server") is None

    def _ended(self, name: str) -> str | None:
        process = self._processes.get(name)
        code = process.poll() if process is not None else None
        if code is None:
            return None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
