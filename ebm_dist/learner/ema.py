"""Exponential moving average of the flat weights, for export and evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Ema:
    """Averages flat weights (N,) float32 on the CPU.

    The average is a flat array apart from the module, so it has the same form for every ZeRO stage
    and world size.
    """

    def __init__(
        self, decay: float, flat: np.ndarray | Tensor, *, num_averaged: int | None = None
    ) -> None:
        """
        Args:
            num_averaged: how many leading numbers are averaged; all by default. The rest are
                buffers, which are copied: an average of spectral norm's unit vectors is shorter
                than one, and energies computed with it were hundreds of times too large.
        """
        self.decay = decay
        self.num_averaged = len(flat) if num_averaged is None else num_averaged
        self.flat = torch.as_tensor(flat, dtype=torch.float32).clone()
        self.num_updates = 0

    def update(self, flat: np.ndarray | Tensor, *, num_updates: int = 1) -> None:
        """Move the average towards `flat` (N,), the weights after `num_updates` more updates.

        The decay is at most (1 + n) / (10 + n) after n updates: with the full decay, the average
        would consist mostly of the random initial weights for 1 / (1 - decay) updates.
        """
        flat = torch.as_tensor(flat)
        if flat.shape != self.flat.shape:
            raise ValueError(
                f"the average holds {self.flat.numel()} weights, got {flat.numel()}; "
                "both must come from the same energy"
            )
        self.num_updates += num_updates
        early = (1 + self.num_updates) / (10 + self.num_updates)
        decay = min(self.decay, early) ** num_updates
        num = self.num_averaged
        self.flat[:num].lerp_(flat[:num], 1.0 - decay)
        self.flat[num:].copy_(flat[num:])

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint."""
        return {"flat": self.flat.clone(), "num_updates": torch.tensor(self.num_updates)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`; raises ValueError if it belongs to another energy."""
        if state["flat"].shape != self.flat.shape:
            raise ValueError(
                f"the checkpoint averages {state['flat'].numel()} weights, the energy has "
                f"{self.flat.numel()}; both must come from the same `energy` section"
            )
        self.flat.copy_(state["flat"])
        self.num_updates = int(state["num_updates"])
