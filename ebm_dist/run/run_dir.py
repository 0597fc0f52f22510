"""The run directory: its lock, the checkpoint to resume from, and run.log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.config.sections import RunSection
from ebm_dist.core.errors import UserError
from ebm_dist.core.paths import user_path
from ebm_dist.files.durable import lock
from ebm_dist.files.safe_open import make_directory, open_to_append
from ebm_dist.metrics.credentials import trial_id

Resume = Literal["auto", "never", "must"]

_DIRECTORIES = ("artifacts", "checkpoints", "samples", "tensorboard", "wandb")
"""Subdirectories that a run writes."""

log = logging.getLogger("ebm_dist")


def run_directory(run: RunSection, given: str | Path | None) -> Path:
    """The directory of a run: run.dir/run.name, or the given one. A trial of a W&B sweep has one of
    its own beside it.

    Raises:
        UserError: `given` is not a path.
    """
    directory = Path(run.dir) / run.name
    if given is not None:
        try:
            directory = Path(user_path(given))
        except ValueError as error:
            raise UserError(f"--run-dir: {error}") from None
    trial = trial_id()
    return directory if trial is None else directory.with_name(f"{directory.name}-{trial}")


def starting_point(run_dir: Path, resume: Resume) -> checkpoint.CheckpointDir | None:
    """The checkpoint from which a run in `run_dir` resumes; None for a new run."""
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


@contextlib.contextmanager
def claimed(run_dir: Path) -> Iterator[str | None]:
    """Lock `run_dir` for the duration of a run, since two writers would corrupt its files.

    Yields:
        A line of warning if the file system has no locks, else None.
    """
    with writable(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in _DIRECTORIES:
            if (run_dir / name).is_symlink():
                make_directory(run_dir / name)
        handle = open_to_append(run_dir / ".lock")
    with handle:
        with writable(run_dir):
            ours = lock(handle)
        if ours is False:
            raise UserError(
                f"--run-dir: another process trains in {run_dir}; stop it, or choose another"
            )
        yield None if ours else f"{run_dir}: the file system has no locks; start no second run here"


@contextlib.contextmanager
def writable(run_dir: Path) -> Iterator[None]:
    """Turn an OSError within the block into a UserError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"--run-dir: {run_dir} cannot be written ({error.strerror or error}); make room, or "
            "choose another directory"
        ) from None


@contextlib.contextmanager
def run_log(run_dir: Path) -> Iterator[None]:
    """Write log records, including tracebacks, to `run.log`."""
    with writable(run_dir):
        handler = _LogFile(run_dir / "run.log")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _LogFile(logging.Handler):
    """Appends records to a file. If the disk is full, records are lost and the next one reports
    their number, so that `logging` does not flood the terminal with tracebacks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._file = open_to_append(path)
        self._num_lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        lost = f"({self._num_lost} records before this one were lost)\n" if self._num_lost else ""
        data = f"{lost}{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            if self._file.write(data) != len(data):
                raise OSError
            self._num_lost = 0
        except OSError:
            self._num_lost += 1

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        super().close()
