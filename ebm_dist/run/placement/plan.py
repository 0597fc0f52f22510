"""Which device a run computes on, and the threads and GPU shares of its parts on one machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ebm_dist.config.sections import RuntimeConfig
from ebm_dist.core.errors import UserError
from ebm_dist.run.placement.gpu_shares import Shares, share_out


@dataclass(frozen=True, slots=True)
class Plan:
    """Threads and GPU shares by role."""

    device: str
    worker_threads: int
    learner_threads: int
    learner_share: float
    """What the ranks of a machine take of its cores."""
    shares: Shares


def available_cores() -> int:
    """Cores this process may run on (a container's share, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(
    runtime: RuntimeConfig,
    *,
    mode: Literal["sync", "async"],
    num_workers: int,
    num_ranks: int,
    worker_threads: int | None,
    learner_threads: int | None,
    num_cores: int,
    num_gpus: int,
) -> Plan:
    """Share `num_cores` cores and `num_gpus` GPUs out among workers and learner ranks.

    Sampling and learning alternate in `sync` and inline, so each may use every core while
    the other waits. In `async` the workers are always busy and take all cores between them;
    a learner rank's short step borrows from them, which costs less than cores set aside
    for it would.

    Raises:
        UserError: runtime.device asks for CUDA where there is none.
    """
    device = runtime.device
    if device == "auto":
        device = "cuda" if num_gpus > 0 else "cpu"
    if device == "cuda" and num_gpus == 0:
        raise UserError(
            "runtime.device: expected a machine with a CUDA device, found none; "
            "set runtime.device to cpu or auto"
        )
    # Inline parts run one after the other, whatever their number.
    lanes = 1 if runtime.backend == "inline" else num_workers
    ranks = 1 if runtime.backend == "inline" else num_ranks
    shares = Shares()
    if device == "cuda" and runtime.backend == "ray":
        shares = share_out(num_gpus, num_ranks, num_workers)
    # In async mode what they take is borrowed from workers that are busy.
    learner_share = 1.0 if mode == "sync" else 0.5
    return Plan(
        device=device,
        worker_threads=worker_threads or max(1, num_cores // lanes),
        learner_threads=learner_threads or max(1, int(num_cores * learner_share) // ranks),
        learner_share=learner_share,
        shares=shares,
    )
