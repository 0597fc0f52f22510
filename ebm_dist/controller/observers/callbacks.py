"""Calls the user's callbacks in the driver process. A callback may stop the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ebm_dist.config.sections import CallbackSection
from ebm_dist.core.errors import RunFailed, UserError, one_line
from ebm_dist.core.plugins import load_target
from ebm_dist.core.section import nearest

HOOKS = ("on_update", "on_evaluation", "on_checkpoint", "on_end")

log = logging.getLogger("ebm_dist")


class Callbacks:
    """The callbacks of a run, called in the given order.

    They run between two updates in the thread that called `train`, and the run waits for them. An
    exception is stored in `failure` and stops the run like a request to stop, so that the run first
    writes its checkpoint.
    """

    def __init__(self, callbacks: Iterable[tuple[str, Any]] = (), *, num_updates: int = 0) -> None:
        """
        Args:
            callbacks: (name, object) of each.
            num_updates: updates of the run; a request to stop after the last has no effect.
        """
        self.stopped_by: str | None = None
        """Name of the callback that stopped the run."""
        self.failure: RunFailed | None = None
        self._num_updates = num_updates
        self._step = 0
        self._hooks: dict[str, list[tuple[str, Callable[..., Any]]]] = {hook: [] for hook in HOOKS}
        for name, item in callbacks:
            self.add(name, item)

    def add(self, name: str, item: Any) -> None:
        """Call the hooks of `item` too, after those of the others."""
        for hook in HOOKS:
            if hasattr(item, hook):
                self._hooks[hook].append((name, getattr(item, hook)))

    @property
    def end_run(self) -> bool:
        """Whether the run must stop before its last update."""
        return self.stopped_by is not None or self.failure is not None

    @property
    def why_stopped(self) -> str:
        """Why the run stopped, to be followed by "at update N"."""
        if self.failure is not None:
            return "stopped by an exception in a callback"
        return f"stopped by callback {self.stopped_by}" if self.stopped_by else "stopped"

    def check(self) -> None:
        """Raise `failure`, if there is one."""
        if self.failure is not None:
            raise self.failure

    def on_update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._call("on_update", step, metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._call("on_evaluation", step, metrics)

    def on_checkpoint(self, path: Path) -> None:
        self._call("on_checkpoint", path)

    def on_end(self, result: object) -> None:
        self._call("on_end", result)

    def _call(self, hook: str, *args: Any) -> None:
        for name, function in self._hooks[hook]:
            if self.failure is not None:
                return
            # A copy for each, so that a callback cannot change what the log or the next one gets.
            own = [dict(arg) if isinstance(arg, Mapping) else arg for arg in args]
            try:
                asks = function(*own)
            except (Exception, SystemExit) as error:
                log.exception("callback %s raised in %s", name, hook)
                what = one_line(f"{type(error).__name__}: {error}")
                self.failure = RunFailed(
                    f"callback {name} raised in {hook} at update {self._step}: {what}"
                )
                self.failure.__cause__ = error
                return
            early = self._step < self._num_updates
            if isinstance(asks, bool | np.bool_) and asks and early and not self.stopped_by:
                self.stopped_by = name


def load_callbacks(
    sections: Iterable[CallbackSection], given: Iterable[object] = ()
) -> list[tuple[str, Any]]:
    """Name and object of each callback: first those of the config, then those given in Python.

    Raises:
        UserError: a target cannot be imported or constructed, or has none of the hooks.
    """
    found = []
    for index, section in enumerate(sections):
        key = f"callbacks.{index}"
        make = load_target(section.target, f"{key}.target")
        try:
            callback = make(**section.params)
        except Exception as error:
            what = one_line(f"{type(error).__name__}: {error}")
            raise UserError(
                f"{key}.params: {section.target} cannot be made of them ({what}); correct them"
            ) from error
        found.append((section.target, _checked(callback, f"{key}.target: {section.target}")))
    if not isinstance(given, Iterable):
        name = type(given).__qualname__
        raise UserError(f"callbacks: expected a list of objects, got a {name}; pass [{name}(...)]")
    for index, callback in enumerate(given):
        where = f"callbacks[{index}]"
        if isinstance(callback, type):
            name = callback.__name__
            raise UserError(f"{where}: expected an object, got the class {name}; pass {name}(...)")
        name = type(callback).__qualname__
        found.append((name, _checked(callback, f"{where}: {name}")))
    return found


def _checked(callback: Any, where: str) -> Any:
    if not any(callable(getattr(callback, hook, None)) for hook in HOOKS):
        own = [name for name in dir(callback) if not name.startswith("_")]
        close = next((f"; {name}{hint}" for name in own if (hint := nearest(name, HOOKS))), "")
        raise UserError(f"{where} has none of the methods {', '.join(HOOKS)}{close}; add one")
    return callback
