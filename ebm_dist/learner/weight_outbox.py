"""Weights on their way from an update to those who read them: averaged once and sent once."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ebm_dist.learner import Ema
from ebm_dist.learner.packed import PackedWeights


@dataclass(slots=True)
class _Waiting:
    packed: PackedWeights
    flat: np.ndarray | None = None
    """On the CPU, and in the average; None until then."""


class Outbox:
    """Filled by the thread that makes the updates, emptied by the one that publishes.

    Both may come to read the average: whoever is first brings what waits into it, in the order of
    the updates, so that it has the same bits whatever the timing.
    """

    def __init__(self, decay: float, flat: np.ndarray, *, num_averaged: int) -> None:
        """
        Args:
            decay, flat, num_averaged: as `Ema` takes them; `flat` (N,) are the first weights.
        """
        self._ema = Ema(decay, flat, num_averaged=num_averaged)
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()

    def add(self, packed: PackedWeights) -> None:
        """The weights after one more update."""
        # Without the lock, which the other thread holds for a whole transfer.
        self._waiting.append(_Waiting(packed))

    def take(self, average: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """The oldest weights that wait and, if asked for, the average up to them."""
        with self._lock:
            assert self._waiting, "no update was made since the last weights were taken"
            flat = self._include(self._waiting.popleft())
            # A copy: whoever sends it may read it when the next update is in the average.
            return flat, self._ema.flat.clone().numpy() if average else None

    def begin(self, flat: np.ndarray, average: dict[str, Tensor] | None) -> None:
        """Average from the weights `flat` on, or from `average`, which `state` returned.

        Weights that still wait are sent as they are, and have no part in it.
        """
        with self._lock:
            self._include_all()
            self._ema = Ema(self._ema.decay, flat, num_averaged=self._ema.num_averaged)
            if average is not None:
                self._ema.load_state(average)

    def state(self) -> dict[str, Tensor]:
        """The average of all updates so far, for a checkpoint."""
        with self._lock:
            self._include_all()
            return self._ema.state()

    def _include_all(self) -> None:
        for waiting in self._waiting:
            self._include(waiting)

    def _include(self, waiting: _Waiting) -> np.ndarray:
        if waiting.flat is None:
            waiting.flat = waiting.packed.on_host()
            self._ema.update(waiting.flat)
        return waiting.flat
