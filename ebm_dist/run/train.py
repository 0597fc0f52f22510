"""Trains from a RunConfig, in this process or on Ray, from start or resume to export."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from ebm_dist._version import __version__
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.cluster.access import chosen_address
from ebm_dist.cluster.backend import Backend
from ebm_dist.cluster.halt import Halted
from ebm_dist.cluster.inline import InlineBackend
from ebm_dist.cluster.ray_backend import RayBackend
from ebm_dist.config.checks import check_event
from ebm_dist.config.run_config import RunConfig, dump
from ebm_dist.controller.controller import Controller
from ebm_dist.controller.observers.callbacks import Callbacks, load_callbacks
from ebm_dist.core.errors import RunFailed, UserError, one_line
from ebm_dist.core.plugins import IN_SESSION, modules_of
from ebm_dist.core.signals import asking, interrupting
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import describe
from ebm_dist.data.dataset import located
from ebm_dist.export.reader import Export, open_export
from ebm_dist.export.writer import export_run, plugins_of
from ebm_dist.files.durable import refuse_link, replace_text
from ebm_dist.metrics.last_screen import Laps, final_screen
from ebm_dist.metrics.progress import TerminalView
from ebm_dist.report.pictures import write_grid
from ebm_dist.run.artifacts import Artifacts
from ebm_dist.run.assembly import assemble
from ebm_dist.run.given import config_of, is_given
from ebm_dist.run.init_from import beginning as init_from
from ebm_dist.run.object_store import check_shared_memory, store_need
from ebm_dist.run.preflight import preflight
from ebm_dist.run.resume import changes, check_resumable
from ebm_dist.run.run_dir import Resume, claimed, run_directory, run_log, starting_point, writable
from ebm_dist.run.warm_up import warmed_up

log = logging.getLogger("ebm_dist")
events = logging.getLogger("ebm_dist.run")
"""Lines for the terminal; `run.log` has them too."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of `train`."""

    run_dir: Path
    step: int
    finished: bool
    """False if a signal or a callback stopped the run; the same call of `train` resumes it."""
    export_dir: Path | None
    metrics: dict[str, float]
    """The last value of each metric."""
    stopped_by: str | None = None
    """The callback that stopped the run."""
    config: RunConfig | None = field(default=None, repr=False)
    """The complete config, with the objects that were given."""

    def open_export(self) -> Export:
        """The exported model, for `ebm_dist.sample`; its `energy` is in eval mode on the CPU.

        This also works if no module defines the energy's class, as in a notebook.
        """
        if self.export_dir is None or self.config is None:
            raise ValueError(f"{self.run_dir}: the run is not finished, so it has no export yet")
        # The run itself has imported them.
        used = modules_of([self.config.energy.model_dump(), self.config.sampler.model_dump()])
        given = getattr(self.config.energy, "_given", None)
        plugins = {*self.config.plugins, *used} - {IN_SESSION}
        return open_export(self.export_dir, plugins=sorted(plugins), energy=given)


def train(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    energy: nn.Module | Callable[..., Any] | None = None,
    data: Dataset | Tensor | np.ndarray | None = None,
    callbacks: Iterable[object] = (),
    run_dir: str | Path | None = None,
    resume: Resume = "auto",
    console: Console | None = None,
) -> RunResult:
    """Train an energy, and export it.

    If a mapping has no `sampler`, it gets one that suits the data, with matching sizes and rates
    (`run/recipe.py`), and a line reports it. If `energy` or `data` is given, a mapping without
    `runtime` trains in this process.

    It can be called in a notebook, in a coroutine and in any thread. In the main thread, a signal
    stops the run; in other threads, only a callback can. The same call then resumes the run.

    Args:
        config: a RunConfig, a mapping of its sections, or the path of a YAML file; all defaults
            when left out.
        energy: a module, a function (B, *event) -> (B,), or a function that makes a module without
            arguments; replaces the config's. A module is copied, so it is not changed.
        data: events (N, *event), or a map-style dataset of events or (event, label); replaces the
            config's.
        callbacks: objects with some of `on_update(step, metrics)`, `on_evaluation(step, metrics)`,
            `on_checkpoint(path)` and `on_end(result)`, called in this process after those of
            the config. One that returns True stops the run after a checkpoint. If a fault costs
            updates, the run repeats them, and calls `on_update` for them again.
        run_dir: the run directory; run.dir/run.name when left out.
        resume: resume from the newest valid checkpoint of `run_dir` if there is one (auto), require
            one (must), or refuse a directory with a run (never).
        console: the console for progress; standard output when left out.

    Raises:
        UserError: the config, the data or the run directory cannot be used; nothing was started.
        RunFailed: the run could not continue; its checkpoints remain.
    """
    config, chosen = config_of(config, energy, data)
    hooks = Callbacks(load_callbacks(config.callbacks, callbacks), num_updates=config.run.steps)
    preflight(config)
    config = config.model_copy(
        update={"data": located(config.data), "run": init_from.located(config.run)}
    )
    spec = describe(config.data)
    config = bind(config, spec)
    directory = run_directory(config.run, run_dir)
    with claimed(directory) as unguarded:
        refuse_link(directory / "export")  # checked now, as it is written after the training
        found = starting_point(directory, resume)
        beginning = None
        if found is None and config.run.init_from is not None:
            beginning = init_from.read_beginning(config, spec)
        with found.of_a_run() if found is not None else contextlib.nullcontext():
            if found is not None:
                check_resumable(config, spec, found)
            config, said = warmed_up(config, spec, found, beginning and beginning.energy)
            notices = [line for line in (unguarded, chosen, said) if line]
            notices += changes(config, found) if found is not None else []
        with writable(directory):
            replace_text(directory / "config.yaml", dump(config))
            if beginning is not None:
                meta = _meta(config, spec, beginning.lineage)
                found = beginning.write(directory, config, spec, meta)
                notices += beginning.notices
        with run_log(directory):
            console = console or Console()
            try:
                with interrupting():
                    result = _train(config, spec, directory, found, console, notices, hooks)
            except Halted as halted:  # at the start or in a rollback, so there is nothing to save
                if halted.is_failure:
                    raise RunFailed(str(halted)) from None
                result = _interrupted(directory, console)
            except Exception:
                log.exception("the run failed")
                raise
            except KeyboardInterrupt:
                result = _interrupted(directory, console)
            hooks.on_end(result)
            hooks.check()
            return result


def bind(config: RunConfig, spec: EventSpec) -> RunConfig:
    """`config`, completed from the data and checked against it."""
    check_event(config, spec)
    try:
        return config.model_copy(
            update={
                "energy": config.energy.bind(spec),
                "sampler": config.sampler.bind(spec),
                "objective": config.objective.bind(spec).at_temperature(
                    config.sampler.build().temperature
                ),
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
    notices: Sequence[str],
    callbacks: Callbacks,
) -> RunResult:
    with contextlib.ExitStack() as stack:
        inline = config.runtime.backend == "inline"
        view = TerminalView(config.run.steps, config.run.name, console, is_pool=not inline)
        stack.enter_context(view)
        stack.enter_context(_shown(view))
        for line in notices:
            events.info(line)
        laps = Laps()
        view.say("starting " + ("in this process" if inline else "Ray"))
        stop = threading.Event()
        try:
            told = lambda: stop.is_set() or callbacks.end_run  # noqa: E731
            backend = _backend(config, spec, run_dir, told)
        except SystemExit:  # from Ray's handler of SIGTERM, which has replaced ours
            raise KeyboardInterrupt from None
        stack.callback(backend.close)
        stack.enter_context(interrupting())
        if (notice := getattr(backend, "log_dir", None)) is not None:
            log.info("Ray's logs: %s", notice)
        parts = assemble(config, spec, run_dir, backend, found, stack)
        for line in found.skipped if found else ():
            view.say(f"passed over a damaged checkpoint: {line}")

        controller = Controller(
            parts,
            config,
            run_dir=run_dir,
            view=view,
            meta=_meta(config, spec, found.meta.get("init_from") if found else None),
            save_grid=partial(write_grid, run_dir, spec),
            callbacks=callbacks,
        )
        hub = parts.hub.info(60.0)
        view.say(hub["notice"] or f"W&B: {hub['mode']}")
        artifacts = Artifacts(config, spec, run_dir, parts.hub)
        callbacks.add("artifacts", artifacts)
        if found is not None:
            with found.of_a_run():
                controller.restore(found)
            if found.step > 0:  # otherwise the run begins, as its notices have said
                view.say(f"resumed from {found.path.name}")
            if found.step >= config.run.steps:
                view.say(
                    f"the run is finished: a run.steps above {found.step} trains on, another "
                    "run.name begins a new run"
                )
        artifacts.log_data(controller.progress.step)
        laps.end("to start")
        try:
            with asking(stop):
                finished = controller.run()
        except RunFailed as failure:
            parts.hub.fail(controller.progress.step, failure)
            raise
        every = config.evaluation.every
        if finished and every is not None and config.run.steps % every:
            controller.evaluate()  # otherwise the loop has just evaluated
        laps.end("updates", of_which=("evaluations", controller.evaluation_s))
        parts.hub.flush(120.0)
        export_dir = failure = None
        if finished and callbacks.failure is None:
            try:
                out = run_dir / "export"
                export_dir = export_run(run_dir, out, plugins=None, energy=config.energy)
            except UserError as error:
                failure = error  # raised once the metrics are sent
            else:
                artifacts.finish(export_dir)
            laps.end("export")
        hub = parts.hub.info(60.0)
        parts.hub.close(config.tracking.finish_timeout + 10.0)
    log.info("%s", laps)
    callbacks.check()
    if failure is not None:
        raise RunFailed(f"trained to the last update, but not exported: {failure}") from failure
    stopped_by = None if finished or stop.is_set() else callbacks.stopped_by
    pictures = sorted((run_dir / "samples").glob("*.png"))
    final_screen(
        run_dir=run_dir,
        steps=controller.progress.step,
        wall_time=controller.progress.wall_s,
        samples=pictures[-1] if pictures else None,
        wandb=hub,
        export=export_dir,
        metrics=controller.metrics,
        laps=laps,
        interrupted=not finished,
        stopped_by=stopped_by,
        from_python=is_given(config),
        plugins=plugins_of(config),
        console=console,
    )
    return RunResult(
        run_dir,
        controller.progress.step,
        finished,
        export_dir,
        dict(controller.metrics),
        stopped_by,
        config,
    )


def _meta(config: RunConfig, spec: EventSpec, lineage: Any) -> dict[str, Any]:
    """The fields that every checkpoint of the run has.

    Args:
        lineage: the lineage of `run.init_from`; None for a run that began from its seed.
    """
    return {
        "name": config.run.name,
        "version_of_ebm_dist": __version__,
        "config": config.model_dump(mode="json"),
        "event": dataclasses.asdict(spec),
        "init_from": lineage,
    }


def _interrupted(run_dir: Path, console: Console) -> RunResult:
    """The result of a run that a signal stopped outside the training loop."""
    name = checkpoint.newest_name(run_dir)
    log.info("interrupted; the newest checkpoint is %s", name)
    if name is None:
        raise KeyboardInterrupt
    console.print(f"interrupted; the same command goes on from {name}")
    return RunResult(run_dir, int(name.rpartition("_")[2]), False, None, {})


def _backend(
    config: RunConfig, spec: EventSpec, run_dir: Path, told: Callable[[], bool]
) -> Backend:
    if config.runtime.backend == "inline":
        return InlineBackend(told)
    # Learner ranks, the evaluator, the auditor, and shards if they start chains from data.
    num_readers = config.learner.num_ranks + 2
    num_readers += config.buffer.num_shards if config.buffer.starts_from_data else 0
    need = store_need(
        spec,
        config.buffer,
        config.flow,
        num_workers=config.workers.bounds[1],
        num_negatives=config.num_negatives,
        num_weights=FlatLayout.of(config.energy.build(seed=0)).size,
        wire=config.learner.wire,
        needs_negatives=config.objective.takes_negatives,
        data_bytes=config.data.num_given_bytes * num_readers,
    )
    size = (config.runtime.object_store_mb or 0) << 20 or need.total
    if chosen_address(config.runtime.address)[0] == "local":  # a cluster has its own store
        check_shared_memory(size, need)
    return RayBackend(
        config.runtime.address,
        namespace=f"ebm_dist-{_short_hash(str(run_dir.absolute()))}",
        start_timeout_s=config.runtime.start_timeout_s,
        object_store_bytes=size,
        working_dir=config.runtime.working_dir,
        plugins=config.plugins,
        told=told,
    )


class _Events(logging.Handler):
    """Shows log records of a run in the view; `run.log` has them too."""

    def __init__(self, view: TerminalView) -> None:
        super().__init__()
        self._view = view

    def filter(self, record: logging.LogRecord) -> bool:
        # Made one line, since names may come from files. The handler of run.log runs after this.
        record.msg, record.args = one_line(record.getMessage()), ()
        return True

    def emit(self, record: logging.LogRecord) -> None:
        self._view.say(record.getMessage())


@contextlib.contextmanager
def _shown(view: TerminalView) -> Iterator[None]:
    handler = _Events(view)
    events.addHandler(handler)
    try:
        yield
    finally:
        events.removeHandler(handler)


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
