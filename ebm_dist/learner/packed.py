"""The weights of one update, copied where the model is, for another thread to take from there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class PackedWeights:
    """Flat weights (N,) float32 that no later update touches."""

    def __init__(self, flat: Tensor) -> None:
        """
        Args:
            flat: a copy, made on the current stream of its device.
        """
        self._flat = flat
        self._made: torch.cuda.Event | None = None
        if flat.is_cuda:
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(flat.device))

    def on_host(self) -> np.ndarray:
        """The same (N,) on the CPU; to be called once, in any thread."""
        if self._made is None:
            return self._flat.numpy()
        # All threads share a device's default stream: there the transfer would come after
        # whatever the next update has put into it by now.
        stream = torch.cuda.Stream(self._flat.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._made)
            return self._flat.cpu().numpy()
