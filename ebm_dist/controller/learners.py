"""The learner ranks as one group, which starts, steps and is replaced as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from ebm_dist.cluster.backend import (
    Backend,
    Handle,
    ObjectLost,
    PartDied,
    Ref,
    T,
    fault_of_the_machine,
)
from ebm_dist.controller.clients import LearnerClient
from ebm_dist.controller.retry import RETRY_S
from ebm_dist.core.errors import RunFailed
from ebm_dist.core.types import Cursor, NegativeArrays, RankState

KNOWN_DEAD_S = 3.0
"""Time in which Ray learns that a process of a living node is gone."""


class Wait(Protocol):
    """Waits until all references are done, while rounds go on. Raises PartDied after `timeout`."""

    def __call__(
        self,
        refs: Sequence[Ref[T]],
        timeout: float,
        *,
        each: Callable[[Ref[T]], object] | None = None,
    ) -> None:
        """
        Args:
            each: called with each reference as it finishes; its exceptions end the wait.
        """
        ...


class LearnerGroup:
    """Ranks that hold one model together.

    If one rank dies, the group is replaced: the others wait for it in a collective, and its part of
    the model is lost.
    """

    def __init__(
        self,
        backend: Backend,
        spawn: Callable[[int, str | None], LearnerClient],
        *,
        num_ranks: int,
        port: int | None,
        start_timeout_s: float,
        call_timeout_s: float,
    ) -> None:
        """
        Args:
            spawn: starts the rank of that number, on the given node or, with None, on any.
        """
        self.restarts = 0
        self.broken = False
        """Whether the ranks are unusable: a call failed, so that they may be at different updates,
        or they have not formed their group."""
        self._backend = backend
        self._spawn = spawn
        self._num_ranks = num_ranks
        # A single rank needs no port, and must not fail because that port is taken.
        self._port = port if num_ranks > 1 else None
        self._meeting = False
        self._renewed: list[str] | None = None
        self._asked: list[Ref[bool] | None] = [None] * num_ranks
        self.publishing: list[Ref[bool]] = []
        """Done when the weights of the last `publish` have been sent."""
        self._start_timeout_s = start_timeout_s
        self._call_timeout_s = call_timeout_s
        self.ranks = [spawn(rank, None) for rank in range(num_ranks)]

    @property
    def handles(self) -> list[Handle]:
        return [rank.handle for rank in self.ranks]

    def start_again(self, dead: Handle) -> None:
        """Replace a rank that died before the ranks met."""
        rank = self.handles.index(dead)
        self._backend.kill(dead)
        self.ranks[rank] = self._spawn(rank, None)

    def meet(self, wait: Wait) -> None:
        """Form the process group and build the engines."""
        self.broken = True  # until they have met, also if this raises
        self._meeting = True
        try:
            where = self._backend.rendezvous(self.ranks[0].handle, self._port)
            wait([where], self._start_timeout_s)
            meeting = self._backend.get(where, self._start_timeout_s)
            refs = [rank.start(meeting) for rank in self.ranks]
            # Check each as it finishes: the remaining ranks wait for a dead one until
            # learner.timeout_s.
            wait(refs, self._start_timeout_s, each=self._check_meeting)
        finally:
            self._meeting = False
        self.broken = False

    def _check_meeting(self, ref: Ref[None]) -> None:
        try:
            self.result(ref)
        except RunFailed as error:
            # The remaining ranks report that they lost it, perhaps before Ray knows; the cause is
            # the rank that died.
            deadline = time.monotonic() + KNOWN_DEAD_S
            while not (dead := self.dead()) and time.monotonic() < deadline:
                time.sleep(RETRY_S)
            if dead:
                raise PartDied(f"{' and '.join(dead)} died while the ranks met") from error
            raise

    def renew_if_dead(self) -> None:
        """If a rank is dead, start successors of all ranks, which the next `rebuild` uses.

        They then start while other parts of a lost node are replaced. Until `rebuild` every other
        call raises PartDied. While the ranks meet, this does nothing: the meeting itself fails, and
        successors that were exchanged under it would be asked to meet twice.
        """
        if self._renewed is None and not self._meeting and (dead := self.dead()):
            self._replace()
            self._renewed = dead

    def rebuild(self, wait: Wait) -> None:
        """Replace all ranks; the new ones hold initial weights until `load`."""
        self.restarts += 1
        if self._renewed is None:
            self._replace()
        self._renewed = None
        self.meet(wait)

    def replace(self, wait: Wait, nodes: Sequence[str] | None) -> None:
        """Replace healthy ranks: waits for weights in transit, and counts no restart.

        Args:
            nodes: a node for each rank; None to let Ray choose.
        """
        self.settle(wait)
        self._replace(nodes)
        self._renewed = None
        self.meet(wait)

    def _replace(self, nodes: Sequence[str] | None = None) -> None:
        for rank in self.ranks:
            self._backend.kill(rank.handle)
        where = nodes if nodes is not None else [None] * self._num_ranks
        self.ranks = [self._spawn(rank, node) for rank, node in enumerate(where)]
        self._asked = [None] * self._num_ranks
        self.publishing = []

    def _check_met(self) -> None:
        """Raise PartDied if the ranks are successors that have not met yet."""
        if self._renewed is not None:
            raise PartDied("its process is gone")

    def load(
        self,
        learner: Mapping[str, torch.Tensor | np.ndarray],
        ema: Mapping[str, torch.Tensor | np.ndarray] | None,
        cursors: Sequence[Cursor | None],
        wait: Wait,
        *,
        attempt: int = 0,
    ) -> None:
        """Load a checkpoint of any number of ranks; `attempt` selects the noise."""
        self._check_met()
        refs = [
            rank.load(learner, ema, cursors[i if i < len(cursors) else 0], attempt)
            for i, rank in enumerate(self.ranks)
        ]
        wait(refs, self._call_timeout_s, each=self.result)

    def update(
        self,
        step: int,
        lr: float,
        num_negatives: int,
        negatives: Sequence[tuple[int, Ref[NegativeArrays]]] | None,
        extra: tuple[int, Ref[NegativeArrays]] | None = None,
    ) -> list[Ref[dict[str, float]]]:
        """Start an update on every rank.

        Args:
            num_negatives: number of negatives of the update, without `extra`.
            negatives: (number of chains, reference) of each lease; each rank takes a consecutive
                slice of their concatenation.
            extra: (number, reference) of further negatives, a multiple of the number of ranks.

        Returns:
            The reference of each rank's metrics. When all are done, call `publish`.
        """
        self._check_met()
        replies = []
        for index, rank in enumerate(self.ranks):
            parts, refs = self._slice(index, num_negatives, negatives)
            if extra is not None:
                share = extra[0] // self._num_ranks
                parts.append((index * share, (index + 1) * share))
                refs.append(extra[1])
            after, self._asked[index] = self._asked[index], None
            replies.append(rank.update(step, lr, after, parts, *refs))
        return replies

    def publish(self, *, average: bool) -> tuple[Ref[np.ndarray], Ref[np.ndarray]]:
        """Let rank 0 send the weights of the last update during the next one.

        Call this once after each update, when the references of `publishing` are done.

        Args:
            average: also send the averaged weights.

        Returns:
            References of the flat weights and of the averaged ones, which may be passed on before
            they are done. The second holds None without `average`.
        """
        self._check_met()
        done, flat, mean = self.ranks[0].published(average)
        self.publishing = [done]
        return flat, mean

    def settle(self, wait: Wait) -> None:
        """Wait until the weights of the last `publish` are sent; raise if that failed."""
        self.check_published()
        late, self.publishing = self.publishing, []
        if late:
            wait(late, self._call_timeout_s, each=self.result)

    def check_published(self) -> None:
        """Check, without a wait, whether the weights of the last `publish` are sent; raise if that
        failed.

        Call this in every wait: rounds under lost weights never return.
        """
        if self.publishing and self._backend.wait(self.publishing, 0.0):
            known, self.publishing = self.publishing, []
            self._results(known)

    def fetch(
        self, num_negatives: int, negatives: Sequence[tuple[int, Ref[NegativeArrays]]]
    ) -> list[Ref[None]]:
        """Copy the negatives of an update to the nodes of the ranks.

        Without this, one lost argument would keep Ray from running one rank's update, while the
        other ranks wait for that rank in a collective.

        Returns:
            References that are done when the negatives have arrived.
        """
        self._check_met()
        return [
            rank.fetched(*self._slice(index, num_negatives, negatives)[1])
            for index, rank in enumerate(self.ranks)
        ]

    def arrived(self, ref: Ref[None]) -> bool:
        """Whether a finished reference of `fetch` succeeded; False if negatives are lost."""
        try:
            self._backend.get(ref, 30.0)
        except ObjectLost:
            return False  # no rank has begun the update: the group stays usable
        except PartDied:
            self.broken = True
            raise
        return True

    def _slice(
        self,
        index: int,
        num_negatives: int,
        negatives: Sequence[tuple[int, Ref[NegativeArrays]]] | None,
    ) -> tuple[list[tuple[int, int]], list[Ref[NegativeArrays]]]:
        """The (start, stop) and the reference of each lease of which rank `index` gets a part."""
        per_rank = num_negatives // self._num_ranks
        low, high = index * per_rank, (index + 1) * per_rank
        parts: list[tuple[int, int]] = []
        refs: list[Ref[NegativeArrays]] = []
        offset = 0
        for num, ref in negatives or ():
            first, last = max(low, offset), min(high, offset + num)
            if first < last:
                parts.append((first - offset, last - offset))
                refs.append(ref)
            offset += num
        return parts, refs

    def weights(self, wait: Wait) -> Ref[np.ndarray]:
        """A reference of the current flat weights."""
        self._check_met()
        refs = [rank.weights() for rank in self.ranks]
        wait(refs, self._call_timeout_s)
        self._results(refs[1:])
        return refs[0]

    def state(self) -> list[Ref[RankState]]:
        """References of the state of each rank for a checkpoint; rank 0 has the model.

        The state is that before the next update, which takes the small answer as an argument and
        so runs later.
        """
        self._check_met()
        replies = [rank.state() for rank in self.ranks]
        self._asked = [asked for asked, _ in replies]
        return [state for _, state in replies]

    def read(self, wait: Wait) -> list[RankState]:
        """The state of each rank, in this process."""
        refs = self.state()
        wait(refs, self._call_timeout_s)
        return self._results(refs)

    def result(self, ref: Ref[T]) -> T:
        """The value of a finished call.

        Raises:
            PartDied: a rank died or lost its connection to the others.
            NonFinite, ValueError: as the rank raised them.
        """
        try:
            return self._backend.get(ref, 30.0)
        except PartDied:
            self.broken = True
            raise
        except (RunFailed, ValueError):
            raise
        except Exception as error:
            self.broken = True
            # With several ranks such an error means that the collective lost one. A single rank in
            # this process has no other device to try.
            fault = fault_of_the_machine(error)
            if fault is not None and (self._num_ranks > 1 or self._backend.concurrent):
                what = "lost the others" if self._num_ranks > 1 else "failed"
                raise PartDied(f"a learner rank {what}: {fault}") from error
            raise

    def lost(self) -> bool:
        """Whether the group has to be replaced."""
        return self.broken or bool(self.dead())

    def dead(self) -> list[str]:
        """Names of the ranks whose process is gone."""
        if self._renewed is not None:
            return self._renewed
        return [rank.name for rank in self.ranks if not self._backend.alive(rank.handle, 0.0)]

    def _results(self, refs: Sequence[Ref[T]]) -> list[T]:
        return [self.result(ref) for ref in refs]
