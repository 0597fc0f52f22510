"""Trains from a RunConfig, in this process or on Ray, from start or resume to export."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from ebm_dist.core.paths import user_path
from ebm_dist.core.plugins import IN_SESSION, modules_of
from ebm_dist.core.signals import asking, interrupting
from ebm_dist.core.types import EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import describe
from ebm_dist.data.dataset import located
from ebm_dist.export.reader import Export, open_export
from ebm_dist.export.writer import export_run, plugins_of
from ebm_dist.files.durable import refuse_link, replace_text
from ebm_dist.files.safe_open import make_directory
from ebm_dist.metrics.progress import TerminalView, final_screen
from ebm_dist.report.grid import save_grid
from ebm_dist.run.assembly import assemble
from ebm_dist.run.given import config_of, is_given
from ebm_dist.run.init_from import beginning as init_from
from ebm_dist.run.object_store import check_shared_memory, store_need
from ebm_dist.run.preflight import preflight
from ebm_dist.run.resume import changes, check_resumable
from ebm_dist.run.run_dir import Resume, claimed, run_log, starting_point, writable
from ebm_dist.run.warm_up import warmed_up

log = logging.getLogger("ebm_dist")
events = logging.getLogger("ebm_dist.run")
"""What a person who watches the run sees, line by line."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run stands when `train` returns."""

    run_dir: Path
    step: int
    finished: bool
    """False if a signal or a callback stopped the run; the same call of `train` goes on."""
    export_dir: Path | None
    metrics: dict[str, float]
    """The last value of each metric."""
    stopped_by: str | None = None
    """The callback that stopped the run."""
    config: RunConfig | None = field(default=None, repr=False)
    """The complete config, with the objects that were given."""

    def open_export(self) -> Export:
        """The exported model, for `ebm_dist.sample`; its `energy` is in eval mode on the CPU.

        Works also where the energy's class lies in no module, as one of a notebook does.
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

    A mapping may leave out `sampler`: it then gets one that suits the data's kind, with the sizes
    and rates that go with it (`run/recipe.py`), and the run says so. Where `energy` or `data` is
    given, a mapping without `runtime` trains in this process.

    It can be called in a notebook, in a coroutine and in any thread. Signals ask the run to stop
    in the main thread alone; elsewhere a callback can. The same call goes on with a run that was
    stopped.

    Args:
        config: a RunConfig, a mapping of its sections, or the path of a YAML file; all defaults
            when left out.
        energy: a module or a function (B, *event) -> (B,), or what makes a module when called
            without arguments, in place of the config's. A given module is copied, not trained.
        data: events (N, *event), or a map-style dataset of events or (event, label), in place of
            the config's.
        callbacks: objects with some of `on_update(step, metrics)`, `on_evaluation(step, metrics)`,
            `on_checkpoint(path)` and `on_end(result)`, called in this process after those of
            the config. One that returns True stops the run after a checkpoint. After a death
            that costs updates they are made again, and `on_update` sees their numbers again.
        run_dir: where the run is kept; run.dir/run.name when left out.
        resume: go on from the newest valid checkpoint of `run_dir` if there is one (auto), only
            if there is one (must), or refuse a directory that holds a run (never).
        console: where progress is shown; standard output when left out.

    Raises:
        UserError: the config, the data or the run directory cannot be used; nothing was started.
        RunFailed: the run could not go on; its checkpoints stay.
    """
    config, chosen = config_of(config, energy, data)
    hooks = Callbacks(load_callbacks(config.callbacks, callbacks), num_updates=config.run.steps)
    preflight(config)
    config = config.model_copy(
        update={"data": located(config.data), "run": init_from.located(config.run)}
    )
    spec = describe(config.data)
    config = bind(config, spec)
    directory = Path(config.run.dir) / config.run.name
    if run_dir is not None:
        try:
            directory = Path(user_path(run_dir))
        except ValueError as error:
            raise UserError(f"--run-dir: {error}") from None
    with claimed(directory) as unguarded:
        refuse_link(directory / "export")  # which is written after the training
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
            except Halted as halted:  # while it started, or went back: there is nothing new to keep
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
    """`config` with what was left to the data filled in, and checked against the data."""
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
        view = stack.enter_context(TerminalView(config.run.steps, config.run.name, console))
        stack.enter_context(_shown(view))
        for line in notices:
            events.info(line)
        view.say("starting " + ("in this process" if config.runtime.backend == "inline" else "Ray"))
        stop = threading.Event()
        try:
            told = lambda: stop.is_set() or callbacks.end_run  # noqa: E731
            backend = _backend(config, spec, run_dir, told)
        except SystemExit:  # by Ray's handler of SIGTERM, which is now in place of ours
            raise KeyboardInterrupt from None
        stack.callback(backend.close)
        stack.enter_context(interrupting())
        if (notice := getattr(backend, "log_dir", None)) is not None:
            log.info("Ray's logs: %s", notice)
        parts = assemble(config, spec, run_dir, backend, found, stack)
        for line in found.skipped if found else ():
            view.say(f"passed over a damaged checkpoint: {line}")

        def write_grid(chains: np.ndarray, step: int) -> Path | None:
            path = run_dir / "samples" / f"step_{step:08d}.png"
            try:
                make_directory(path.parent)
                return save_grid(torch.from_numpy(np.array(chains)), path, spec)
            except OSError as error:
                events.info(f"{path.name} not written ({error.strerror or error})")
                return None

        controller = Controller(
            parts,
            config,
            run_dir=run_dir,
            view=view,
            meta=_meta(config, spec, found.meta.get("init_from") if found else None),
            save_grid=write_grid,
            callbacks=callbacks,
        )
        hub = parts.hub.info(60.0)
        view.say(hub["notice"] or f"W&B: {hub['mode']}")
        if found is not None:
            with found.of_a_run():
                controller.restore(found)
            if found.step > 0:  # else it begins, which its notices said
                view.say(f"resumed from {found.path.name}")
        with asking(stop):
            finished = controller.run()
        every = config.evaluation.every
        if finished and every is not None and config.run.steps % every:
            controller.evaluate()  # else the loop has just done so
        parts.hub.flush(120.0)
        hub = parts.hub.info(60.0)
        parts.hub.close(config.tracking.finish_timeout + 10.0)
    callbacks.check()
    try:
        export_dir = None
        if finished:
            export_dir = export_run(run_dir, run_dir / "export", plugins=None, energy=config.energy)
    except UserError as error:
        raise RunFailed(f"trained to the last update, but not exported: {error}") from error
    stopped_by = None if finished or stop.is_set() else callbacks.stopped_by
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
    """What every checkpoint says of its run.

    Args:
        lineage: of `run.init_from`, None for a run that began with its seed.
    """
    return {
        "name": config.run.name,
        "version_of_ebm_dist": __version__,
        "config": config.model_dump(mode="json"),
        "event": dataclasses.asdict(spec),
        "init_from": lineage,
    }


def _interrupted(run_dir: Path, console: Console) -> RunResult:
    """The result where a signal came while the loop was not there to be asked to stop."""
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
    num_readers += config.buffer.num_shards if config.buffer.init == "data" else 0
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
    if chosen_address(config.runtime.address)[0] == "local":  # a cluster has its own
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
    """Shows in the view what is logged of a run; `run.log` keeps it as well."""

    def __init__(self, view: TerminalView) -> None:
        super().__init__()
        self._view = view

    def filter(self, record: logging.LogRecord) -> bool:
        # Names in it may come from files: this handler is the first to see it, the log the next.
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
