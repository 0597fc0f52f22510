"""The interface between the controller and the parts: handles, references and the backend.

`inline.InlineBackend` runs each call at once and keeps its result; `ray_backend.RayBackend` sends
it to an actor. A reference may be an argument of a later call: the data then goes from actor to
actor, and not through the controller.
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
    """The future value, of type T, of a call: an `InlineResult`, or Ray's ObjectRef."""

    __slots__ = ()


class PartDied(RunFailed):
    """The process or node of a part is gone; the caller replaces it or stops the run."""


class ObjectLost(PartDied):
    """An argument or the result of a call was lost with the node that held it.

    The part that was called may be alive. The object cannot be recovered: calls are not repeated
    automatically, and a result is stored only on the node that computed it.
    """


UNREACHABLE_S = 90.0
"""Longer than Ray takes to declare a node dead: 63 s by default, 37 s with `launch/`."""


class Unreachable(PartDied):
    """A part cannot be reached, and it is not known yet whether it is dead.

    After `UNREACHABLE_S` it is known: Ray has declared its node dead, or the network works again.
    """


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster, from Ray's current list."""

    id: str
    draining: bool
    """Whether the node will be removed soon: running tasks may finish, none may start."""
    free: dict[str, float]
    """Unclaimed resources, by Ray's names."""
    total: dict[str, float] = field(default_factory=dict)
    """All resources, by Ray's names."""


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """How an actor is started; the inline backend reads only `num_threads`."""

    num_threads: int | None = None
    """Threads of torch; one for each core when left out."""
    num_cpus: float = 0.0
    """CPUs that it requests on a cluster."""
    num_gpus: float = 0.0
    """GPUs that it requests."""
    beside_driver: bool = False
    """Start it on the driver's machine, whose disk holds the run directory."""
    any_order: bool = False
    """Run each call as soon as its arguments are available. Otherwise calls run in the order in
    which they were made, and a call that waits for another part delays all later ones."""
    aside: bool = False
    """Give it a second thread, which runs the calls of `Handle.aside`."""
    shared: bool = False
    """Call `make(shared=...)` with the shared memory of the run on its node, a
    `shared_memory.NodeMemory`. The inline backend leaves the argument out."""
    node: str | None = None
    """Id of the node to start it on, once that has room; Ray chooses when left out."""


DEFAULTS = ActorOptions()


class Handle(Protocol):
    """One part of the graph in any process. `controller.clients` gives its methods types."""

    name: str
    node: str | None
    """Id of the node that it was placed on; None if Ray chose the node."""
    num_gpus: float
    """GPUs that it requested."""

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        """Start `method(*args)`; returns one reference, or a list of `num_returns`."""
        ...

    def aside(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        """As `call`, but in the part's second thread, which runs such calls in their order."""
        ...


class Backend(Protocol):
    """Creates parts and waits for them."""

    concurrent: bool
    """Whether parts run at the same time; otherwise each call runs in the caller."""
    scattered: bool
    """Whether parts may be on several nodes, so that an object can be lost with one node."""
    halt: Halt
    """Whether the run is to end; every long wait checks it."""

    def spawn(
        self, make: Callable[..., object], name: str, options: ActorOptions = DEFAULTS
    ) -> Handle:
        """Start an actor that holds the part `make()`."""
        ...

    def put(self, value: T) -> Ref[T]: ...
    def wait(self, refs: Sequence[Ref[T]], timeout: float) -> list[Ref[T]]:
        """The finished ones of `refs`; waits up to `timeout` seconds for the first."""
        ...

    def get(self, ref: Ref[T], timeout: float) -> T:
        """The value; raises what the call raised, PartDied, or TimeoutError."""
        ...

    def lost(self, ref: Ref[object]) -> bool:
        """Whether the value of a finished call is known to be lost with a node."""
        ...

    def rendezvous(self, handle: Handle, port: int | None = None) -> Ref[tuple[str, int]]:
        """A host and a free port of the machine that `handle` runs on.

        Args:
            port: the port to use; if it is taken, a UserError names learner.port. Any free port
                when left out.
        """
        ...

    def await_started(self, handles: Sequence[Handle]) -> tuple[Handle, PartDied] | None:
        """Wait until every constructor has run; raises the exception of a constructor.

        Returns:
            The first part that died meanwhile, and its error; the wait then ends.
        """
        ...

    def nodes(self) -> list[Node]:
        """The cluster's nodes; empty if there is only one machine or Ray gives no list."""
        ...

    def where(self, handle: Handle) -> str | None:
        """Id of the node that the part runs on; None if it has not started or is unknown."""
        ...

    def alive(self, handle: Handle, timeout: float = 0.5) -> bool:
        """False if the part is known to be dead; a part that is busy for `timeout` s is alive."""
        ...

    def kill(self, handle: Handle) -> None: ...
    def close(self) -> None: ...


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def fault_of_the_machine(error: BaseException) -> str | None:
    """The exception of a part, in one line, if its device or memory may be the cause, so that a
    new process may succeed; else None.

    Torch raises RuntimeError, or a subclass, for out of memory, a GPU fault and a collective that
    lost a rank. Our own RunFailed is a fault of the run, not of the machine.
    """
    cause = getattr(error, "cause", None) or error  # Ray wraps it
    if isinstance(cause, RuntimeError | MemoryError) and not isinstance(cause, RunFailed):
        return first_line(cause)
    return None
