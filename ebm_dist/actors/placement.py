"""Which actor gets which cores, threads and devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from ebm_dist.errors import UserError
from ebm_dist.section import Section


class RuntimeConfig(Section):
    """Where the graph runs."""

    backend: Literal["inline", "ray"] = "ray"
    """inline: every part in this process, no Ray. ray: actors on a Ray cluster."""

    address: str = "local"
    """local: start a Ray on this machine; auto: the running cluster of this machine;
    HOST:PORT: that cluster; ray://HOST:PORT: through Ray Client. RAY_ADDRESS wins where set."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where torch finds it."""

    start_timeout_s: PositiveFloat = 120.0
    """Seconds that the actors may take to start before the run gives up."""

    cpus_per_worker: PositiveFloat = 1.0
    """Ray CPUs that a worker claims on a cluster; on a local Ray nothing is claimed."""

    object_store_mb: PositiveInt | None = None
    """Size of a local Ray's object store in MiB; sized from the config when left out."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Threads and GPU shares by role."""

    device: str
    worker_threads: int
    learner_threads: int
    worker_gpus: float
    learner_gpus: float


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
    gpus = (0.0, 0.0)
    if device == "cuda" and runtime.backend == "ray":
        parts = num_workers + num_ranks
        if num_gpus >= parts:
            gpus = (1.0, 1.0)
        elif num_gpus > num_ranks:
            # Learner ranks own their GPUs (NCCL refuses two ranks on one); workers share the rest.
            gpus = (_fraction(num_gpus - num_ranks, num_workers), 1.0)
        elif num_ranks == 1:
            gpus = (_fraction(num_gpus, parts), _fraction(num_gpus, parts))
        else:
            raise UserError(
                f"learner.num_ranks: {num_ranks} ranks and {num_workers} workers need at least "
                f"{num_ranks + 1} GPUs, the cluster has {num_gpus}; lower learner.num_ranks to 1 "
                "to let learner and workers share, or set runtime.device to cpu"
            )
    return Plan(
        device=device,
        worker_threads=worker_threads or max(1, num_cores // lanes),
        learner_threads=learner_threads
        or max(1, num_cores // ranks if mode == "sync" else num_cores // (2 * ranks)),
        worker_gpus=gpus[0],
        learner_gpus=gpus[1],
    )


def _fraction(gpus: int, parts: int) -> float:
    """A share of which `parts` fit on `gpus` devices; one actor never straddles two of them."""
    per_device = -(-parts // gpus)
    return int(10_000 / per_device) / 10_000
