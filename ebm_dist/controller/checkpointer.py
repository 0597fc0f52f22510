"""Takes checkpoints between two updates; a thread writes them, so that no update waits for a disk.

A cut is the consistent state of all parts between two updates, which one checkpoint holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.cut import Progress, shard_file, write_cut
from ebm_dist.cluster.backend import PartDied, Ref, first_line
from ebm_dist.cluster.stall import answer
from ebm_dist.controller.parts import Parts
from ebm_dist.core.errors import NonFinite, RunFailed
from ebm_dist.core.types import Arrays, RankState, ShardMeta, ShardState

log = logging.getLogger("ebm_dist.run")

PATIENCE_S = 5.0
"""Longest wait of the loop for the previous write; after it the cut that is due is postponed."""

FINAL_TRIES = 3
"""Attempts to write the last cut of a run, with growing pauses of 1 s and more between them."""

MAX_DIFFERENCES = 10
"""Most checkpoints that may refer to one file, since its damage invalidates all of them."""


@dataclass(slots=True)
class _WholeCut:
    """A cut with the full state of a shard, to which later cuts may store differences."""

    number: int
    base: checkpoint.Base
    num_differences: int = 0


@dataclass(slots=True)
class _Write:
    """A cut that is being written."""

    thread: threading.Thread
    number: int
    step: int
    why: str
    blocked_s: float
    metas: list[ShardMeta]
    """What each shard says of its own state in the cut."""
    path: Path | None = None
    error: Exception | None = None
    seconds: float = 0.0


class Checkpointer:
    """Takes consistent cuts between two updates, and writes one at a time."""

    def __init__(
        self,
        parts: Parts,
        config: checkpoint.CheckpointConfig,
        run_dir: Path,
        *,
        meta: Mapping[str, Any],
        timeout: float,
        on_checkpoint: Callable[[Path], None],
    ) -> None:
        """
        Args:
            meta: the metadata of the run, part of every checkpoint.
            timeout: seconds within which a part must answer and a write must end.
            on_checkpoint: called with the path of each written checkpoint.
        """
        self._parts = parts
        self._config = config
        self._run_dir = run_dir
        self._meta = dict(meta)
        self._timeout = timeout
        self._on_checkpoint = on_checkpoint
        self._backend = parts.backend
        self._number = 0
        self._taken = -1
        self._written = -1
        self._owed = False
        self._wholes: list[_WholeCut | None] = [None] * len(parts.shards)
        self._write: _Write | None = None

    # --- when -----------------------------------------------------------------------------------

    def resumed_from(self, step: int) -> None:
        """Note that the run continues from the checkpoint of `step`."""
        self._taken = self._written = step
        self._owed = False

    def take_if_due(self, progress: Progress) -> None:
        """Take the cut of this update if one is due and the previous one is written.

        The cut of update 0 is taken too, so that a run can always go back.

        Raises:
            PartDied: a part died during this cut or the previous one.
            NonFinite: the previous cut holds non-finite numbers.
        """
        self.settle(0.0)
        due = self._owed or progress.step % self._config.every == 0
        if not due or progress.step == self._taken:
            return
        if not self.settle(0.0 if self._owed else PATIENCE_S):
            if not self._owed:
                log.info(
                    f"the checkpoint of update {self._taken} is still being written; the next, due "
                    f"at update {progress.step}, is taken after it"
                )
            self._owed = True
            return
        self.take(progress)

    def finish(self, progress: Progress, why: str = "") -> None:
        """Take and write the cut of this update, unless that is done.

        Raises:
            RunFailed: the cut cannot be written; earlier checkpoints stay.
            PartDied, NonFinite: as in `take_if_due`.
        """
        if self.settle(self._timeout) and self._written == progress.step:
            if why:
                log.info(why)
            return
        for attempt in range(FINAL_TRIES):
            if self._write is not None:  # the disk hangs
                break
            time.sleep(attempt)
            self.take(progress, why)
            if self.settle(self._timeout) and self._written == progress.step:
                return
        raise RunFailed(
            f"the checkpoint of update {progress.step} could not be written to {self._run_dir}; "
            "make room or repair the disk, and resume from the one before with --resume auto"
        )

    def latest(self) -> checkpoint.CheckpointDir | None:
        """The newest valid checkpoint, after any write in progress."""
        with contextlib.suppress(NonFinite, PartDied):  # it was not written
            self.settle(self._timeout)
        found = checkpoint.latest(self._run_dir)
        if found is not None and found.skipped:  # the next cut must not refer to a damaged file
            self._wholes = [None] * len(self._wholes)
        return found

    # --- how ------------------------------------------------------------------------------------

    def take(self, progress: Progress, why: str = "") -> None:
        """Take a cut and start to write it; no write may be in progress."""
        assert self._write is None
        began = time.monotonic()
        self._number += 1
        name = checkpoint.name_of(progress.step)
        # No wait is needed: a rank answers with its state before any update that is called later.
        ranks = self._parts.learners.state()
        calls = [
            shard.cut(self._number, self._since(index, name))
            for index, shard in enumerate(self._parts.shards)
        ]
        # The small answer says that the shard has copied its state.
        metas = [
            answer(self._backend, shard.handle, small, self._timeout, self._waits(progress))
            for shard, (small, _) in zip(self._parts.shards, calls)
        ]
        arrays = [large for _, large in calls]
        meta = {**self._meta, "tracking": self._parts.hub.known}
        thread = threading.Thread(
            target=self._run,
            args=(dataclasses.replace(progress), ranks, metas, arrays, meta),
            name="checkpoint",
            daemon=True,
        )
        blocked_s = time.monotonic() - began
        self._write = _Write(thread, self._number, progress.step, why, blocked_s, metas)
        self._taken, self._owed = progress.step, False
        thread.start()

    def settle(self, timeout: float) -> bool:
        """Record the write in progress; return False if it is not done after `timeout` seconds.

        Raises:
            PartDied: a part died before its state arrived; the cut is taken again later.
            NonFinite: the state is not finite.
        """
        write = self._write
        if write is None:
            return True
        write.thread.join(timeout)
        if write.thread.is_alive():
            return False
        self._write = None
        if write.path is not None:
            self._record(write, write.path)
        elif isinstance(write.error, NonFinite):
            raise NonFinite(f"update {write.step}: {write.error}")
        elif isinstance(write.error, OSError):
            reason = write.error.strerror or first_line(write.error)
            log.info(
                f"checkpoint at update {write.step} not written ({reason}): "
                f"{self._run_dir}; earlier checkpoints stay valid, training continues"
            )
        else:
            assert write.error is not None
            self._owed = True
            raise write.error
        return True

    def _record(self, write: _Write, path: Path) -> None:
        self._written = write.step
        for index, meta in enumerate(write.metas):
            if meta.since is None:
                base = checkpoint.Base(path.name, checkpoint.checksum(path, shard_file(index)))
                self._wholes[index] = _WholeCut(write.number, base)
            elif (whole := self._wholes[index]) is not None:
                whole.num_differences += 1
        changed = sum(meta.since is not None for meta in write.metas)
        what = f", {changed} of {len(write.metas)} shards as differences" if changed else ""
        why = f" ({write.why})" if write.why else ""
        log.info(
            f"checkpoint {path.name}{why}: {write.blocked_s:.3f} s of the loop, "
            f"{write.seconds:.2f} s to write{what}"
        )
        self._on_checkpoint(path)

    def _since(self, index: int, name: str) -> int | None:
        """The cut to which shard `index` may store differences in checkpoint `name`, or None."""
        whole = self._wholes[index]
        if whole is None or whole.num_differences >= MAX_DIFFERENCES:
            return None
        # The checkpoint of a repeated update replaces the earlier one, so it cannot refer to it.
        return whole.number if whole.base.checkpoint != name else None

    def _run(
        self,
        progress: Progress,
        ranks: Sequence[Ref[RankState]],
        metas: Sequence[ShardMeta],
        arrays: Sequence[Ref[Arrays]],
        meta: Mapping[str, Any],
    ) -> None:
        """Write a cut, in the thread. Logs and records nothing: `settle` does."""
        write, began = self._write, time.monotonic()
        assert write is not None
        try:
            states = [self._state(rank, ref) for rank, ref in enumerate(ranks)]
            shards = [
                ShardState(about, self._chains(index, ref))
                for index, (about, ref) in enumerate(zip(metas, arrays))
            ]
            bases = {
                shard_file(index): whole.base
                for index, (about, whole) in enumerate(zip(metas, self._wholes))
                if about.since is not None and whole is not None
            }
            write.path = write_cut(
                self._run_dir, progress, states, shards, meta, keep=self._config.keep, bases=bases
            )
        except Exception as error:  # `settle` raises it
            write.error = error
        write.seconds = time.monotonic() - began

    def _state(self, rank: int, ref: Ref[RankState]) -> RankState:
        if not self._backend.wait([ref], self._timeout):
            raise TimeoutError(self._late(f"learner-{rank}"))
        return self._parts.learners.result(ref)

    def _chains(self, index: int, ref: Ref[Arrays]) -> Arrays:
        try:
            return self._backend.get(ref, self._timeout)
        except TimeoutError:
            raise TimeoutError(self._late(self._parts.shards[index].name)) from None

    def _late(self, name: str) -> str:
        return f"the state of {name} did not come in {self._timeout:.0f} s (flow.stall_timeout_s)"

    @staticmethod
    def _waits(progress: Progress) -> str:
        return f"checkpoint of update {progress.step}"
