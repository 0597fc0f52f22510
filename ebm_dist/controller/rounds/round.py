"""A round of MCMC on its way, and what is left of it once its chains are committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ebm_dist.buffer.answers import CheckinReply
from ebm_dist.cluster.backend import Ref
from ebm_dist.controller.retry import MAX_ATTEMPTS
from ebm_dist.controller.workers.load import Member
from ebm_dist.core.errors import RunFailed
from ebm_dist.core.types import Lease, MovedChains

Purpose = Literal["negatives", "repair", "spare"]
"""A round's chains become negatives; become negatives after all; or stay in the buffer."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a shard answered where the lease of a round was drawn ahead of it: the lease, or that
    it has been drawn, where it is not known yet who will have it."""

    lease: Ref[Lease | None] | None = None
    after: Ref[int] | None = None


@dataclass(slots=True)
class Round:
    """A round that was started and has not been committed."""

    lease_id: int
    shard: int
    num_steps: int
    purpose: Purpose
    version: int
    """Of the weights that it was last started under; -1 while nobody has begun it."""
    ready_id: int | None = None
    """Of a repair: the committed lease whose chains are moved again."""
    drawn: Drawn = Drawn()
    member: Member | None = None
    weights: Ref[np.ndarray] | None = None
    """What it was last started under."""
    leased: Ref[Lease | None] | None = None
    """What the shard answers to the checkout, where the worker has not been given it yet."""
    moved: Ref[MovedChains | None] | None = None
    """What the worker answers."""
    ref: Ref[CheckinReply] | None = None
    """What the shard answers to the checkin: the last of the three calls."""
    attempts: int = 0
    trouble: str = ""
    """Why it was not committed when it was last tried."""
    starved: bool = False
    """Its shard had too few free chains when it was last tried."""
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Committed:
    """A lease whose chains are ready to be negatives."""

    lease_id: int
    shard: int
    version: int
    num_steps: int
    num_chains: int
    stats: Mapping[str, float]

    @classmethod
    def of(cls, round_: Round, reply: CheckinReply) -> Committed:
        """What the shard of `round_` replied when it had committed its chains."""
        return cls(
            round_.lease_id,
            round_.shard,
            version=reply.version,
            num_steps=reply.num_steps,
            num_chains=reply.num_chains,
            stats=reply.stats,
        )


def failed_too_often(round_: Round) -> RunFailed:
    return RunFailed(
        f"round {round_.lease_id} of shard {round_.shard} failed {MAX_ATTEMPTS} times, on one "
        f"worker after another; the last time: {round_.trouble}. If memory ran out, lower "
        "workers.num_chains; run.log names the times before"
    )
