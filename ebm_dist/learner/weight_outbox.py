"""Queue of weights between the thread that makes updates and the thread that publishes them."""

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
    """The weights on the CPU, once they are part of the average; None before."""


class WeightOutbox:
    """Weights to publish, and their moving average.

    One thread makes updates and adds their weights, another publishes them. Both may read the
    average: the first reader adds all queued weights to it, in the order of the updates, so its
    bits do not depend on timing.
    """

    def __init__(self, decay: float, flat: np.ndarray, *, num_averaged: int) -> None:
        """
        Args:
            decay, flat, num_averaged: the arguments of `Ema`; `flat` (N,) are the first weights.
        """
        self._ema = Ema(decay, flat, num_averaged=num_averaged)
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()

    def add(self, packed: PackedWeights) -> None:
        """Append the weights of one more update."""
        # Does not take the lock, which the other thread holds during a whole transfer.
        self._waiting.append(_Waiting(packed))

    def take(self, average: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """The oldest queued weights and, if `average`, the average up to them."""
        with self._lock:
            assert self._waiting, "no update was made since the last weights were taken"
            flat = self._include(self._waiting.popleft())
            # A copy, since the next update may enter the average while this one is being sent.
            return flat, self._ema.flat.clone().numpy() if average else None

    def begin(self, flat: np.ndarray, average: dict[str, Tensor] | None) -> None:
        """Restart the average from the weights `flat`, or from `average`, a result of `state`.

        Weights that are queued now are still published, but do not enter the new average.
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
