"""RunConfig -> a running graph, in this process or on Ray, from start or resume to export."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ebm_dist import __version__, checkpoint
from ebm_dist.actors.auditor import SHORT_RUN_REINIT, AuditLink, Auditor
from ebm_dist.actors.controller import Controller
from ebm_dist.actors.evaluator import Evaluator
from ebm_dist.actors.graph import Graph, Schedule
from ebm_dist.actors.handles import (
    Backend,
    Handle,
    InlineBackend,
    PartDied,
    RayBackend,
    Ref,
)
from ebm_dist.actors.learner import LearnerRank
from ebm_dist.actors.learners import LearnerGroup
from ebm_dist.actors.observers import EvaluatorLink, HubLink
from ebm_dist.actors.placement import available_cores, plan
from ebm_dist.actors.shard_host import ShardHost
from ebm_dist.actors.shared_memory import slots_directory
from ebm_dist.actors.watch import ShardWatch
from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.trace import TracePlan
from ebm_dist.config import RunConfig, check_event, dump, load
from ebm_dist.data import describe
from ebm_dist.errors import RunFailed, UserError
from ebm_dist.export import export_run
from ebm_dist.metrics.hub import MetricHub
from ebm_dist.metrics.progress import Progress, final_screen
from ebm_dist.preflight import preflight
from ebm_dist.report.grid import save_grid
from ebm_dist.types import EventSpec

Resume = Literal["auto", "never", "must"]

log = logging.getLogger("ebm_dist")


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run stands when `train` returns."""

    run_dir: Path
    step: int
    finished: bool
    """False if a signal stopped the run; `train` with resume="must" goes on from there."""
    export_dir: Path | None
    metrics: dict[str, float]
    """The last value of each metric."""


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    run_dir: str | Path | None = None,
    resume: Resume = "auto",
    console: Console | None = None,
) -> RunResult:
    """Train the energy that `config` describes, and export it.

    Args:
        config: a RunConfig, a mapping of its sections, or the path of a YAML file.
        run_dir: where the run is kept; run.dir/run.name when left out.
        resume: go on from the newest valid checkpoint of `run_dir` if there is one (auto), only
            if there is one (must), or refuse a directory that holds a run (never).
        console: where progress is shown; standard output when left out.

    Raises:
        UserError: the config, the data or the run directory cannot be used; nothing was started.
        RunFailed: the run could not go on; its checkpoints stay.
    """
    if not isinstance(config, RunConfig):
        config = load(config)
    preflight(config)
    spec = describe(config.data)
    config = bind(config, spec)
    directory = Path(run_dir) if run_dir is not None else Path(config.run.dir) / config.run.name
    with _claimed(directory):
        found = _starting_point(directory, resume)
        if found is not None:
            _check_resumable(config, found)
        _replace_text(directory / "config.yaml", dump(config))
        with _run_log(directory):
            try:
                return _train(config, spec, directory, found, console or Console())
            except Exception:
                log.exception("the run failed")
                raise


def bind(config: RunConfig, spec: EventSpec) -> RunConfig:
    """`config` with what was left to the data filled in, and checked against the data."""
    check_event(config, spec)
    try:
        return config.model_copy(
            update={
                "energy": config.energy.bind(spec),
                "sampler": config.sampler.bind(spec),
                "objective": config.objective.bind(spec),
            }
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _train(
    config: RunConfig,
    spec: EventSpec,
    run_dir: Path,
    found: checkpoint.CheckpointDir | None,
    console: Console,
) -> RunResult:
    with contextlib.ExitStack() as stack:
        stop, listen = stack.enter_context(_signals_ask_to_stop())
        view = stack.enter_context(Progress(config.run.steps, config.run.name, console))
        view.say("starting " + ("in this process" if config.runtime.backend == "inline" else "Ray"))
        backend = _backend(config, spec, run_dir)
        stack.callback(backend.close)
        listen()  # Ray has put a handler of its own in place of ours, which aborts on SIGTERM
        if (notice := getattr(backend, "log_dir", None)) is not None:
            log.info("Ray's logs: %s", notice)
        graph = _build(config, spec, run_dir, backend, found, stack, _Logged(view).say)
        for line in found.skipped if found else ():
            view.say(f"passed over a damaged checkpoint: {line}")

        def draw(chains: np.ndarray, step: int) -> Path | None:
            path = run_dir / "samples" / f"step_{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            return save_grid(torch.from_numpy(np.array(chains)), path, spec)

        controller = Controller(
            graph,
            _schedule(config),
            flow=config.flow,
            learner=config.learner,
            run_dir=run_dir,
            view=_Logged(view),
            should_stop=stop.is_set,
            meta={
                "name": config.run.name,
                "version_of_ebm_dist": __version__,
                "config": config.model_dump(mode="json"),
                "event": dataclasses.asdict(spec),
            },
            save_grid=draw,
        )
        hub = graph.hub.info(60.0)
        view.say(str(hub.get("notice") or f"W&B: {hub.get('mode')}"))
        if found is not None:
            controller.restore(found)
            view.say(f"resumed from {found.path.name}")
        finished = controller.run()
        every = config.evaluation.every
        if finished and every is not None and config.run.steps % every:
            controller.evaluate()  # else the loop has just done so
            controller.finish_evaluation()
        graph.hub.flush(120.0)
        hub = graph.hub.info(60.0)
        with contextlib.suppress(Exception):
            backend.get(graph.hub.handle.call("close"), config.tracking.finish_timeout + 10.0)
    export_dir = export_run(run_dir, run_dir / "export") if finished else None
    pictures = sorted((run_dir / "samples").glob("*.png"))
    final_screen(
        run_dir=run_dir,
        steps=controller.progress.step,
        wall_time=controller.progress.wall_s,
        samples=pictures[-1] if pictures else None,
        wandb=hub,
        export=export_dir,
        quality={
            name: controller.metrics[name]
            for name in ("energy/gap", "fidelity/distance", "throughput/mcmc_steps_per_s")
            if name in controller.metrics
        },
        interrupted=not finished,
        console=console,
    )
    return RunResult(
        run_dir, controller.progress.step, finished, export_dir, dict(controller.metrics)
    )


def _build(
    config: RunConfig,
    spec: EventSpec,
    run_dir: Path,
    backend: Backend,
    found: checkpoint.CheckpointDir | None,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> Graph:
    seed = config.run.seed
    placement = plan(
        config.runtime,
        mode=config.flow.mode,
        num_workers=config.workers.num_workers,
        num_ranks=config.learner.num_ranks,
        worker_threads=config.workers.num_threads,
        learner_threads=config.learner.num_threads,
        num_cores=available_cores(),
        num_gpus=getattr(backend, "num_gpus", torch.cuda.device_count()),
    )
    needs_negatives = bool(config.objective.build().needs_negatives)
    tracking = (found.meta.get("tracking") or {}) if found else {}

    def spawn_worker(index: int) -> Handle:
        return backend.spawn(
            Worker,
            {
                "energy": config.energy,
                "sampler": config.sampler,
                "spec": spec,
                "device": placement.device,
                "jarzynski": config.buffer.jarzynski,
            },
            name=f"worker-{index}",
            num_threads=placement.worker_threads,
            num_cpus=config.runtime.cpus_per_worker,
            num_gpus=placement.worker_gpus,
        )

    def spawn_hub(resume_id: str | None) -> Handle:
        return backend.spawn(
            MetricHub,
            {
                "config": config.tracking,
                "run_dir": run_dir.absolute(),
                "run_config": config.model_dump(mode="json"),
                "run_name": config.run.name,
                "resume_id": resume_id,
                # Rows past the checkpoint are of updates that will be done again. A hub that
                # replaces a dead one of this run has none such.
                "resume_step": found.step if found and hub is None else None,
            },
            name="hub",
            num_threads=1,
            beside_driver=True,
        )

    capacities = shard_capacities(config.buffer.capacity, config.buffer.num_shards)
    slots = None
    if getattr(backend, "local", False):
        slots = stack.enter_context(slots_directory(run_dir))

    trace = TracePlan(
        config.evaluation.trace_chains,
        config.evaluation.trace_records,
        config.evaluation.stagnation_fraction,
    )

    def spawn_shard(index: int) -> Handle:
        return backend.spawn(
            ShardHost,
            {
                "config": config.buffer,
                "data": config.data if config.buffer.init == "data" else None,
                "spec": spec,
                "index": index,
                "num_shards": config.buffer.num_shards,
                "capacity": capacities[index],
                "max_lease": config.workers.num_chains,
                "seed": seed,
                "trace": trace if trace.num_chains > 0 else None,
                "directory": str(slots / f"shard_{index:04d}") if slots else None,
            },
            name=f"shard-{index}",
            num_threads=1,
            # A checkin waits for its worker; the next checkout must not wait for the checkin.
            any_order=True,
        )

    def spawn_rank(rank: int) -> Handle:
        return backend.spawn(
            LearnerRank,
            {
                "config": config.learner,
                "data": config.data,
                "energy": config.energy,
                "objective": config.objective,
                "rank": rank,
                "seed": seed,
                "device": placement.device,
                # The jump of a chain's Jarzynski weight from its version to the learner's is its
                # staleness weight, nothing where there is no lag.
                "reweight": config.flow.stale == "reweight"
                or (config.buffer.jarzynski and config.flow.mode == "async"),
                "jarzynski": config.buffer.jarzynski,
            },
            name=f"learner-{rank}",
            num_threads=placement.learner_threads,
            num_gpus=placement.learner_gpus,
        )

    def spawn_evaluator() -> Handle:
        return backend.spawn(
            Evaluator,
            {
                "config": config.evaluation,
                "data": config.data,
                "energy": config.energy,
                "spec": spec,
                "seed": seed,
                "temperature": config.sampler.build().temperature,
                "run_estimates_log_z": config.objective.name == "noise_contrastive",  # type: ignore[attr-defined]
            },
            name="evaluator",
            num_threads=1,
        )

    def spawn_auditor() -> Handle:
        return backend.spawn(
            Auditor,
            {
                "config": config.evaluation,
                "data": config.data,
                "energy": config.energy,
                "sampler": config.sampler,
                "buffer": config.buffer,
                "spec": spec,
                "seed": seed,
            },
            name="auditor",
            num_threads=1,
        )

    hub: HubLink | None = None
    hub = HubLink(backend, spawn_hub, resume_id=tracking.get("id"), say=say)
    shards = [spawn_shard(i) for i in range(len(capacities))] if needs_negatives else []
    workers = [spawn_worker(index) for index in range(config.workers.num_workers)]
    learners = LearnerGroup(
        backend,
        spawn_rank,
        num_ranks=config.learner.num_ranks,
        start_timeout_s=config.runtime.start_timeout_s,
        call_timeout_s=config.flow.stall_timeout_s,
    )
    evaluator = None
    if config.evaluation.every is not None:
        evaluator = EvaluatorLink(backend, spawn_evaluator, say=say)
    auditor = None
    if config.evaluation.audit_every is not None:
        auditor = AuditLink(
            backend,
            spawn_auditor,
            config.evaluation,
            batch_size=config.data.batch_size,
            divisor=config.learner.num_ranks * config.learner.accumulation,
            from_chains=needs_negatives and config.buffer.reinit_prob < SHORT_RUN_REINIT,
            wait_s=config.flow.stall_timeout_s if config.flow.mode == "sync" else 0.0,
            say=say,
        )
    parts = [hub.handle, *shards, *workers, *learners.ranks]
    backend.await_started([*parts, *(link.handle for link in (evaluator, auditor) if link)])

    def wait(refs: Sequence[Ref], timeout: float) -> None:
        for ref in refs:
            with contextlib.suppress(PartDied):  # told by who reads it
                backend.get(ref, timeout)

    learners.meet(wait)

    def close_ranks() -> None:
        # DeepSpeed's process group outlives the actor call that made it; leave it in order.
        for ref in [rank.call("close") for rank in learners.ranks]:
            with contextlib.suppress(Exception):
                backend.get(ref, 10.0)

    stack.callback(close_ranks)
    return Graph(
        backend=backend,
        shards=shards,
        capacities=capacities,
        workers=workers,
        learners=learners,
        hub=hub,
        evaluator=evaluator,
        respawn_worker=spawn_worker,
        respawn_shard=spawn_shard,
        needs_negatives=needs_negatives,
        lease_timeout_s=config.buffer.lease_timeout_s,
        watch=ShardWatch(
            backend,
            shards,
            reseed=config.evaluation.reseed_stuck,
            say=say,
            timeout=config.flow.stall_timeout_s,
        )
        if shards and trace.num_chains > 0
        else None,
        auditor=auditor,
    )


def _schedule(config: RunConfig) -> Schedule:
    return Schedule(
        num_updates=config.run.steps,
        batch_size=config.data.batch_size,
        num_chains=config.workers.num_chains,
        num_steps=config.sampler.num_steps,
        log_every=config.tracking.log_every,
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        evaluate_every=config.evaluation.every,
        num_grid=config.evaluation.num_grid,
        num_samples=config.evaluation.num_samples,
        temperature=config.sampler.build().temperature,
        jarzynski=config.buffer.jarzynski,
    )


def shard_capacities(capacity: int, num_shards: int) -> list[int]:
    """`capacity` chains dealt out as evenly as whole numbers allow."""
    return [capacity // num_shards + (i < capacity % num_shards) for i in range(num_shards)]


def _backend(config: RunConfig, spec: EventSpec, run_dir: Path) -> Backend:
    if config.runtime.backend == "inline":
        return InlineBackend()
    event_bytes = 4 * int(np.prod(spec.shape))
    # Leases and negatives in flight, one snapshot of every shard, and room for weights.
    in_flight = 8 * (config.flow.max_lag + 2) * config.data.batch_size * event_bytes
    needed = in_flight + 3 * config.buffer.capacity * event_bytes + (256 << 20)
    size = (config.runtime.object_store_mb or 0) << 20 or needed
    _check_shared_memory(size)
    return RayBackend(
        config.runtime.address,
        namespace=f"ebm_dist-{_short_hash(str(run_dir.absolute()))}",
        start_timeout_s=config.runtime.start_timeout_s,
        object_store_bytes=size,
    )


def _check_shared_memory(needed: int) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    free = shutil.disk_usage(shared).free
    if free < needed:
        raise UserError(
            f"buffer.capacity: the run needs {needed >> 20} MiB of shared memory, /dev/shm has "
            f"{free >> 20} MiB free; enlarge it (docker: --shm-size), lower buffer.capacity, or "
            "set runtime.object_store_mb"
        )


def _starting_point(run_dir: Path, resume: Resume) -> checkpoint.CheckpointDir | None:
    holds_run = (run_dir / "checkpoints").is_dir() or (run_dir / "metrics.jsonl").exists()
    if resume == "never":
        if holds_run:
            raise UserError(
                f"--resume never: {run_dir} holds a run already; choose another --run-dir, or "
                "--resume auto to go on with it"
            )
        return None
    found = checkpoint.latest(run_dir)
    if found is None and resume == "must":
        raise UserError(
            f"--resume must: {run_dir} holds no checkpoint; check --run-dir, or use --resume auto"
        )
    return found


def _check_resumable(config: RunConfig, found: checkpoint.CheckpointDir) -> None:
    """Refuse to continue weights or chains of another model."""
    then, now = found.meta["config"], config.model_dump(mode="json")
    for key in ("energy", "objective"):
        if then[key] != now[key]:
            different = sorted(
                name
                for name in {*then[key], *now[key]}
                if then[key].get(name) != now[key].get(name)
            )
            name = different[0]
            raise UserError(
                f"{key}.{name}: the checkpoint at {found.path} has {then[key].get(name)!r}, the "
                f"config {now[key].get(name)!r}; restore it, or start anew with another --run-dir"
            )
    if config.buffer.jarzynski and not then["buffer"].get("jarzynski", False):
        raise UserError(
            f"buffer.jarzynski: the chains of the checkpoint at {found.path} carry no Jarzynski "
            "weights; set it to false, or start anew with another --run-dir"
        )
    if found.step > config.run.steps:
        raise UserError(
            f"run.steps: the checkpoint at {found.path} is at update {found.step}, past "
            f"{config.run.steps}; raise run.steps, or start anew with another --run-dir"
        )


@contextlib.contextmanager
def _claimed(run_dir: Path) -> Iterator[None]:
    """Make `run_dir` ours for the time of a run; two writers would tear each other's files."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"--run-dir: {run_dir} cannot be written ({error.strerror}); choose another directory"
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--run-dir: another process trains in {run_dir}; stop it, or choose another"
            ) from None
        yield


@contextlib.contextmanager
def _signals_ask_to_stop() -> Iterator[tuple[threading.Event, Callable[[], None]]]:
    """SIGINT and SIGTERM set the event; a second one ends the process as usual.

    The function listens again, after somebody else has taken the signals.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop, lambda: None
        return
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    def listen() -> None:
        for number in before:
            signal.signal(number, ask)

    listen()
    try:
        yield stop, listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _run_log(run_dir: Path) -> Iterator[None]:
    """Write what happens, tracebacks included, to `run.log`."""
    handler = logging.FileHandler(run_dir / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _Logged:
    """The view, with each line it is told kept in the run's log."""

    def __init__(self, view: Progress) -> None:
        self._view = view

    def update(self, step: int, metrics: dict[str, float], waits: str) -> None:
        self._view.update(step, metrics, waits)

    def say(self, line: str) -> None:
        log.info(line)
        self._view.say(line)


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


__all__ = ["RunFailed", "RunResult", "train"]
