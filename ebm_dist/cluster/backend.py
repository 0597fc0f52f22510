"""What the controller knows of the parts: handles, references, and the backend that has them.

`inline.InlineBackend` runs each call at once and keeps its result; `ray_backend.RayBackend` sends
it to an actor. A reference may be passed as an argument of a later call: the data then goes from
actor to actor and never through the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ebm_dist.cluster.halt import Halt
from ebm_dist.core.errors import RunFailed

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Ref(Generic[T_co]):
    """A value of type T that may not be there yet: an `InlineResult`, or Ray's ObjectRef."""

    __slots__ = ()


class PartDied(RunFailed):
    """The process or node of a part is gone; the caller replaces it or stops the run."""


class ObjectLost(PartDied):
    """What a call was given, or its result, was held by a node that is gone.

    The part that was called may be well. Nothing brings the object back: a call is not repeated
    by itself, and results do not outlive the object store of the node that computed them.
    """


UNREACHABLE_S = 90.0
"""Longer than Ray takes to give a node up: 63 s by its own settings, 37 s by those of launch."""


class Unreachable(PartDied):
    """A part cannot be reached, and whether it is gone is not known yet.

    It is `UNREACHABLE_S` later: its node has been given up, or its cable mended.
    """


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, as Ray sees it at the moment."""

    id: str
    draining: bool
    """Its end has been announced: what runs there may finish, nothing new starts there."""
    free: dict[str, float]
    """Resources that nobody has claimed, by Ray's names."""
    total: dict[str, float] = field(default_factory=dict)
    """All that it has."""


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """How an actor is started; a run in one process reads `num_threads` alone."""

    num_threads: int | None = None
    """Threads of torch; those of the machine when left out."""
    num_cpus: float = 0.0
    """CPUs that it claims on a cluster."""
    num_gpus: float = 0.0
    """GPUs that it claims."""
    beside_driver: bool = False
    """Start it on the driver's machine, whose disk holds the run directory."""
    any_order: bool = False
    """Run a call as soon as its arguments are there. Otherwise calls run in the order in which
    they were made, and a call that waits for another part delays all later ones."""
    aside: bool = False
    """Give it a second thread, which runs the calls of `Handle.aside`."""
    shared: bool = False
    """Call `make(shared=...)` with the memory that the parts of the run share on its node, a
    `shared_memory.NodeMemory`. In one process the argument is left out."""
    node: str | None = None
    """Id of the node to start it on, once there is room; Ray chooses when left out."""


DEFAULTS = ActorOptions()


class Handle(Protocol):
    """One part of the graph, wherever it runs. `controller.clients` gives its methods types."""

    name: str
    node: str | None
    """Id of the node that it was put on, None where Ray chose."""
    num_gpus: float
    """Its claim."""

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        """Start `method(*args)`; returns one reference, or a list of `num_returns`."""
        ...

    def aside(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        """As `call`, in the second thread, in order with its like; see `ActorOptions.aside`."""
        ...


class Backend(Protocol):
    """Creates parts and waits for them."""

    concurrent: bool
    """Whether parts work at the same time, or each where it is called."""
    scattered: bool
    """Whether they are on several nodes: an object may then be lost with the one that holds it,
    and the others live on."""
    halt: Halt
    """Whether the run is to end; whoever waits long looks at it."""

    def spawn(
        self, make: Callable[..., object], name: str, options: ActorOptions = DEFAULTS
    ) -> Handle:
        """Start an actor that holds the part `make()`."""
        ...

    def put(self, value: T) -> Ref[T]: ...
    def wait(self, refs: Sequence[Ref[T]], timeout: float) -> list[Ref[T]]:
        """Those of `refs` that are done, waiting up to `timeout` seconds for a first one."""
        ...

    def get(self, ref: Ref[T], timeout: float) -> T:
        """The value; raises what the call raised, PartDied, or TimeoutError."""
        ...

    def lost(self, ref: Ref[object]) -> bool:
        """Whether the value of a finished call is known to be gone with the node that held it."""
        ...

    def rendezvous(self, handle: Handle, port: int | None = None) -> Ref[tuple[str, int]]:
        """Reference of (host, port) of the machine that `handle` runs on.

        Args:
            port: to be free there, or a UserError names learner.port; any free one when left out.
        """
        ...

    def await_started(self, handles: Sequence[Handle]) -> tuple[Handle, PartDied] | None:
        """Wait until each constructor has run; raises what it raised.

        Returns:
            The first that died meanwhile, and how; the others are not waited for any more.
        """
        ...

    def nodes(self) -> list[Node]:
        """The cluster's nodes; none where there is one machine or Ray does not tell."""
        ...

    def where(self, handle: Handle) -> str | None:
        """Id of the node that the part runs on, None where it has not started or none is known."""
        ...

    def alive(self, handle: Handle, timeout: float = 0.5) -> bool:
        """False when the part is known to be gone; one that is busy for `timeout` s is not."""
        ...

    def kill(self, handle: Handle) -> None: ...
    def close(self) -> None: ...


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def fault_of_the_machine(error: BaseException) -> str | None:
    """In one line what a part raised, if its device or memory may be the cause: then another
    process may succeed.

    Torch raises RuntimeError, or a subclass, for out of memory, for a fault of the GPU and for a
    collective that lost somebody. Of ours, RunFailed means the run and not the machine.
    """
    cause = getattr(error, "cause", None) or error  # Ray wraps it
    if isinstance(cause, RuntimeError | MemoryError) and not isinstance(cause, RunFailed):
        return first_line(cause)
    return None
