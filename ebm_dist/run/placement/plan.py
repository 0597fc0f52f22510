"""Chooses the device of a run, and the threads and GPU requests of its parts on one machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ebm_dist.config.sections import RuntimeConfig
from ebm_dist.core.errors import UserError
from ebm_dist.run.placement.gpu_shares import Shares, share_out


@dataclass(frozen=True, slots=True)
class Plan:
    """Device, threads and GPU requests of workers and learner ranks."""

    device: str
    worker_threads: int
    learner_threads: int
    learner_share: float
    """Fraction of a machine's cores for its ranks."""
    shares: Shares


def available_cores() -> int:
    """Cores that this process may use; in a container, fewer than the machine has."""
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
    """Divide `num_cores` cores and `num_gpus` GPUs among workers and learner ranks.

    In `sync` mode and inline, sampling and learning alternate, so each may use every core while
    the other waits. In `async` mode the workers are always busy and use all cores. The learner
    shares cores with them for its short steps, which costs less than reserving cores for it.

    Raises:
        UserError: runtime.device is cuda, and there is no GPU.
    """
    device = runtime.device
    if device == "auto":
        device = "cuda" if num_gpus > 0 else "cpu"
    if device == "cuda" and num_gpus == 0:
        raise UserError(
            "runtime.device: expected a machine with a CUDA device, found none; "
            "set runtime.device to cpu or auto"
        )
    # Inline, parts run one after another, whatever their number.
    concurrent = 1 if runtime.backend == "inline" else num_workers
    ranks = 1 if runtime.backend == "inline" else num_ranks
    shares = Shares()
    if device == "cuda" and runtime.backend == "ray":
        shares = share_out(num_gpus, num_ranks, num_workers)
    # In async mode ranks share the cores with busy workers.
    learner_share = 1.0 if mode == "sync" else 0.5
    return Plan(
        device=device,
        worker_threads=worker_threads or max(1, num_cores // concurrent),
        learner_threads=learner_threads or max(1, int(num_cores * learner_share) // ranks),
        learner_share=learner_share,
        shares=shares,
    )
