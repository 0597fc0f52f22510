"""A copy of the weights on the model's device, which another thread moves to the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class PackedWeights:
    """Flat weights (N,) float32 of one update; later updates do not change them."""

    def __init__(self, flat: Tensor) -> None:
        """
        Args:
            flat: a copy that was made on the current stream of its device.
        """
        self._flat = flat
        self._made: torch.cuda.Event | None = None
        if flat.is_cuda:
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(flat.device))

    def on_host(self) -> np.ndarray:
        """The weights (N,) on the CPU. Call it once, from any thread."""
        if self._made is None:
            return self._flat.numpy()
        # All threads share the default stream of a device. On it, the transfer would queue behind
        # the kernels of the next update.
        stream = torch.cuda.Stream(self._flat.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._made)
            return self._flat.cpu().numpy()
