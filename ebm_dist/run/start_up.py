"""The start of a run: waits for the parts and the ranks' rendezvous, and replaces dead parts."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from ebm_dist.cluster.backend import Backend, Handle, PartDied, Ref, T
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.retry import MAX_STARTS, Attempts
from ebm_dist.core.errors import RunFailed

log = logging.getLogger("ebm_dist.run")


class Owner(Protocol):
    """Owns all parts of one kind."""

    @property
    def handles(self) -> list[Handle]: ...
    def start_again(self, dead: Handle) -> None: ...


def await_parts(backend: Backend, owners: Sequence[Owner]) -> None:
    """Wait until every part has started; a part that dies meanwhile is started again.

    Raises:
        RunFailed: one part died too often.
    """
    deaths: Counter[str] = Counter()
    while True:
        handles = [handle for owner in owners for handle in owner.handles]
        if (lost := backend.await_started(handles)) is None:
            return
        dead, died = lost
        deaths[dead.name] += 1
        if deaths[dead.name] >= MAX_STARTS:
            raise RunFailed(
                f"{dead.name} was started {MAX_STARTS} times and died each time ({died}). If "
                "memory ran out, lower workers.num_workers or data.batch_size; see its log"
            )
        log.info(f"{dead.name} died while the run started ({died}); another one is started")
        next(owner for owner in owners if dead in owner.handles).start_again(dead)


def meet(backend: Backend, learners: LearnerGroup) -> None:
    """Let the ranks form their group; if one dies meanwhile, all are replaced."""

    def wait(
        refs: Sequence[Ref[T]], timeout: float, *, each: Callable[[Ref[T]], object] | None = None
    ) -> None:
        pending, deadline = list(refs), time.monotonic() + timeout
        while pending:
            backend.halt.check(grace_s=0.0)
            done = backend.wait(pending, 1.0)
            for ref in done:
                if each is not None:
                    each(ref)
            pending = [ref for ref in pending if ref not in done]
            if pending and time.monotonic() > deadline:
                raise RunFailed(
                    f"the learner ranks did not meet in {timeout:.0f} s "
                    "(runtime.start_timeout_s); see their logs, or raise it if they are only slow"
                )

    attempts, form = Attempts(), learners.meet
    attempts.begin_start()
    while True:
        try:
            form(wait)
            return
        except PartDied as died:
            attempts.failed(died)
            log.info(
                f"{' and '.join(learners.dead()) or 'a rank'} died ({died}); all ranks start anew"
            )
            form = learners.rebuild
