"""Batches made ahead by one thread, in the order in which they are asked for."""

from __future__ import annotations

import contextlib
import queue
import threading

from ebm_dist.data.reader import Cursor, Reader
from ebm_dist.threads import without_helpers
from ebm_dist.types import Batch


class Ahead:
    """A bounded queue of `reader.read(num)`. While it lives, the reader is the thread's own."""

    def __init__(self, reader: Reader, num: int, depth: int) -> None:
        self.num = num
        self._reader = reader
        self._queue: queue.Queue[tuple[Batch, Cursor] | BaseException] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        # A daemon, so that a program that forgets `close` still ends.
        self._thread = threading.Thread(target=self._work, name="ebm-dist-data", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Batch, Cursor]:
        """The next batch and the cursor after it; raises what the reader raised."""
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def stop(self) -> None:
        """Throw away what was made ahead. The reader is free once this returns."""
        self._stopped.set()
        while self._thread.is_alive():
            # The thread may wait for room; one place is enough for it to see the flag.
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._thread.join(timeout=0.01)

    def _work(self) -> None:
        without_helpers()
        try:
            while not self._stopped.is_set():
                self._queue.put(self._reader.read(self.num))
        except BaseException as error:
            self._queue.put(error)
