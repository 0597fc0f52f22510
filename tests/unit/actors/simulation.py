"""A cluster in one thread: replies come late and in any order, and processes die when told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ebm_dist.buffer.rows import open_rows
from ebm_dist.cluster.backend import DEFAULTS, ActorOptions, ObjectLost, PartDied
from ebm_dist.cluster.halt import Halt
from ebm_dist.core.types import Lease, MovedChains

NEVER = 10**9
"""The tick of what a part that hangs will answer."""


@dataclass(eq=False)
class SimRef:
    """The result of a call, known from tick `ready_at` on."""

    compute: Callable[[], Any] | None
    ready_at: int
    involved: set[int]
    """Handles whose death before `ready_at` loses the result."""
    value: Any = None
    error: Exception | None = None


@dataclass(eq=False)
class SimHandle:
    backend: SimBackend
    name: str
    part: Any
    dead: bool = False
    node: str | None = None
    num_gpus: float = 0.0

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        return self.backend.call(self, method, args, num_returns)

    aside = call


@dataclass
class SimBackend:
    """`delay()` gives the ticks that a checkin's reply takes; a tick passes with each wait."""

    delay: Callable[[], int]
    eager: Callable[[], bool]
    """Whether a checkin is carried out at once and its reply comes late, or all of it late."""
    on_tick: Callable[[], None] = lambda: None
    concurrent: bool = True
    scattered: bool = True
    tick: int = 0
    hung: set[str] = field(default_factory=set)
    """Names of parts that are stopped: they answer nothing, and are not dead. One that is killed
    is not among them any more."""
    pending: list[SimRef] = field(default_factory=list)
    halt: Halt = field(default_factory=Halt)

    def spawn(
        self, make: Callable[..., object], name: str, options: ActorOptions = DEFAULTS
    ) -> SimHandle:
        return SimHandle(self, name, make(), node=options.node)

    def call(self, handle: SimHandle, method: str, args: tuple, num_returns: int) -> Any:
        refs = [a for a in args if isinstance(a, SimRef)]
        involved = {id(handle)}.union(*(ref.involved for ref in refs))

        def compute() -> Any:
            if handle.dead:
                raise PartDied(f"{handle.name} is dead")
            return getattr(handle.part, method)(*(self._value(a) for a in args))

        stuck = handle.name in self.hung or any(
            isinstance(a, SimRef) and a.ready_at >= NEVER for a in args
        )
        late = stuck or method in ("checkin", "hold")
        ticks = self.delay() if method == "checkin" else int(late)
        ref = SimRef(compute, NEVER if stuck else self.tick + ticks, involved)
        self.pending.append(ref)
        if method == "checkin" and isinstance(args[0], SimRef) and not stuck:
            args[0].ready_at = ref.ready_at  # it is the worker that takes the time
        if stuck and num_returns > 1:
            parts = [SimRef(compute, NEVER, involved) for _ in range(num_returns)]
            self.pending += parts
            return parts
        if not late or (not stuck and self.eager()):
            self._run(ref)
        if num_returns == 1:
            return ref
        return [self._part(ref, i) for i in range(num_returns)]

    def _part(self, whole: SimRef, index: int) -> SimRef:
        if whole.error is not None:
            return SimRef(None, whole.ready_at, whole.involved, error=whole.error)
        return SimRef(None, whole.ready_at, whole.involved, value=whole.value[index])

    def _run(self, ref: SimRef) -> None:
        if ref.compute is None:
            return
        compute, ref.compute = ref.compute, None
        try:
            ref.value = compute()
        except Exception as error:  # it belongs to whoever asks
            ref.error = error

    def _value(self, arg: Any) -> Any:
        if not isinstance(arg, SimRef):
            return arg
        self._run(arg)
        if arg.error is not None:
            raise arg.error
        return arg.value

    def wait(self, refs: Sequence[SimRef], timeout: float) -> list[SimRef]:
        self.tick += 1
        self.on_tick()
        for ref in self.pending:
            if ref.ready_at <= self.tick:
                self._run(ref)
        self.pending = [ref for ref in self.pending if ref.ready_at > self.tick]
        return [ref for ref in refs if ref.ready_at <= self.tick]

    def get(self, ref: SimRef, timeout: float) -> Any:
        if ref.ready_at >= NEVER:
            raise TimeoutError
        return self._value(ref)

    def lost(self, ref: SimRef) -> bool:
        return isinstance(ref, SimRef) and isinstance(ref.error, ObjectLost)

    def alive(self, handle: SimHandle, timeout: float = 5.0) -> bool:
        return not handle.dead

    def kill(self, handle: SimHandle) -> None:
        handle.dead = True
        self.hung.discard(handle.name)
        for ref in self.pending:
            if id(handle) in ref.involved and ref.ready_at > self.tick:
                ref.compute, ref.ready_at = None, self.tick
                ref.error = PartDied(f"{handle.name} was killed")


class SimWorker:
    """Moves chains by noise of the lease's seed and by the version, as a real round would."""

    def __init__(self, within: str | None = None) -> None:
        self.held = -1
        self.within = within

    def hold(self, weights: Any, version: int) -> int:
        self.held = version
        return version

    def run_round(
        self, lease: Lease | None, weights: Any, version: int, num_steps: int
    ) -> MovedChains | None:
        assert self.held >= 0, "a newcomer was given work before it held weights"
        if lease is None:
            return None
        start, rows, token = lease.position, None, None
        if lease.grant is not None:
            rows = open_rows(lease.grant, self.within)
            assert rows is not None, "by rows of another node"
            start = np.empty((len(lease.slots), *lease.grant.event_shape), np.float32)
            if not rows.read(lease.grant, start, lease.chain_id):
                start[:] = 0.0  # void by now
        assert start is not None
        noise = np.random.default_rng(lease.seed).normal(size=start.shape)
        position = (0.5 * start + noise + 0.01 * version).astype(np.float32)
        if rows is not None and lease.grant is not None:
            written = rows.write(lease.grant, position, lease.chain_id)
            token = lease.grant.token if written else None
        return MovedChains.of(
            lease,
            position=position if rows is None else None,
            energy=position.sum(1),
            log_weight=lease.log_weight,
            version=version,
            num_steps=num_steps,
            token=token,
        )
