"""Bounds on the MCMC steps per update, kept by credits.

The negatives of an update take `needed` chain steps. All others are extra steps: of repairs, of
leases that are dropped or lost, and of spare rounds, whose chains stay in the buffer. Below `low`
the learner waits while spare rounds run. Above `high` it waits for rounds in flight that would
otherwise become too old and have to be repaired or replaced. The model is Reverb's limiter of
samples per insert (Cassirer et al. 2021, arXiv:2102.04736); the counts are in the checkpoint.

After U updates, the committed steps lie between low * U and
high * U + (rounds ahead + 1) * steps of a round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class StepBudget:
    """The lower and upper bound on chain steps (chains x steps) per update."""

    low: float
    high: float
    needed: int
    """Chain steps of the negatives of one update."""
    round_steps: int
    """Chain steps of one round."""

    def missing(self, updates: int, extra: int) -> bool:
        """Whether the update after `updates` needs more than `extra` extra steps."""
        return extra + _ROUNDING < (self.low - self.needed) * (updates + 1)

    def credit(self, updates: int, extra: int) -> float:
        """Extra steps that may still be made before the update after `updates`."""
        return (self.high - self.needed) * (updates + 1) - extra

    def spare_rounds(self, step: int) -> int:
        """Number of spare rounds of the update after `step`, a function of `step` alone."""
        if self.low <= self.needed:
            return 0
        each = (self.low - self.needed) / self.round_steps
        return math.ceil(each * (step + 1) - _ROUNDING) - math.ceil(each * step - _ROUNDING)

    @property
    def max_spare_rounds(self) -> int:
        """Largest value of `spare_rounds` over all updates."""
        return max(0, math.ceil((self.low - self.needed) / self.round_steps - _ROUNDING))


def num_late(
    versions: Mapping[int, int], version: int, max_lag: int, left: int, per_update: int
) -> int:
    """How many leases will lag too far before they are consumed, even in the best order.

    Args:
        versions: number of leases, by the version of the weights that moved them.
        version: version of the learner's weights.
        max_lag: a lease of version v may be consumed up to version v + max_lag.
        left: leases that the update at `version` still takes.
        per_update: leases that each later update takes.
    """
    # Jobs of unit length with deadlines: the most crowded interval gives the number that miss.
    late, before = 0, 0
    for moved_at in sorted(versions):
        before += versions[moved_at]
        room = moved_at + max_lag - version
        late = max(late, before - (left + per_update * room if room >= 0 else 0))
    return late
