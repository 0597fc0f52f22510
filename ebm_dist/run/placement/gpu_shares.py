"""Divides the GPUs that the learner ranks leave among the workers.

A request for a whole GPU gets a device to itself. Fractional requests are packed: Ray fills one
device before it uses the next (best fit), so the size of the requests determines how many devices
are used. With requests of 1/2, 64 workers would use 32 of 63 devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebm_dist.core.errors import UserError


@dataclass(frozen=True, slots=True)
class Shares:
    """GPU requests of a rank and of the workers, in one or two sizes.

    `small` is half of `large` if they differ. If one size divides the other, packing leaves no
    gaps in any order; thirds and halves would.
    """

    rank: float = 0.0
    large: float = 0.0
    num_large: int = 0
    """Number of workers that request `large` in the full pool."""
    small: float = 0.0

    def next(self, held: Sequence[float]) -> float:
        """The request of another worker if the existing ones hold `held`."""
        return self.large if held.count(self.large) < self.num_large else self.small


def share_out(num_gpus: int, num_ranks: int, num_workers: int) -> Shares:
    """Divide `num_gpus` devices: a whole one for each rank, the rest for the workers.

    Raises:
        UserError: there are too few devices.
    """
    left = num_gpus - num_ranks
    if num_gpus == num_ranks == 1:
        part = _fraction(num_workers + 1)
        return Shares(part, part, num_workers, part)
    if left < 1:
        # NCCL refuses two ranks on one device.
        raise UserError(
            f"learner.num_ranks: {num_ranks} ranks and {num_workers} workers need at least "
            f"{num_ranks + 1} GPUs, there are {num_gpus}; lower learner.num_ranks to 1 "
            "to let learner and workers share, or set runtime.device to cpu"
        )
    if num_workers <= left:
        return Shares(1.0, 1.0, num_workers, 1.0)
    of_device = num_workers // left
    # As many devices take twice as many workers as the full pool requires.
    num_crowded = -(-(num_workers - of_device * left) // of_device)
    return Shares(
        1.0,
        _fraction(of_device),
        of_device * (left - num_crowded),
        _fraction(2 * of_device if num_crowded else of_device),
    )


def _fraction(parts: int) -> float:
    """The largest fraction of a device that fits `parts` times; Ray counts in steps of 1e-4."""
    return (10_000 // parts) / 10_000
