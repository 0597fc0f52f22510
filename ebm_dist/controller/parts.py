"""The parts of a run, and what the controller needs to show and to move them."""

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
    """Shows how far the run is; `metrics.progress.TerminalView` is one. Events go to `logging`."""

    def update(self, step: int, metrics: dict[str, float], waits: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Relocation:
    """How shards and learner ranks get away from nodes."""

    draining: Callable[[], set[str]]
    """Nodes whose end has been announced."""
    start_elsewhere: Callable[[int], ShardClient | None]
    """Starts a process for the shard of that number on a node that stays; None if there is none."""
    place_ranks: Callable[[Sequence[str | None]], list[str] | None]
    """A node that stays for each learner rank, given where they are; None if they do not fit."""


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
    """What a part that is started may take."""
    elasticity: Elasticity | None = None
    """None where the pool is as it is: in one process."""
    relocation: Relocation | None = None
    """None where there is nowhere else to go."""
    chain_monitor: ChainMonitor | None = None
    auditor: AuditLink | None = None
