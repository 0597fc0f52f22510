"""Rounds of MCMC in flight: given to workers, committed by shards, repeated after a death.

A round is three calls chained by reference: checkout by the shard, run by the worker, checkin by
the shard. The chains go from actor to actor; the scheduler reads only the small reply of the
checkin. If a worker dies, its rounds start again with the same lease ids, for which the shard gives
the same leases with the same noise. If a shard dies, its rounds and committed leases are forgotten.

Rounds for which no worker has room wait here, so that the first free worker takes them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ebm_dist.buffer.answers import CheckinReply, ShardCounts
from ebm_dist.cluster.backend import Backend, PartDied, Ref, T, fault_of_the_machine
from ebm_dist.controller.clients import ShardClient, WorkerClient
from ebm_dist.controller.retry import MAX_ATTEMPTS, RETRY_S, Decision, Redo, obey
from ebm_dist.controller.rounds.leases import LeaseSource
from ebm_dist.controller.rounds.overdue import OverdueRounds
from ebm_dist.controller.rounds.round import (
    Committed,
    Purpose,
    Round,
    failed_too_often,
)
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.load import Member
from ebm_dist.controller.workers.membership import WorkerPool
from ebm_dist.core.errors import RunFailed

log = logging.getLogger("ebm_dist.run")

REDRAW_S = 0.05
"""Time before a round that got no lease, or whose lease was void, is started again."""


class RoundScheduler:
    """Gives rounds to workers, and collects the committed leases."""

    def __init__(
        self,
        backend: Backend,
        shards: Shards,
        workers: WorkerPool,
        *,
        on_replaced: Callable[[int], Decision],
        on_rejected: Callable[[int], Decision],
        num_chains: int,
        depth: int,
        hang_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            on_replaced: decides what follows, given the index of a shard that was just replaced.
            on_rejected: the same, given the index of a shard that refused a round.
            num_chains: chains per round.
            depth: most rounds that one worker is given at a time.
            hang_s: a part that holds a round for longer is replaced.
        """
        self._backend = backend
        self._shards = shards
        self._on_replaced = on_replaced
        self._on_rejected = on_rejected
        self._leases = LeaseSource(backend, shards, num_chains)
        self._depth = depth
        self._overdue = OverdueRounds(backend, shards, hang_s, clock)
        self._clock = clock
        self._rounds: OrderedDict[Ref[CheckinReply], Round] = OrderedDict()  # ordered by `started`
        self._waiting: deque[Round] = deque()
        self._delayed: list[tuple[float, Round]] = []
        self._noted: set[str] = set()
        self._shard_failures = [0] * len(self._shards)
        self.workers = workers
        self._members = self.workers.members
        # Ordered: to find its first key, a plain dict would skip all deleted entries.
        self.committed: OrderedDict[int, Committed] = OrderedDict()
        self.releases: list[tuple[ShardClient, Ref[int]]] = []
        """For each spare round, its shard and the shard's answer to the release of its chains."""
        self.counts: dict[int, ShardCounts] = {}
        self.restarts = 0
        self.num_refused = 0
        """Rounds that were refused because their lease was void."""
        self.num_started = 0
        self.num_local = 0
        """Started rounds whose worker was on the node of the shard."""
        self.num_by_rows = 0
        """Committed rounds whose chains stayed in the memory of the shard's node."""
        self.steps: Counter[Purpose] = Counter()
        """Committed chain steps (chains x steps), by purpose of the round."""

    @property
    def mcmc_steps(self) -> int:
        """Committed chain steps of all rounds."""
        return self.steps.total()

    @property
    def outstanding(self) -> int:
        """Number of rounds that are started and not committed."""
        return len(self._rounds) + len(self._waiting) + len(self._delayed)

    @property
    def has_room(self) -> bool:
        """Whether a serving worker has fewer than `depth` rounds, and no round waits."""
        member = self._members.first()
        return member is not None and member.load < self._depth and not self._waiting

    @property
    def idle_node(self) -> str | None:
        """Node of the worker that gets the next round."""
        member = self._members.first()
        return member.node if member is not None else None

    def rounds(self) -> Iterable[Round]:
        """All rounds that are started and not committed."""
        yield from self._rounds.values()
        yield from self._waiting
        yield from (round_ for _, round_ in self._delayed)

    def set_weights(self, weights: Ref[np.ndarray], version: int) -> None:
        """Set the weights of all rounds that start from now on. Versions never decrease."""
        self.workers.set_weights(weights, version)

    # --- rounds -------------------------------------------------------------------------------

    def start(
        self,
        lease_id: int,
        shard: int,
        num_steps: int,
        *,
        purpose: Purpose = "negatives",
        ready_id: int | None = None,
    ) -> None:
        """Start a round on the least loaded worker."""
        self._submit(Round(lease_id, shard, num_steps, purpose, -1, ready_id))

    def start_together(
        self,
        leases: Sequence[tuple[int, int]],
        num_steps: int,
        *,
        spare: Sequence[int] = (),
    ) -> None:
        """Start rounds, each (lease id, shard), whose slots do not depend on timing.

        Each shard draws all its leases in one call. Drawn one by one, their free slots would depend
        on which rounds have returned.

        Args:
            spare: lease ids of the rounds whose chains stay in the buffer.
        """
        drawn = self._leases.draw(leases)
        for lease_id, shard in leases:
            purpose: Purpose = "spare" if lease_id in spare else "negatives"
            self._submit(Round(lease_id, shard, num_steps, purpose, -1, drawn=drawn[lease_id]))

    def forget_all(self) -> None:
        """Forget all rounds and committed leases; the shards must refuse their late checkins."""
        for member in self._members:
            self._members.add_load(member, -member.load)
            self.workers.release_if_done(member)
        self._rounds.clear()
        self._waiting.clear()
        self._delayed.clear()
        self.committed.clear()
        self.releases.clear()

    def _submit(self, round_: Round) -> None:
        if round_.attempts >= MAX_ATTEMPTS:
            raise failed_too_often(round_)
        shard = self._shards[round_.shard]
        node = shard.node
        member = self._members.first(node)
        if member is None or member.load >= self._depth:
            round_.version = -1
            self._waiting.append(round_)
            return
        round_.attempts += 1
        round_.member = member
        round_.version = self.workers.version
        round_.started = self._clock()
        weights = round_.weights = self.workers.weights
        assert weights is not None, "a worker serves without weights"
        round_.leased = self._leases.lease(round_, member)
        round_.moved = member.worker.run_round(
            round_.leased, weights, round_.version, round_.num_steps
        )
        round_.ref = shard.checkin(round_.moved, round_.lease_id)
        self._rounds[round_.ref] = round_
        self._members.add_load(member, +1)
        self.num_started += 1
        self.num_local += node is not None and node == member.node

    def poll(self, timeout: float, *others: Ref[T]) -> list[Ref[T]]:
        """Wait up to `timeout` for any round or any of `others`, and handle the finished rounds.

        Returns:
            The references of `others` that are done.
        """
        now = self._clock()
        if self._delayed:
            due = [item for item in self._delayed if item[0] <= now]
            if due:
                self._delayed = [item for item in self._delayed if item[0] > now]
                for _, round_ in due:
                    self._submit(round_)
            else:
                timeout = min(timeout, max(0.0, min(at for at, _ in self._delayed) - now))
        pending = [*others, *self.workers.loading, *self._rounds]
        if not pending:
            time.sleep(timeout)
            done = {}
        else:
            done = dict.fromkeys(self._backend.wait(pending, timeout))
        for ref in done:
            if ref in self._rounds:
                self._finish(ref)
            elif ref in self.workers.loading and (failed := self.workers.admit(ref)) is not None:
                self._redo_rounds_of(*failed)
        self._start_waiting()
        self._replace_hung_parts()
        self._overdue.renew_leases(self.rounds())
        self.workers.remove_overdue(now)
        return [ref for ref in others if ref in done]

    def _start_waiting(self) -> None:
        for _ in range(len(self._waiting)):
            member = self._members.first()
            if member is None or member.load >= self._depth:
                return
            self._submit(self._waiting.popleft())

    def _finish(self, ref: Ref) -> None:
        round_ = self._rounds.pop(ref)
        member = round_.member
        assert member is not None
        self._members.add_load(member, -1)
        try:
            reply = self._backend.get(ref, timeout=30.0)
        except PartDied as died:
            self._recover(round_, member, died)
            return
        except Exception as error:
            # The error is the worker's, since a shard computes nothing. Another process, perhaps on
            # another device, repeats the round with the same chains and noise.
            if (fault := fault_of_the_machine(error)) is None:
                raise
            self._fail(round_, member, f"its round failed: {fault}")
            return
        self.workers.release_if_done(member)
        self.counts[round_.shard] = reply.counts
        for note in reply.notes:
            if note not in self._noted:  # all workers of a pool report the same
                self._noted.add(note)
                log.info(note)
        if reply.accepted:
            member.failures = 0
            member.compiling = reply.compiling
            self._shard_failures[round_.shard] = 0
            self._commit(round_, reply)
            return
        round_.starved = reply.lease_id is None
        if not round_.starved:
            self.num_refused += 1
            obey(self._on_rejected(round_.shard))
        if round_.purpose == "repair":
            return  # its chains are free again
        if round_.starved:
            round_.attempts -= 1  # too few free chains is no failure
            if round_.purpose == "spare":
                return  # the source may start another, on any shard
        round_.version = -1
        self._delayed.append((self._clock() + REDRAW_S, round_))

    def _commit(self, round_: Round, reply: CheckinReply) -> None:
        self.steps[round_.purpose] += reply.num_steps * reply.num_chains
        self.num_by_rows += reply.by_rows
        if round_.purpose == "spare":
            shard = self._shards[round_.shard]
            self.releases.append((shard, shard.release(round_.lease_id)))
            return
        self.committed[round_.lease_id] = Committed.of(round_, reply)

    # --- when parts die -----------------------------------------------------------------------

    def _replace_hung_parts(self) -> None:
        if self.replace_a_hung_shard(self._overdue.hang_s):
            return
        if (round_ := self._overdue.hung_round(self._rounds.values())) is not None:
            assert round_.member is not None
            round_.trouble = self._overdue.hang_message
            self._redo_rounds_of(round_.member, round_.trouble)

    def replace_a_hung_shard(self, seconds: float) -> bool:
        """Replace a shard for which a round older than `seconds` waits; False if there is none."""
        index = self._overdue.hung_shard(self._rounds.values(), seconds)
        if index is not None:
            obey(self.replace_shard(index, f"a round has waited for it for {seconds:.0f} s"))
        return index is not None

    def _recover(self, failed: Round, member: Member, died: PartDied) -> None:
        """Replace the part whose death ended `failed`, and repeat its rounds."""
        if not self._backend.alive(self._shards[failed.shard].handle):
            obey(self.replace_shard(failed.shard, str(died)))
        elif not self._backend.alive(member.worker.handle):
            self._fail(failed, member, str(died))
        else:  # weights are lost, or a node whose death Ray has not noticed yet
            failed.version = -1
            failed.attempts -= 1
            self._delayed.append((self._clock() + RETRY_S, failed))
        self.workers.release_if_done(member)

    def _fail(self, failed: Round, member: Member, why: str) -> None:
        """Replace the worker of a round that failed, and repeat its rounds."""
        failed.trouble = why
        assert failed.ref is not None
        self._rounds[failed.ref] = failed
        self._members.add_load(member, +1)
        self._redo_rounds_of(member, why)

    def redo_lost(self) -> None:
        """Give the current weights to the rounds and workers that wait for lost ones."""
        for ref, round_ in list(self._rounds.items()):
            assert round_.weights is not None
            if round_.weights is self.workers.weights or not self._backend.lost(round_.weights):
                continue
            del self._rounds[ref]
            member = round_.member
            assert member is not None
            self._members.add_load(member, -1)
            self.workers.release_if_done(member)
            round_.attempts -= 1
            self._submit(round_)
        self.workers.send_again()

    def check(self, trouble: Exception | None = None) -> Decision:
        """Replace shards and workers that are known to be dead; `trouble` may name the cause."""
        decision: Decision = Redo()

        def why(part: ShardClient | WorkerClient) -> str:
            return str(trouble) if f"{part.name} " in str(trouble) else "its process is gone"

        for index, shard in enumerate(self._shards):
            if not self._backend.alive(shard.handle):
                following = self.replace_shard(index, why(shard))
                decision = following if isinstance(decision, Redo) else decision
        for member in self._members:
            # The answer to its first weights tells whether a starting worker is dead; `alive` would
            # wait until Ray has placed it.
            if member.state != "starting" and not self._backend.alive(member.worker.handle):
                self._redo_rounds_of(member, why(member.worker))
        return decision

    def replace_shard(self, index: int, why: str) -> Decision:
        """Start another process for a dead shard, and forget its rounds.

        Raises:
            RunFailed: it died more than `MAX_ATTEMPTS` times without a commit.
        """
        shard = self._shards[index]
        self._shard_failures[index] += 1
        if self._shard_failures[index] > MAX_ATTEMPTS:
            raise RunFailed(f"{shard.name} died {MAX_ATTEMPTS} times without a commit: {why}")
        log.info(f"{shard.name} died ({why}); another process takes its chains over")
        self.restarts += 1
        self._forget_rounds_of(index)
        self._shards.replace(index)
        return self._on_replaced(index)

    def move_shard(self, index: int, successor: ShardClient) -> None:
        """Replace the shard by `successor`, which holds its chains, and forget its rounds."""
        self._forget_rounds_of(index)
        self._shards.move(index, successor)

    def _forget_rounds_of(self, index: int) -> None:
        """Forget the rounds and the committed leases of a shard."""
        for ref in [ref for ref, round_ in self._rounds.items() if round_.shard == index]:
            member = self._rounds.pop(ref).member
            assert member is not None
            self._members.add_load(member, -1)
            self.workers.release_if_done(member)
        self._waiting = deque(item for item in self._waiting if item.shard != index)
        self._delayed = [item for item in self._delayed if item[1].shard != index]
        for lease_id in [k for k, v in self.committed.items() if v.shard == index]:
            del self.committed[lease_id]

    def _redo_rounds_of(self, member: Member, why: str) -> None:
        lost = [ref for ref, round_ in self._rounds.items() if round_.member is member]
        again = [self._rounds.pop(ref) for ref in lost]
        self.restarts += 1
        self.workers.replace(member, why)
        for round_ in sorted(again, key=lambda item: item.lease_id):
            self._submit(round_)
