"""A round of MCMC in flight, and the committed lease that it becomes."""

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
"""`negatives`: the chains become negatives. `repair`: stale negatives are moved again. `spare`: the
chains stay in the buffer."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The answer of a shard that drew a lease before its round began: the lease or, if the worker
    is not known yet, a reference that is done when the lease is drawn."""

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
    """Version of the weights with which it last started; -1 while it waits."""
    ready_id: int | None = None
    """For a repair: the committed lease whose chains are moved again."""
    drawn: Drawn = Drawn()
    member: Member | None = None
    weights: Ref[np.ndarray] | None = None
    """The weights with which it last started."""
    leased: Ref[Lease | None] | None = None
    """The shard's answer to the checkout."""
    moved: Ref[MovedChains | None] | None = None
    """The worker's answer."""
    ref: Ref[CheckinReply] | None = None
    """The shard's answer to the checkin, the last of the three calls."""
    attempts: int = 0
    trouble: str = ""
    """Why its last attempt failed."""
    starved: bool = False
    """Whether its shard had too few free chains at the last attempt."""
    started: float = 0.0
    """When its last attempt began, on the scheduler's clock."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A lease whose chains are committed and can become negatives."""

    lease_id: int
    shard: int
    version: int
    num_steps: int
    num_chains: int
    stats: Mapping[str, float]

    @classmethod
    def of(cls, round_: Round, reply: CheckinReply) -> Committed:
        """The lease of `round_`, from the shard's reply to the checkin."""
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
        f"round {round_.lease_id} of shard {round_.shard} failed {MAX_ATTEMPTS} times; the last "
        f"time: {round_.trouble}. If memory ran out, lower workers.num_chains; run.log has the "
        "earlier failures"
    )
