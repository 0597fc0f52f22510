"""The Ray backend: runs parts as actors, on a new local Ray or on a running cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from ebm_dist.cluster.access import chosen_address, instead, require_token, resolved
from ebm_dist.cluster.backend import (
    DEFAULTS,
    UNREACHABLE_S,
    ActorOptions,
    Handle,
    Node,
    ObjectLost,
    PartDied,
    Ref,
    T,
    Unreachable,
    first_line,
)
from ebm_dist.cluster.halt import Halt
from ebm_dist.cluster.own_ray import OwnRay, RayDied, init_ray
from ebm_dist.cluster.ray_starts import (
    RayHandle,
    Starts,
    unreadable_argument,
    unsendable_argument,
)
from ebm_dist.cluster.ray_temp import private_temp_dir
from ebm_dist.cluster.shared_memory import RunMemory
from ebm_dist.cluster.stall import HALT_CHECK_S
from ebm_dist.core.errors import RunFailed, UserError

log = logging.getLogger("ebm_dist")

FAREWELL_S = 5.0
"""Seconds for which the end of a run waits until one part on each node has removed the files in
shared memory."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray runs actors at niceness 15, so any other program would slow them down.
    "RAY_worker_niceness": "0",
    # Inherited by the actors; hides a hundred lines of warnings of DeepSpeed and Ray.
    "PYTHONWARNINGS": "ignore",
    # As in launch/common.sh. With Ray's 20 s, this process would close connections during a network
    # outage, and parts that wait for an answer on them would wait for ever.
    "RAY_grpc_keepalive_timeout_ms": "60000",
    # Ray's 60 s would end a process that imports Ray from a slow disk, and start it again.
    "RAY_worker_register_timeout_seconds": "300",
}
"""Settings of Ray, where the user has made no other."""


class RayBackend:
    """Runs parts as Ray actors, on a new local Ray or on a running cluster."""

    concurrent = True

    def __init__(
        self,
        address: str,
        *,
        namespace: str,
        start_timeout_s: float,
        object_store_bytes: int | None = None,
        working_dir: str | None = None,
        plugins: tuple[str, ...] = (),
        told: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            working_dir: a directory that Ray ships to every node, where the actors then run.
            plugins: modules of the user that every actor imports before it makes its part.
            told: whether the run was asked to stop.
        """
        os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
        require_token(address)
        address, key = chosen_address(address)
        self.local = address == "local"
        self.scattered = not self.local
        if self.local:
            # Loopback only: other users could run code on a Ray that they can reach. Even with
            # 127.0.0.1 Ray uses the machine's outer address, unless it is set up as on a laptop.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        import ray
        from ray import exceptions
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from ebm_dist.cluster.ray_host import ASIDE, Host, HostWithAside

        self._ray: Any = ray
        self._errors = exceptions
        self._beside = NodeAffinitySchedulingStrategy
        self._start_timeout_s = start_timeout_s
        self._plugins = plugins
        options: dict[str, Any] = {
            "namespace": namespace,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if working_dir is not None:
            if not os.path.isdir(working_dir):
                raise UserError(f"runtime.working_dir: {working_dir} is no directory")
            options["runtime_env"] = {"working_dir": os.path.abspath(working_dir)}
        if self.local:
            options |= {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": object_store_bytes,
                "_temp_dir": str(private_temp_dir()),
            }
        else:
            options["address"] = resolved(address)
        try:
            init_ray(ray, options, attempts=3 if self.local else 1)
        except Exception as error:
            if self.local:
                raise RunFailed(
                    f"Ray did not start on this machine: {first_line(error)}"
                ) from error
            raise UserError(
                f"{key}: no Ray cluster answers at {address!r} ({first_line(error)}); "
                "start one with `ray start --head`, show its token (RAY_AUTH_MODE=token), "
                f"or {instead(key)}"
            ) from error
        self._own = OwnRay(ray) if self.local else None
        self.halt = Halt(told, self._own.ailing) if self._own is not None else Halt(told)
        self._memory = RunMemory(namespace.removeprefix("ebm_dist-"), secrets.token_hex(4))
        self._own_node = ray.get_runtime_context().get_node_id()
        self._own_memory = self._memory.hold(self._own_node)
        self._host: Any = ray.remote(Host)
        self._host_with_aside = self._ray.remote(concurrency_groups={ASIDE: 1})(HostWithAside)
        self._handles: list[RayHandle] = []
        self._starts = Starts(ray, exceptions)
        self._num_spawned: dict[str, int] = {}

    @property
    def num_gpus(self) -> int:
        return int(self._ray.cluster_resources().get("GPU", 0))

    @property
    def log_dir(self) -> str:
        return self._ray._private.worker.global_worker.node.get_logs_dir_path()

    def spawn(
        self, make: Callable[..., object], name: str, options: ActorOptions = DEFAULTS
    ) -> RayHandle:
        self._check()
        if (gone := self.halt.ailing()) is not None:
            raise RayDied(f"{gone}, and {name} cannot be started")
        env: dict[str, str] = {}
        if options.num_threads is not None:
            # Set before torch is imported, because its thread pools keep their first size.
            env["OMP_NUM_THREADS"] = str(options.num_threads)
            env["MKL_NUM_THREADS"] = env["OMP_NUM_THREADS"]
        if options.aside:
            # Ray then runs all calls outside the main thread. If threads have heaps of their own,
            # glibc returns freed memory in spite of `tune_process`: 2,000 page faults per update.
            # glibc reads this setting only when the process starts.
            env["MALLOC_ARENA_MAX"] = "1"
        # Ray releases a dead actor's name late, so a successor has a name of its own.
        count = self._num_spawned[name] = self._num_spawned.get(name, 0) + 1
        where = "DEFAULT"
        if options.beside_driver:
            where = self._on(self._own_node)
        elif options.node is not None:
            where = self._on(options.node)
        host = self._host_with_aside if options.aside else self._host
        host = host.options(
            name=name if count == 1 else f"{name}.{count}",
            # On a local Ray, a request could only keep an actor from starting: the numbers of
            # threads divide the cores.
            num_cpus=0 if self.local else options.num_cpus,
            num_gpus=options.num_gpus,
            max_restarts=0,
            scheduling_strategy=where,
            allow_out_of_order_execution=options.any_order,
            runtime_env={"env_vars": env} if env else None,
        )
        try:
            actor = host.remote(
                make, options.num_threads, self._memory, options.shared, self._plugins
            )
        except TypeError as error:  # its text contains all arguments
            if (line := unsendable_argument(make, self._ray.cloudpickle.dumps)) is None:
                raise
            raise UserError(line) from error
        handle = RayHandle(name, actor, node=options.node, num_gpus=options.num_gpus)
        self._handles.append(handle)
        self._starts.begin(handle, actor.ready.remote())
        return handle

    def _on(self, node: str) -> Any:
        # With a soft affinity Ray has missed a node that had room.
        return self._beside(node_id=node, soft=False)

    def nodes(self) -> list[Node]:
        if self.local:
            return []
        try:
            state = self._ray._private.state
            draining = state.state.get_draining_nodes()
            free = state.available_resources_per_node()
            known = self._ray.nodes()
        except Exception as error:  # none of these is Ray's public interface
            log.debug("the nodes of the cluster are not known: %s", error)
            return []
        return [
            Node(
                node["NodeID"],
                node["NodeID"] in draining,
                free.get(node["NodeID"], {}),
                node["Resources"],
            )
            for node in known
            if node["Alive"]
        ]

    def await_started(self, handles: Sequence[Handle]) -> tuple[Handle, PartDied] | None:
        return self._starts.wait(self, handles, self._start_timeout_s)

    def _check(self) -> None:
        if self._own is not None:
            self._own.check()

    @property
    def _is_well(self) -> bool:
        return self._own is None or self._own.well

    def rendezvous(self, handle: Handle, port: int | None = None) -> Ref[tuple[str, int]]:
        assert isinstance(handle, RayHandle)
        return handle.actor.rendezvous.remote(self.local, port)

    def put(self, value: T) -> Ref[T]:
        return self._ray.put(value)

    def wait(self, refs: Sequence[Ref[T]], timeout: float) -> list[Ref[T]]:
        if not refs:
            return []
        self._starts.note()
        unique = list(dict.fromkeys(refs))
        done, left = [], timeout
        while not done and left >= 0.0:
            self._check()
            now = min(left, HALT_CHECK_S)
            done, _ = self._ray.wait(unique, num_returns=1, timeout=now, fetch_local=False)
            left -= HALT_CHECK_S
        if done and len(unique) > 1:
            done, _ = self._ray.wait(unique, num_returns=len(unique), timeout=0, fetch_local=False)
        return done

    def get(self, ref: Ref[T], timeout: float) -> T:
        errors = self._errors
        try:
            self._check()
            # On one machine, a repeated call does not repeat a transfer.
            while self._own is not None and timeout > HALT_CHECK_S:
                with contextlib.suppress(errors.GetTimeoutError):
                    return self._ray.get(ref, timeout=HALT_CHECK_S)
                timeout -= HALT_CHECK_S
                self._check()
            return self._ray.get(ref, timeout=timeout)
        except errors.GetTimeoutError as error:
            raise TimeoutError(str(error)) from None
        except errors.RayTaskError as error:
            self._check()
            cause = error.cause
            # The error of a failed argument is wrapped in that of the call that received it.
            while isinstance(cause, errors.RayTaskError) and cause.cause is not None:
                cause = cause.cause
            # Ray wraps the exception of a part; the controller decides by its type.
            if isinstance(cause, (UserError, RunFailed, ValueError)):
                raise cause from None
            if isinstance(cause, errors.RayError):
                raise self._gone(cause) from None
            raise
        except errors.RayError as error:
            self._check()
            if (line := unreadable_argument(error)) is not None:
                raise UserError(line) from None
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> PartDied:
        # The driver owns the results, so the loss of their node is an
        # ObjectReconstructionFailedError. Its siblings are for objects that parts own.
        if isinstance(error, self._errors.ObjectLostError):
            return ObjectLost(f"an object was lost with its node ({first_line(error)})")
        if isinstance(error, self._errors.ActorUnavailableError):
            return Unreachable(first_line(error))
        return PartDied(first_line(error))

    def lost(self, ref: Ref[object]) -> bool:
        """See `Backend.lost`; does not wait.

        The owner knows of the loss as soon as Ray has declared the node dead. A part on another
        node learns of it late: its raylet repeats its query after 10, 20, 40 s and so on.
        """
        try:
            self._ray.get(ref, timeout=0)
        except self._errors.ObjectLostError:
            return True
        except self._errors.RayError:  # GetTimeoutError: on another node, or in transit
            pass
        return False

    def where(self, handle: Handle) -> str | None:
        assert isinstance(handle, RayHandle)
        return handle.runs_on

    def alive(self, handle: Handle, timeout: float = 0.5) -> bool:
        """False if Ray knows that the actor is dead; a busy actor counts as alive.

        If an actor cannot be reached, this waits until Ray has declared its node dead: a live shard
        that is replaced loses its latest chains.

        Args:
            timeout: seconds for the actor to answer; with 0 only Ray is asked.
        """
        assert isinstance(handle, RayHandle)
        deadline = time.monotonic() + UNREACHABLE_S
        while not (handle.killed or self._known_dead(handle)):
            if timeout <= 0:
                return True
            try:
                self._ray.get(handle.actor.ready.remote(), timeout=timeout)
            except self._errors.GetTimeoutError:
                return True
            except self._errors.ActorUnavailableError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.2)
            except self._errors.RayError:
                return False
            else:
                return True
        return False

    def _known_dead(self, handle: RayHandle) -> bool:
        """Whether Ray's control store says that the actor is dead. Does not wait for the actor."""
        self._check()
        if not self._is_well:
            return False
        try:
            known = self._ray._private.state.actors(actor_id=handle.actor._actor_id.hex())
        except Exception:  # not a public interface of Ray
            return False
        return known.get("State") == "DEAD"

    def kill(self, handle: Handle) -> None:
        """Kill the part's process."""
        assert isinstance(handle, RayHandle)
        handle.killed = True
        if self._is_well:
            with contextlib.suppress(self._errors.RayError):
                self._ray.kill(handle.actor, no_restart=True)
        self._handles = [known for known in self._handles if known is not handle]

    def close(self) -> None:
        """Stop the actors, and a local Ray; a cluster that the run joined continues."""
        if self._is_well:
            with contextlib.suppress(Exception):
                self._remove_memory()
        for handle in list(self._handles):
            with contextlib.suppress(Exception):
                self.kill(handle)
        self._ray.shutdown()
        self._own_memory.remove()
        self._own_memory.close()

    def _remove_memory(self) -> None:
        """Remove the files in the shared memory of the other nodes.

        All parts of a node are called, since one may hang; the answer of one suffices.
        """
        self._starts.note()
        asked = {
            handle.actor.remove_memory.remote(): handle.runs_on
            for handle in self._handles
            if handle.runs_on not in (None, self._own_node)
        }
        left = set(asked.values())
        deadline = time.monotonic() + FAREWELL_S
        while left and asked and (remaining := deadline - time.monotonic()) > 0:
            for ref in self._ray.wait(list(asked), timeout=remaining)[0]:
                node = asked.pop(ref)
                with contextlib.suppress(self._errors.RayError):  # the part is dead
                    self._ray.get(ref, timeout=1.0)
                    left.discard(node)
