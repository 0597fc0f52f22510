"""Handlers of SIGINT, SIGTERM and SIGHUP: raise KeyboardInterrupt, or ask a run to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_AGAIN_S = 0.05


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Context in which each of the signals raises KeyboardInterrupt, so every `finally` runs."""
    num_imports = _num_imports(sys._getframe())

    def interrupt(number: int, frame: FrameType | None) -> None:
        # An interrupted import leaves an incomplete module behind; torch, for one, continues with
        # an incomplete numpy. So the signal is sent again until no import is running.
        if _num_imports(frame) > num_imports:
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        raise KeyboardInterrupt

    with _handled(interrupt):
        yield


@contextlib.contextmanager
def asking(stop: threading.Event) -> Iterator[None]:
    """Context in which the first signal sets `stop`; further ones raise KeyboardInterrupt."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with _handled(ask):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread only
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # set by `nohup`
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            if old is not None:
                signal.signal(number, old)


def _num_imports(frame: FrameType | None) -> int:
    """The number of frames of the import system from `frame` outwards."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count
