"""The parts of a run, and the protocols through which the controller shows and moves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ebm_dist.cluster.backend import Backend
from ebm_dist.controller.clients import ShardClient
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.observers.chain_health import ChainMonitor
from ebm_dist.controller.observers.hub import HubLink
from ebm_dist.controller.observers.measurements import AuditLink, EvaluatorLink
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.autoscaler import Elasticity
from ebm_dist.controller.workers.membership import WorkerPool


class View(Protocol):
    """Shows the progress of a run, as `metrics.progress.TerminalView`. Events go to `logging`."""

    def update(
        self, step: int, metrics: dict[str, float], waits: str, num_compiling: int
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Relocation:
    """Finds places on other nodes for the shards and learner ranks of draining nodes."""

    draining: Callable[[], set[str]]
    """Ids of the nodes that Ray reports as draining."""
    start_elsewhere: Callable[[int], ShardClient | None]
    """Starts a process for the shard of that number on another node; None if there is none."""
    place_ranks: Callable[[Sequence[str | None]], list[str] | None]
    """A node for each learner rank, given the present ones; None if the ranks do not all fit."""


@dataclass(slots=True)
class Parts:
    """All parts of a run that has started."""

    backend: Backend
    shards: Shards
    workers: WorkerPool
    learners: LearnerGroup
    hub: HubLink
    evaluator: EvaluatorLink | None
    needs_negatives: bool
    lease_timeout_s: float
    start_timeout_s: float
    """Longest time that the start of a part may take."""
    elasticity: Elasticity | None = None
    """None if the size of the pool is fixed, as in one process."""
    relocation: Relocation | None = None
    """None if there are no other nodes."""
    chain_monitor: ChainMonitor | None = None
    auditor: AuditLink | None = None
