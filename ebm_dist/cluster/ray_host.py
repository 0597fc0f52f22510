"""The actor class that Ray runs: a process that hosts one part of the graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ray

from ebm_dist.cluster.process import meeting_point, tune_process
from ebm_dist.cluster.shared_memory import RunMemory
from ebm_dist.core.errors import RunFailed
from ebm_dist.core.plugins import import_plugins

ASIDE = "aside"
"""Name of the concurrency group of the second thread."""


class Host:
    """Makes one part in this process, and forwards calls to it.

    Of an exception in a constructor, Ray keeps the text alone. The run would take a mistake of the
    user for the death of a process and start the part again, so the first call raises it.
    """

    _mistake: ValueError | RunFailed | None = None

    def __init__(
        self,
        make: Callable[..., object],
        num_threads: int | None,
        memory: RunMemory,
        shared: bool,
        plugins: tuple[str, ...] = (),
    ) -> None:
        tune_process(num_threads)
        self._tune_thread()
        node = ray.get_runtime_context().get_node_id()
        # Every part holds the lock of the node's directory, even if it does not use the memory.
        self._memory = memory.hold(node, _object_store_bytes(node) if shared else 0)
        try:
            import_plugins(plugins)  # without any too: installed packages register by entry points
            self._part = make(shared=self._memory) if shared else make()
        except (ValueError, RunFailed) as error:
            self._mistake = error

    def _tune_thread(self) -> None:
        """Configure the main thread, before it makes the part."""

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._made(), method)(*args)

    def _made(self) -> object:
        if self._mistake is not None:
            raise self._mistake
        return self._part

    def ready(self) -> tuple[int, str, str]:
        """The id of the process, and the address and the id of its node.

        Raises:
            ValueError, RunFailed: the part cannot be made.
        """
        self._made()
        node = ray.get_runtime_context().get_node_id()
        return os.getpid(), ray.util.get_node_ip_address(), node

    def remove_memory(self) -> None:
        self._memory.remove()

    def rendezvous(self, loopback: bool, port: int | None) -> tuple[str, int]:
        return meeting_point("127.0.0.1" if loopback else ray.util.get_node_ip_address(), port)


class HostWithAside(Host):
    """A host with a second thread.

    With a concurrency group, Ray runs the calls in one thread, in their order, and the calls of the
    group in another; neither is the main thread. Only the first has OpenMP helper threads: with
    helpers for the main thread too, updates took 24 ms instead of 18.5.
    """

    _is_tuned = False

    def _tune_thread(self) -> None:
        from ebm_dist.core.threads import without_helpers

        without_helpers()

    @ray.method(concurrency_group=ASIDE)
    def aside(self, method: str, *args: Any) -> Any:
        if not self._is_tuned:  # Ray always uses the same thread
            self._is_tuned = True
            self._tune_thread()
        return getattr(self._made(), method)(*args)


def _object_store_bytes(node: str) -> int:
    """The size of Ray's object store on `node`."""
    resources = [known["Resources"] for known in ray.nodes() if known["NodeID"] == node]
    return int(sum(known.get("object_store_memory", 0) for known in resources))
