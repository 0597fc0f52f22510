"""How many MCMC steps an update may take: credits that keep the ratio of the two inside a band.

The negatives of an update take `needed` chain steps, once: the learner consumes what the workers
commit, one for one. Beyond those there are extra steps. Repairs, and rounds whose chains are
dropped, take as many as it happens; spare rounds, whose chains stay in the buffer, make up for
what is missing. Each update earns credits for extra steps. Under `low` the learner waits while
spare rounds run; above `high` it waits for rounds that would else come too late and have to be
repaired or replaced. Nobody drops. After the limiter of samples per insert in Reverb (Cassirer et
al. 2021, arXiv:2102.04736), with the two sides' counts in the checkpoint.

With U updates made, all steps committed by then lie between low * U and
high * U + (rounds ahead + 1) * steps of a round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Bounds on chain steps (chains x steps) per update."""

    low: float
    high: float
    needed: int
    """Steps of the negatives of one update."""
    round_steps: int
    """Steps of one round."""

    def missing(self, updates: int, extra: int) -> bool:
        """Whether the update after `updates` asks for more than `extra` extra steps."""
        return extra + _ROUNDING < (self.low - self.needed) * (updates + 1)

    def credit(self, updates: int, extra: int) -> float:
        """Extra steps that may still be taken before the update after `updates` is made."""
        return (self.high - self.needed) * (updates + 1) - extra

    def spare_rounds(self, step: int) -> int:
        """Spare rounds of the update after `step`, where each has its own whatever happened."""
        if self.low <= self.needed:
            return 0
        each = (self.low - self.needed) / self.round_steps
        return math.ceil(each * (step + 1) - _ROUNDING) - math.ceil(each * step - _ROUNDING)

    @property
    def max_spare_rounds(self) -> int:
        """The most that `spare_rounds` is for any update."""
        return max(0, math.ceil((self.low - self.needed) / self.round_steps - _ROUNDING))


def num_late(
    versions: Mapping[int, int], version: int, max_lag: int, left: int, per_update: int
) -> int:
    """How many leases cannot be consumed before they lag too far, whatever the order.

    Args:
        versions: number of leases by the version that moved them.
        version: the learner's.
        max_lag: of a lease of version v, the last version that may consume it is v + max_lag.
        left: leases that the update at `version` takes yet.
        per_update: leases that every later one takes.
    """
    # Jobs of one length with deadlines: the most crowded interval tells how many miss theirs.
    late, before = 0, 0
    for moved_at in sorted(versions):
        before += versions[moved_at]
        room = moved_at + max_lag - version
        late = max(late, before - (left + per_update * room if room >= 0 else 0))
    return late
