"""Runs every part in this process: a call runs at once, and its result is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ebm_dist.cluster.backend import DEFAULTS, ActorOptions, Handle, Node, Ref, T
from ebm_dist.cluster.halt import Halt
from ebm_dist.cluster.process import meeting_point, tune_process


@dataclass(slots=True, eq=False)
class InlineResult(Ref[T]):
    value: T | None = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class InlineHandle:
    name: str
    part: Any
    num_threads: int | None
    node: str | None = None
    num_gpus: float = 0.0

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        import torch

        results: list[InlineResult[Any]] = [InlineResult() for _ in range(num_returns)]
        try:
            if self.num_threads is not None and torch.get_num_threads() != self.num_threads:
                torch.set_num_threads(self.num_threads)
            value = getattr(self.part, method)(*(_resolve(arg) for arg in args))
            values = [value] if num_returns == 1 else list(value)
            for result, item in zip(results, values):
                result.value = item
        except Exception as error:  # raised again by `get`
            for result in results:
                result.error = error
        return results[0] if num_returns == 1 else results

    def aside(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        return self.call(method, *args, num_returns=num_returns)


def _resolve(arg: Any) -> Any:
    if not isinstance(arg, InlineResult):
        return arg
    if arg.error is not None:
        raise arg.error
    return arg.value


class InlineBackend:
    """Runs every part in this process, for debugging, notebooks and as the reference in tests."""

    concurrent = False
    scattered = False

    def __init__(self, told: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            told: whether the run was asked to stop.
        """
        self.halt = Halt(told)
        tune_process(None)
        self._parts: list[InlineHandle] = []

    def spawn(
        self, make: Callable[..., object], name: str, options: ActorOptions = DEFAULTS
    ) -> InlineHandle:
        handle = InlineHandle(name, make(), options.num_threads)
        self._parts.append(handle)
        return handle

    def put(self, value: T) -> InlineResult[T]:
        return InlineResult(value)

    def wait(self, refs: Sequence[Ref[T]], timeout: float) -> list[Ref[T]]:
        return list(refs)

    def get(self, ref: Ref[T], timeout: float) -> T:
        return _resolve(ref)

    def lost(self, ref: Ref[object]) -> bool:
        return False

    def nodes(self) -> list[Node]:
        return []

    def rendezvous(self, handle: Handle, port: int | None = None) -> InlineResult[tuple[str, int]]:
        return InlineResult(meeting_point("127.0.0.1", port))

    def await_started(self, handles: Sequence[Handle]) -> None:
        """Returns at once, because `spawn` runs the constructor."""

    def where(self, handle: Handle) -> str | None:
        return None

    def alive(self, handle: Handle, timeout: float = 0.5) -> bool:
        return True

    def kill(self, handle: Handle) -> None:
        self._parts = [part for part in self._parts if part is not handle]

    def close(self) -> None:
        for part in reversed(self._parts):
            if hasattr(part.part, "close"):
                with contextlib.suppress(Exception):
                    part.part.close()
        self._parts.clear()
