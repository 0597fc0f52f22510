"""Builds the parts of a run from its RunConfig: arguments, placement and replacement of each."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ebm_dist.actors.auditor import Auditor
from ebm_dist.actors.evaluator import Evaluator
from ebm_dist.actors.learner_rank import LearnerRank
from ebm_dist.actors.shard import open_shard
from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.config import shard_capacities
from ebm_dist.buffer.trace import TracePlan
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.cluster.backend import ActorOptions, Backend
from ebm_dist.config.run_config import RunConfig
from ebm_dist.controller.clients import (
    AuditorClient,
    EvaluatorClient,
    HubClient,
    LearnerClient,
    ShardClient,
    WorkerClient,
)
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.observers.chain_health import ChainMonitor
from ebm_dist.controller.observers.hub import HubLink
from ebm_dist.controller.observers.measurements import AuditLink, EvaluatorLink
from ebm_dist.controller.parts import Parts, Relocation
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.autoscaler import Elasticity
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.core.types import EventSpec
from ebm_dist.evaluation.regime import SHORT_RUN_REINIT, is_short_run_generator
from ebm_dist.metrics.credentials import with_environment
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.run.artifacts import provenance
from ebm_dist.run.placement.placer import Place
from ebm_dist.run.placement.places import placed, shard_notice
from ebm_dist.run.start_up import await_parts, meet

log = logging.getLogger("ebm_dist.run")


def assemble(
    config: RunConfig,
    spec: EventSpec,
    run_dir: Path,
    backend: Backend,
    found: checkpoint.CheckpointDir | None,
    stack: contextlib.ExitStack,
) -> Parts:
    """Start every part on `backend`, and connect them.

    Args:
        found: the checkpoint from which the run resumes.
        stack: receives the callbacks of an orderly end.

    Raises:
        RunFailed: a part did not start within runtime.start_timeout_s.
    """
    needs_negatives = config.objective.takes_negatives
    capacities = shard_capacities(config.buffer.capacity, config.buffer.num_shards)
    shards = Shards(backend, capacities if needs_negatives else ())
    workers = WorkerPool(backend, start_timeout_s=config.runtime.start_timeout_s)
    spawn = _Spawner(config, spec, run_dir, backend, found, shards, workers)
    hub = HubLink(backend, spawn.hub, resume_id=spawn.tracking_id)
    shards.start(spawn.shard)
    # Before the workers, which get the remaining resources.
    learners = LearnerGroup(
        backend,
        spawn.rank,
        num_ranks=config.learner.num_ranks,
        port=config.learner.port,
        start_timeout_s=config.runtime.start_timeout_s,
        call_timeout_s=config.flow.stall_timeout_s,
    )
    # The run waits for the smallest number of an elastic pool; others join when Ray has room.
    low, high = config.workers.bounds
    workers.start(low if backend.concurrent else config.workers.num_workers, spawn.worker)
    nodes = {worker.node for worker in workers}
    if backend.concurrent and (line := shard_notice(len(shards), high, nodes)):
        log.info(line)
    evaluator = None
    if config.evaluation.every is not None:
        evaluator = EvaluatorLink(backend, spawn.evaluator)
    auditor = None
    if config.evaluation.audit_every is not None:
        auditor = AuditLink(
            backend,
            spawn.auditor,
            config.evaluation,
            batch_size=config.num_negatives,
            divisor=config.learner.num_ranks * config.learner.accumulation,
            from_chains=needs_negatives and config.buffer.reinit_prob < SHORT_RUN_REINIT,
            wait_s=config.flow.stall_timeout_s
            if config.flow.mode == "sync" and config.evaluation.audit_feedback
            else 0.0,
        )
    observers = [link for link in (hub, evaluator, auditor) if link is not None]
    await_parts(backend, [*observers, shards, workers, learners])
    meet(backend, learners)

    def close_ranks() -> None:
        # DeepSpeed's process group outlives the call that made it, so the ranks leave it here.
        for ref in [rank.close() for rank in learners.ranks]:
            with contextlib.suppress(Exception):
                backend.get(ref, 10.0)

    stack.callback(close_ranks)
    chain_monitor = None
    if shards and spawn.trace.num_chains > 0:
        chain_monitor = ChainMonitor(
            backend,
            shards,
            reseed=config.evaluation.reseed_stuck,
            generator=is_short_run_generator(
                config.sampler.build().temperature, config.buffer.reinit_prob
            ),
            timeout=config.flow.stall_timeout_s,
        )
    return Parts(
        backend=backend,
        shards=shards,
        workers=workers,
        learners=learners,
        hub=hub,
        evaluator=evaluator,
        needs_negatives=needs_negatives,
        lease_timeout_s=config.buffer.lease_timeout_s,
        start_timeout_s=config.runtime.start_timeout_s,
        elasticity=Elasticity(
            low, high, config.workers.num_workers, spawn.worker_if_room, spawn.placer.draining
        )
        if backend.concurrent
        else None,
        relocation=Relocation(spawn.placer.draining, spawn.shard_elsewhere, spawn.ranks_elsewhere)
        if backend.scattered
        else None,
        chain_monitor=chain_monitor,
        auditor=auditor,
    )


class _Spawner:
    """Starts the parts of a run, at the beginning and after a death."""

    def __init__(
        self,
        config: RunConfig,
        spec: EventSpec,
        run_dir: Path,
        backend: Backend,
        found: checkpoint.CheckpointDir | None,
        shards: Shards,
        workers: WorkerPool,
    ) -> None:
        self._config = config
        self._spec = spec
        self._run_dir = run_dir
        self._backend = backend
        self._found = found
        self._hubs = 0
        self._shards = shards
        self._plan, self.placer = placed(
            backend,
            config.runtime,
            config.workers,
            config.learner,
            mode=config.flow.mode,
            shards=shards,
            worker_pool=workers,
        )
        self._fields = config.context_fields(spec)
        self._ranks: list[Place] = []
        self._worker_of: dict[int, WorkerClient] = {}
        self._lives: list[tuple[ShardClient, int]] = []  # each shard process, with its `life`
        lineage = found.meta.get("init_from") if found else None
        self._lineage = {"lineage": lineage} if lineage else {}
        self._provenance = provenance(config.tracking, backend)
        tracking: dict[str, Any] = (found.meta.get("tracking") or {}) if found else {}
        self.tracking_id: str | None = tracking.get("id")
        # The rounds in progress: two for each worker or lease of an update, and one for a repeated
        # round. A lease for which no rows are left goes by value.
        leases = -(-config.num_negatives // config.workers.num_chains)
        rounds = 2 * max(config.workers.num_workers, leases)
        self._num_grants = -(-rounds // config.buffer.num_shards) + 1
        self.trace = TracePlan(
            config.evaluation.trace_chains,
            config.evaluation.trace_records,
            config.evaluation.stagnation_fraction,
            config.evaluation.stagnation_rhat,
            one_law=not set(config.buffer.context.names) - {"clock"},
        )

    def worker_if_room(self, index: int) -> WorkerClient | None:
        """A worker, if there is room for one now."""
        place = self.placer.for_worker()
        return self._worker(index, place) if place is not None else None

    def worker(self, index: int) -> WorkerClient:
        """A new worker, which waits for room if there is none. Avoids the node of a dead one."""
        place = self.placer.for_worker(instead_of=self._worker_of.get(index))
        return self._worker(index, place or self.placer.anywhere())

    def _worker(self, index: int, place: Place) -> WorkerClient:
        config = self._config
        handle = self._backend.spawn(
            partial(
                Worker,
                energy=config.energy,
                sampler=config.sampler,
                objective=config.objective,
                spec=self._spec,
                device=self._plan.device,
                steady=config.flow.mode == "sync",
                resample_threshold=(
                    config.buffer.resample_threshold if config.buffer.jarzynski else None
                ),
                storage=config.buffer.storage,
                num_updates=config.run.steps,
            ),
            f"worker-{index}",
            ActorOptions(
                num_threads=config.workers.num_threads or place.num_threads,
                num_cpus=config.runtime.cpus_per_worker,
                num_gpus=place.num_gpus,
                # A round whose lease was lost with a node must not delay later rounds.
                any_order=True,
                shared=True,
                node=place.node,
            ),
        )
        worker = self._worker_of[index] = WorkerClient(handle)
        return worker

    def hub(self, resume_id: str | None) -> HubClient:
        config, found = self._config, self._found
        # The run repeats the updates after the checkpoint, so their rows are removed; but not by a
        # hub that replaces a dead one of this run.
        resume_step = found.step if found and self._hubs == 0 else None
        self._hubs += 1
        handle = self._backend.spawn(
            partial(
                MetricHub,
                # Filled in from the environment of this process, since a node's may have none.
                config=with_environment(config.tracking),
                run_dir=self._run_dir.absolute(),
                run_config=config.model_dump(mode="json") | self._lineage | self._provenance,
                run_name=config.run.name,
                resume_id=resume_id,
                resume_step=resume_step,
            ),
            "hub",
            ActorOptions(num_threads=1, beside_driver=True),
        )
        return HubClient(handle)

    def shard_elsewhere(self, index: int) -> ShardClient | None:
        """A process for a shard whose node is drained; None if no other node is left."""
        node = self.placer.for_shard()
        return self.shard(index, node) if node is not None else None

    def shard(self, index: int, node: str | None = None) -> ShardClient:
        """A process for the shard: on `node`, else on the node where its chains are mapped."""
        config = self._config
        before = self._shards[index] if index < len(self._shards) else None
        node = node or self.placer.for_shard(before.node if before else None)
        life = len(self._lives)
        if before is not None and before.node == node:
            life = next(number for shard, number in self._lives if shard is before)
        handle = self._backend.spawn(
            partial(
                open_shard,
                config=config.buffer,
                data=config.data if config.buffer.starts_from_data else None,
                spec=self._spec,
                index=index,
                num_shards=config.buffer.num_shards,
                capacity=self._shards.capacities[index],
                max_lease=config.workers.num_chains,
                seed=config.run.seed,
                trace=self.trace if self.trace.num_chains > 0 else None,
                num_grants=self._num_grants,
                fields=self._fields,
                # Names the mapped files. Other files on the node may be outdated: of an earlier
                # process of the shard, or of a successor that was not needed.
                life=life,
            ),
            f"shard-{index}",
            ActorOptions(
                num_threads=1,
                # A checkin waits for its worker, and must not delay the next checkout.
                any_order=True,
                shared=True,
                node=node,
            ),
        )
        shard = ShardClient(handle)
        self._lives.append((shard, life))
        return shard

    def ranks_elsewhere(self, held: Sequence[str | None]) -> list[str] | None:
        """Nodes for the learner ranks, none of them draining; None if the ranks do not all fit."""
        return [str(place.node) for place in places] if (places := self._place(held)) else None

    def _place(self, held: Sequence[str | None] | None = None) -> list[Place] | None:
        """Places for the learner ranks. Kills workers if the ranks need their GPUs."""
        if (ranks := self.placer.for_ranks(held)) is None:
            return None
        for worker in ranks.yielding:
            log.info(f"{worker.name} ends: the learner ranks need its GPU")
            self._backend.kill(worker.handle)
        self._ranks = ranks.places
        return ranks.places

    def rank(self, rank: int, node: str | None = None) -> LearnerClient:
        config = self._config
        if node is None and rank == 0:  # the others follow
            self._ranks = self._place() or self.placer.ranks_anywhere()
        place = self._ranks[rank]
        handle = self._backend.spawn(
            partial(
                LearnerRank,
                config=config.learner,
                data=config.data,
                energy=config.energy,
                objective=config.objective,
                rank=rank,
                seed=config.run.seed,
                device=self._plan.device,
                # The change of a chain's Jarzynski weight from its version to the learner's is its
                # staleness weight, which is zero without lag.
                reweight=config.flow.stale == "reweight"
                or (config.buffer.jarzynski and config.flow.mode == "async"),
                jarzynski=config.buffer.jarzynski,
            ),
            f"learner-{rank}",
            ActorOptions(
                num_threads=config.learner.num_threads or place.num_threads,
                num_gpus=place.num_gpus,
                # Negatives that are lost in transit must not delay those that replace them.
                any_order=self._backend.scattered,
                aside=rank == 0,  # rank 0 publishes the weights
                node=node or place.node,
            ),
        )
        return LearnerClient(handle)

    def evaluator(self) -> EvaluatorClient:
        config = self._config
        handle = self._backend.spawn(
            partial(
                Evaluator,
                config=config.evaluation,
                data=config.data,
                energy=config.energy,
                spec=self._spec,
                sampler=config.sampler,
                objective=config.objective,
                seed=config.run.seed,
                temperature=config.sampler.build().temperature,
                start_std=config.buffer.init_std,
                run_estimates_log_z=config.objective.build().estimates_log_z,
            ),
            "evaluator",
            ActorOptions(num_threads=1),
        )
        return EvaluatorClient(handle)

    def auditor(self) -> AuditorClient:
        config = self._config
        handle = self._backend.spawn(
            partial(
                Auditor,
                config=config.evaluation,
                data=config.data,
                energy=config.energy,
                sampler=config.sampler,
                buffer=config.buffer,
                spec=self._spec,
                fields=self._fields,
                seed=config.run.seed,
            ),
            "auditor",
            ActorOptions(num_threads=1),
        )
        return AuditorClient(handle)
