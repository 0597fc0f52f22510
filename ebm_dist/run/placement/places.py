"""Makes the plan and the placer of a run, after waiting for the cluster's GPUs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

from ebm_dist.cluster.backend import Backend
from ebm_dist.config.sections import RuntimeConfig, WorkersConfig
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.run.placement.placer import Placer
from ebm_dist.run.placement.plan import Plan, available_cores, plan

log = logging.getLogger("ebm_dist.run")

MANY_WORKERS = 16


def placed(
    backend: Backend,
    runtime: RuntimeConfig,
    workers: WorkersConfig,
    learner: LearnerConfig,
    *,
    mode: Literal["sync", "async"],
    shards: Shards,
    worker_pool: WorkerPool,
) -> tuple[Plan, Placer]:
    """The plan for the current resources, and the placer of the run's parts.

    Raises:
        UserError: the run needs more GPUs than there are.
    """
    num_workers = workers.bounds[1]

    def count() -> int:
        import torch

        return getattr(backend, "num_gpus", torch.cuda.device_count())

    made = plan(
        runtime,
        mode=mode,
        num_workers=num_workers,
        num_ranks=learner.num_ranks,
        worker_threads=workers.num_threads,
        learner_threads=learner.num_threads,
        num_cores=available_cores(),
        num_gpus=await_gpus(runtime, count, num_ranks=learner.num_ranks)
        if backend.scattered
        else count(),
    )
    placer = Placer(
        backend.nodes,
        shards,
        worker_pool,
        made,
        cpus_per_worker=runtime.cpus_per_worker,
        num_workers=num_workers,
        num_ranks=learner.num_ranks,
    )
    return made, placer


def await_gpus(
    runtime: RuntimeConfig,
    count: Callable[[], int],
    *,
    num_ranks: int,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """The number of GPUs of a cluster, once they suffice for `num_ranks` ranks and a worker.

    Nodes of a cluster join one by one, often those with GPUs last. If there are some GPUs, but too
    few, this waits for more; if there are none, only under `runtime.device: cuda`.
    """
    needed = num_ranks + 1 if num_ranks > 1 else 1
    num = count()
    if runtime.device == "cpu" or num >= needed:
        return num
    if runtime.device == "auto" and num == 0:
        log.info(
            "runtime.device: auto, and no node of the cluster has a GPU yet, so the run takes "
            "CPUs; runtime.device=cuda waits for nodes that are still coming"
        )
        return 0
    log.info(
        f"the cluster has {num} of the {needed} GPUs that the run needs: waiting for more, at most "
        f"{runtime.start_timeout_s:.0f} s (runtime.start_timeout_s)"
    )
    deadline = clock() + runtime.start_timeout_s
    while num < needed and clock() < deadline:
        sleep(1.0)
        num = count()
    return num


def shard_notice(num_shards: int, num_workers: int, nodes: set[str | None]) -> str | None:
    """A line of advice if there are too few shards for the workers, else None.

    Args:
        nodes: the nodes with workers.
    """
    if num_shards and num_shards < len(nodes):
        return (
            f"buffer.num_shards: {num_shards} for workers on {len(nodes)} nodes, so most chains go "
            f"over the network; with buffer.num_shards={len(nodes)} they stay on their node"
        )
    if num_shards == 1 and num_workers >= MANY_WORKERS:
        return (
            f"buffer.num_shards: 1, so one process hands out the chains of {num_workers} workers; "
            f"if they wait (wait/worker), set buffer.num_shards={-(-num_workers // 8)}"
        )
    return None
