"""The learner ranks as one group: they start together, step together and are replaced together."""

from __future__ import annotations

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
from ebm_dist.core.errors import RunFailed
from ebm_dist.core.types import Cursor, NegativeArrays, RankState


class Wait(Protocol):
    """Returns when every reference is done, or raises: it took too long. The graph goes on."""

    def __call__(
        self,
        refs: Sequence[Ref[T]],
        timeout: float,
        *,
        each: Callable[[Ref[T]], object] | None = None,
    ) -> None:
        """
        Args:
            each: sees them as they come; what it raises ends the wait.
        """
        ...


class LearnerGroup:
    """Ranks that hold one model between them. A rank that dies takes the group with it: the
    others stand in a collective that it will never join, and the model has lost a part."""

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
            spawn: starts a rank, on a node or where Ray likes.
        """
        self.restarts = 0
        self.broken = False
        """Whether a call failed, so that the ranks may be out of step with each other, or they
        have not met."""
        self._backend = backend
        self._spawn = spawn
        self._num_ranks = num_ranks
        # A single rank meets nobody, and must not fail for a port that it does not need.
        self._port = port if num_ranks > 1 else None
        self._renewed: list[str] | None = None
        self._asked: list[Ref[bool] | None] = [None] * num_ranks
        self.publishing: list[Ref[bool]] = []
        """Done when the weights that `publish` was asked for last are there."""
        self._start_timeout_s = start_timeout_s
        self._call_timeout_s = call_timeout_s
        self.ranks = [spawn(rank, None) for rank in range(num_ranks)]

    @property
    def handles(self) -> list[Handle]:
        return [rank.handle for rank in self.ranks]

    def start_again(self, dead: Handle) -> None:
        """Another process for a rank that died before the ranks met."""
        rank = self.handles.index(dead)
        self._backend.kill(dead)
        self.ranks[rank] = self._spawn(rank, None)

    def meet(self, wait: Wait) -> None:
        """Form the process group and build the engines."""
        self.broken = True  # until they have met, whatever cuts it short
        where = self._backend.rendezvous(self.ranks[0].handle, self._port)
        wait([where], self._start_timeout_s)
        meeting = self._backend.get(where, self._start_timeout_s)
        refs = [rank.start(meeting) for rank in self.ranks]
        # As they come: who is left of a group waits for the dead until learner.timeout_s.
        wait(refs, self._start_timeout_s, each=self._came_to_meet)
        self.broken = False

    def _came_to_meet(self, ref: Ref[None]) -> None:
        try:
            self.result(ref)
        except RunFailed as error:
            # What is left of a group says that nobody came; who did not has died on the way.
            if dead := self.dead():
                raise PartDied(f"{' and '.join(dead)} died while the ranks met") from error
            raise

    def renew_if_dead(self) -> None:
        """Start successors of all ranks if one is dead, for a `rebuild` to find them under way.

        A lost node takes more than one part with it, and each takes seconds to start. Until then
        every other call raises PartDied.
        """
        if self._renewed is None and (dead := self.dead()):
            self._replace()
            self._renewed = dead

    def rebuild(self, wait: Wait) -> None:
        """Replace every rank; the new ones hold initial weights until `load`."""
        self.restarts += 1
        if self._renewed is None:
            self._replace()
        self._renewed = None
        self.meet(wait)

    def replace(self, wait: Wait, nodes: Sequence[str] | None) -> None:
        """As `rebuild`, for ranks that are well: no fault is counted, and what they publish comes.

        Args:
            nodes: where each is started; Ray chooses when left out.
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
        """Raises PartDied where the ranks are successors that have not met yet."""
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
        """Continue from a checkpoint of any number of ranks, with the noise of `attempt`."""
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
            num_negatives: of the update, without `extra`.
            negatives: (number of chains, reference) of each lease; the ranks take consecutive
                slices of all of them together.
            extra: negatives on top of those, a multiple of the number of ranks.

        Returns:
            References of metrics, for each rank. When all are there, its weights can be published.
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
        """Have the weights of the last update sent, beside the next one.

        Call it once after each update, and not again until those of `publishing` are there.

        Args:
            average: have the averaged weights sent as well.

        Returns:
            References of the flat weights and, where they were asked for, of the averaged ones, to
            be used before they are there.
        """
        self._check_met()
        done, flat, mean = self.ranks[0].published(average)
        self.publishing = [done]
        return flat, mean

    def settle(self, wait: Wait) -> None:
        """Return when the weights that `publish` was asked for are there; raises why not."""
        self.look()
        late, self.publishing = self.publishing, []
        if late:
            wait(late, self._call_timeout_s, each=self.result)

    def look(self) -> None:
        """Take note of weights that have come; raises why they will not.

        To be called in every wait: rounds that are given them wait as well, and never come back.
        """
        if self.publishing and self._backend.wait(self.publishing, 0.0):
            known, self.publishing = self.publishing, []
            self._results(known)

    def fetch(
        self, num_negatives: int, negatives: Sequence[tuple[int, Ref[NegativeArrays]]]
    ) -> list[Ref[None]]:
        """Have the negatives of an update brought to the nodes of the ranks.

        Returns:
            References, done when they are there. An argument that is lost keeps a call from
            being made, and in an update the other ranks would wait for it in a collective.
        """
        self._check_met()
        return [
            rank.fetched(*self._slice(index, num_negatives, negatives)[1])
            for index, rank in enumerate(self.ranks)
        ]

    def came(self, ref: Ref[None]) -> bool:
        """Whether the negatives of a finished `fetch` are there; False if some are lost."""
        try:
            self._backend.get(ref, 30.0)
        except ObjectLost:
            return False  # no rank has begun anything: they are in step
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
        """What rank `index` takes of each lease that it takes something of."""
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
        """A reference of the flat weights as they are."""
        self._check_met()
        refs = [rank.weights() for rank in self.ranks]
        wait(refs, self._call_timeout_s)
        self._results(refs[1:])
        return refs[0]

    def state(self) -> list[Ref[RankState]]:
        """References of what a checkpoint keeps of each rank; the model is with the first.

        As of now: the next update is given the small half of the answer, and is not in it.
        """
        self._check_met()
        replies = [rank.state() for rank in self.ranks]
        self._asked = [asked for asked, _ in replies]
        return [state for _, state in replies]

    def read(self, wait: Wait) -> list[RankState]:
        """The whole state, as `state` of each rank, in this process."""
        refs = self.state()
        wait(refs, self._call_timeout_s)
        return self._results(refs)

    def result(self, ref: Ref[T]) -> T:
        """The value of a finished call.

        Raises:
            PartDied: a rank is gone, or lost the others.
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
            # With peers, an error that is none of ours is the collective that lost one of them. In
            # this process there is no other device to try.
            fault = fault_of_the_machine(error)
            if fault is not None and (self._num_ranks > 1 or self._backend.concurrent):
                what = "lost the others" if self._num_ranks > 1 else "failed"
                raise PartDied(f"a learner rank {what}: {fault}") from error
            raise

    def lost(self) -> bool:
        """Whether a rank is known to be dead or out of step."""
        return self.broken or bool(self.dead())

    def dead(self) -> list[str]:
        """Names of the ranks whose process is gone."""
        if self._renewed is not None:
            return self._renewed
        return [rank.name for rank in self.ranks if not self._backend.alive(rank.handle, 0.0)]

    def _results(self, refs: Sequence[Ref[T]]) -> list[T]:
        return [self.result(ref) for ref in refs]
