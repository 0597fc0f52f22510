"""What SIGINT, SIGTERM and SIGHUP do to a command: undo what is half done, or ask it to stop."""

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
    """Within it each of the signals raises KeyboardInterrupt, so that every `finally` runs."""
    num_imports = _num_imports(sys._getframe())

    def interrupt(number: int, frame: FrameType | None) -> None:
        # An import that is cut short leaves half a module behind, and torch, for one, goes on with
        # half of numpy. So the signal is sent again, until no import is under way.
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
    """Within it the first of the signals sets `stop`; further ones raise KeyboardInterrupt."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with _handled(ask):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # by `nohup`
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
    """How many frames of the import system lie at and below `frame`."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count
