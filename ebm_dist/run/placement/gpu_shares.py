"""How workers share the GPUs that the learner ranks leave.

A claim of a whole GPU is a device of its own. With fractions Ray fills one device before it opens
the next (best fit), so the size of the claims decides how many devices have work: with halves, 64
workers would keep 32 of 63 devices busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebm_dist.core.errors import UserError


@dataclass(frozen=True, slots=True)
class Shares:
    """Claims of GPUs: of a rank, and of the workers, which are of one kind or of two.

    Of two kinds the `small` claim is half of the `large` one. Sizes of which one divides the other
    leave no gap, in whatever order they come; thirds beside halves would.
    """

    rank: float = 0.0
    large: float = 0.0
    num_large: int = 0
    """Workers that claim `large`, where all of them are there."""
    small: float = 0.0

    def next(self, held: Sequence[float]) -> float:
        """What a worker claims beside the others, which hold `held`."""
        return self.large if held.count(self.large) < self.num_large else self.small


def share_out(num_gpus: int, num_ranks: int, num_workers: int) -> Shares:
    """Share `num_gpus` devices out: a whole one for each rank, what is left for the workers.

    Raises:
        UserError: there are too few.
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
    # Devices that hold twice as many, until there is room for all workers.
    num_crowded = -(-(num_workers - of_device * left) // of_device)
    return Shares(
        1.0,
        _fraction(of_device),
        of_device * (left - num_crowded),
        _fraction(2 * of_device if num_crowded else of_device),
    )


def _fraction(parts: int) -> float:
    """A share of which `parts` fit on a device; Ray counts in steps of 1e-4."""
    return (10_000 // parts) / 10_000
