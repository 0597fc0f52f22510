"""Cuts leave the loop as references and reach the disk in a thread: no update waits for a disk."""

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
"""The loop waits this long for the write before; then the cut that is due is taken later."""

FINAL_TRIES = 3
"""Writes of a cut that the run ends with, a second and more apart."""


MAX_DIFFERENCES = 10
"""Checkpoints that refer to one file: its damage on the disk would cost all of them."""


@dataclass(slots=True)
class _WholeCut:
    """A cut that holds a shard whole: what later ones may be differences to."""

    number: int
    base: checkpoint.Base
    num_differences: int = 0


@dataclass(slots=True)
class _Write:
    """A cut on its way to the disk."""

    thread: threading.Thread
    number: int
    step: int
    why: str
    blocked_s: float
    metas: list[ShardMeta]
    """Of the shards, as they described their parts."""
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
            meta: what every checkpoint says of the run.
            timeout: seconds within which a part answers and a disk writes.
            on_checkpoint: is called with each checkpoint that has been written.
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

    def stands_at(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`."""
        self._taken = self._written = step
        self._owed = False

    def take_if_due(self, progress: Progress) -> None:
        """Take the cut of this update if one is due and the one before is written.

        At update 0 as well: whatever dies before the second cut has one to go back to.

        Raises:
            PartDied: a part of the run is gone, of this cut or of the one before.
            NonFinite: the cut before holds numbers that nothing can go on from.
        """
        self.settle(0.0)
        due = self._owed or progress.step % self._config.every == 0
        if not due or progress.step == self._taken:
            return
        if not self.settle(0.0 if self._owed else PATIENCE_S):
            if not self._owed:
                log.info(
                    f"the checkpoint of update {self._taken} is still being written; the one of "
                    f"update {progress.step} is taken once it is"
                )
            self._owed = True
            return
        self.take(progress)

    def finish(self, progress: Progress, why: str = "") -> None:
        """Make sure that this update's cut is on the disk.

        Raises:
            RunFailed: it cannot be written; the checkpoints before it stay.
            PartDied, NonFinite: as `take_if_due`.
        """
        if self.settle(self._timeout) and self._written == progress.step:
            if why:
                log.info(why)
            return
        for attempt in range(FINAL_TRIES):
            if self._write is not None:  # a disk that hangs
                break
            time.sleep(attempt)
            self.take(progress, why)
            if self.settle(self._timeout) and self._written == progress.step:
                return
        raise RunFailed(
            f"the checkpoint of update {progress.step} could not be written to {self._run_dir}; "
            "make room, or see to the disk, and go on from the one before with --resume auto"
        )

    def latest(self) -> checkpoint.CheckpointDir | None:
        """The newest valid checkpoint, that under way included."""
        with contextlib.suppress(NonFinite, PartDied):  # then it has not become one
            self.settle(self._timeout)
        found = checkpoint.latest(self._run_dir)
        if found is not None and found.skipped:  # what is damaged may be what the next refers to
            self._wholes = [None] * len(self._wholes)
        return found

    # --- how ------------------------------------------------------------------------------------

    def take(self, progress: Progress, why: str = "") -> None:
        """Take a consistent cut, and start to write it; nothing may be under way."""
        assert self._write is None
        began = time.monotonic()
        self._number += 1
        name = checkpoint.name_of(progress.step)
        # Not waited for: an update that is started after this call is not in its answer.
        ranks = self._parts.learners.state()
        calls = [
            shard.cut(self._number, self._since(index, name))
            for index, shard in enumerate(self._parts.shards)
        ]
        # The small half of the answer: with it the shard has copied what the cut is to hold.
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
        """Book what has been written; False if a write is still under way after `timeout`.

        Raises:
            PartDied: a part died before its state was there; the cut is owed.
            NonFinite: what was to be written is not finite.
        """
        write = self._write
        if write is None:
            return True
        write.thread.join(timeout)
        if write.thread.is_alive():
            return False
        self._write = None
        if write.path is not None:
            self._book(write, write.path)
        elif isinstance(write.error, NonFinite):
            raise NonFinite(f"update {write.step}: {write.error}")
        elif isinstance(write.error, OSError):
            reason = write.error.strerror or first_line(write.error)
            log.info(
                f"checkpoint at update {write.step} not written ({reason}): "
                f"{self._run_dir}; the one before it is still valid, training goes on"
            )
        else:
            assert write.error is not None
            self._owed = True
            raise write.error
        return True

    def _book(self, write: _Write, path: Path) -> None:
        self._written = write.step
        for index, meta in enumerate(write.metas):
            if meta.since is None:
                base = checkpoint.Base(path.name, checkpoint.checksum(path, shard_file(index)))
                self._wholes[index] = _WholeCut(write.number, base)
            elif (whole := self._wholes[index]) is not None:
                whole.num_differences += 1
        changed = sum(meta.since is not None for meta in write.metas)
        what = f", {changed} of {len(write.metas)} shards by what changed" if changed else ""
        why = f" ({write.why})" if write.why else ""
        log.info(
            f"checkpoint {path.name}{why}: {write.blocked_s:.3f} s of the loop, "
            f"{write.seconds:.2f} s to write{what}"
        )
        self._on_checkpoint(path)

    def _since(self, index: int, name: str) -> int | None:
        """The cut that shard `index` may refer to in the checkpoint `name`."""
        whole = self._wholes[index]
        if whole is None or whole.num_differences >= MAX_DIFFERENCES:
            return None
        # An update that is done again replaces its checkpoint, which then cannot be referred to.
        return whole.number if whole.base.checkpoint != name else None

    def _run(
        self,
        progress: Progress,
        ranks: Sequence[Ref[RankState]],
        metas: Sequence[ShardMeta],
        arrays: Sequence[Ref[Arrays]],
        meta: Mapping[str, Any],
    ) -> None:
        """The thread's work. Says nothing and books nothing: that is for who settles."""
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
        except Exception as error:  # whatever it is, who settles has to be told
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
