"""The directory of a run: whose it is, where it stands, and what it logs."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ebm_dist import checkpoint
from ebm_dist.config import RunConfig
from ebm_dist.errors import UserError

Resume = Literal["auto", "never", "must"]

log = logging.getLogger("ebm_dist")


def starting_point(run_dir: Path, resume: Resume) -> checkpoint.CheckpointDir | None:
    """The checkpoint that a run in `run_dir` goes on from, None for a new run."""
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


def check_resumable(config: RunConfig, found: checkpoint.CheckpointDir) -> None:
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
def claimed(run_dir: Path) -> Iterator[None]:
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
def run_log(run_dir: Path) -> Iterator[None]:
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


def replace_text(path: Path, text: str) -> None:
    """Write `path` so that a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
