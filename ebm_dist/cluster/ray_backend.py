"""The Ray boundary: parts as actors, on a local Ray of our own or on a running cluster."""

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
from ebm_dist.cluster.own_ray import OwnRay, RayDied
from ebm_dist.cluster.ray_starts import (
    RayHandle,
    Starts,
    constructor_error,
    unreadable_argument,
    unsendable_argument,
)
from ebm_dist.cluster.ray_temp import private_temp_dir
from ebm_dist.cluster.shared_memory import RunMemory
from ebm_dist.cluster.stall import HALT_CHECK_S
from ebm_dist.core.errors import RunFailed, UserError

log = logging.getLogger("ebm_dist")

FAREWELL_S = 5.0
"""How long the end of a run waits for one part on each node to remove what it has mapped there."""


class RayBackend:
    """Parts as Ray actors, on a local Ray of our own or on a running cluster."""

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
            told: whether the run is told to stop.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray runs actors at niceness 15: beside any other program they would get its leavings.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Workers of Ray inherit this; a hundred lines of DeepSpeed and Ray advice would
        # bury the one line that matters.
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        # As launch/common.sh has it: by Ray's 20 s this process would drop, while a cable is out,
        # the connections on which others wait for its answers, and they would wait for ever.
        os.environ.setdefault("RAY_grpc_keepalive_timeout_ms", "60000")
        # By Ray's 60 s a process that imports Ray itself from a slow disk would be ended, and begin
        # anew with the same.
        os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")
        require_token(address)
        address, key = chosen_address(address)
        self.local = address == "local"
        self.scattered = not self.local
        if self.local:
            # Loopback only: a Ray that others can reach runs anybody's code. Asked for 127.0.0.1,
            # Ray takes the machine's outer address all the same; as on a laptop it does not.
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
            self._init(options)
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

    def _init(self, options: dict[str, Any]) -> None:
        """`ray.init`, again where a busy machine outlasted Ray's own 30 s for its raylet."""
        for attempts_left in (2, 1, 0):
            try:
                self._ray.init(**options)
                return
            except Exception as error:
                if not (self.local and attempts_left and "timed out" in str(error)):
                    raise
                self._ray.shutdown()
            except BaseException:  # a signal: what has been started must not stay
                self._ray.shutdown()
                raise

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
            # Before torch is imported, or its pools keep the size they were born with.
            env["OMP_NUM_THREADS"] = str(options.num_threads)
            env["MKL_NUM_THREADS"] = env["OMP_NUM_THREADS"]
        if options.aside:
            # Ray then runs all calls in threads other than the main one. Where each has a heap of
            # its own, glibc returns what they free, whatever `tune_process` says: 2,000 page
            # faults in an update. It must be known before the process starts.
            env["MALLOC_ARENA_MAX"] = "1"
        # Ray gives a dead actor's name free some time later; a successor has its own.
        count = self._num_spawned[name] = self._num_spawned.get(name, 0) + 1
        where = "DEFAULT"
        if options.beside_driver:
            where = self._on(self._own_node)
        elif options.node is not None:
            where = self._on(options.node)
        host = self._host_with_aside if options.aside else self._host
        host = host.options(
            name=name if count == 1 else f"{name}.{count}",
            # On a Ray of our own the threads share the cores out; a claim could only
            # keep an actor from starting.
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
        except TypeError as error:  # with all of the arguments in its text
            if (line := unsendable_argument(make, self._ray.cloudpickle.dumps)) is None:
                raise
            raise UserError(line) from error
        handle = RayHandle(name, actor, node=options.node, num_gpus=options.num_gpus)
        self._handles.append(handle)
        self._starts.begin(handle, actor.ready.remote())
        return handle

    def _on(self, node: str) -> Any:
        # A soft affinity has been seen to miss a node that had room.
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
            # On one machine nothing is fetched that would have to be fetched anew.
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
            # An argument that failed wraps its own error in that of the call which was given it.
            while isinstance(cause, errors.RayTaskError) and cause.cause is not None:
                cause = cause.cause
            # Ray wraps what a part raised; the controller decides by its type.
            if isinstance(cause, (UserError, RunFailed, ValueError)):
                raise cause from None
            if isinstance(cause, errors.RayError):
                raise self._gone(cause) from None
            raise
        except errors.RayError as error:
            self._check()
            cause = constructor_error(error)
            if isinstance(cause, (UserError, RunFailed, ValueError)):
                raise cause from None
            if (line := unreadable_argument(error)) is not None:
                raise UserError(line) from None
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> PartDied:
        # Of results the driver is the owner, so they are lost with the node that holds them:
        # ObjectReconstructionFailedError. The others of the family are for what parts own.
        if isinstance(error, self._errors.ObjectLostError):
            return ObjectLost(f"an object was lost with its node ({first_line(error)})")
        if isinstance(error, self._errors.ActorUnavailableError):
            return Unreachable(first_line(error))
        return PartDied(first_line(error))

    def lost(self, ref: Ref[object]) -> bool:
        """See `Backend.lost`; does not wait.

        A part on another node learns of the loss late: its raylet asks where an object is after
        10 s, 20 s more, 40 s more, and so on. Here, where the object is owned, it is known as
        soon as Ray has given the node up.
        """
        try:
            self._ray.get(ref, timeout=0)
        except self._errors.GetTimeoutError:  # on its way, or somewhere else
            return False
        except self._errors.ObjectLostError:
            return True
        except self._errors.RayError:
            return False
        return False

    def where(self, handle: Handle) -> str | None:
        assert isinstance(handle, RayHandle)
        return handle.runs_on

    def alive(self, handle: Handle, timeout: float = 0.5) -> bool:
        """False when Ray knows that the actor is dead; a busy actor counts as alive.

        Of an actor that cannot be reached Ray knows only when it has given up its node: until then
        this waits, as a shard that was taken for dead would lose its latest chains for nothing.

        Args:
            timeout: seconds for the actor to answer; 0 asks Ray alone.
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
        """What Ray's control store says, which does not wait for a busy actor."""
        self._check()
        if not self._is_well:
            return False
        try:
            known = self._ray._private.state.actors(actor_id=handle.actor._actor_id.hex())
        except Exception:  # what cannot be asked says nothing
            return False
        return known.get("State") == "DEAD"

    def kill(self, handle: Handle) -> None:
        """End the part's process, if it has not ended yet."""
        assert isinstance(handle, RayHandle)
        handle.killed = True
        if self._is_well:
            with contextlib.suppress(self._errors.RayError):
                self._ray.kill(handle.actor, no_restart=True)
        self._handles = [known for known in self._handles if known is not handle]

    def close(self) -> None:
        """Stop our actors, and the Ray that we started; a cluster that we joined goes on."""
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
        """Have the nodes other than our own freed of what the parts have mapped there.

        All parts of a node are asked, since one may be busy or stuck; one answer will do.
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
                with contextlib.suppress(self._errors.RayError):  # it is dead
                    self._ray.get(ref, timeout=1.0)
                    left.discard(node)
