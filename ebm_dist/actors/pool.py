"""Rounds of MCMC in flight: dispatched to workers, committed by shards, redone when one dies.

A round is three calls chained by reference: the shard's checkout, the worker's run, the
shard's checkin. The chains go from actor to actor; the pool sees the small reply of the
checkin alone. A lease outlives its worker: a round whose worker died is started again with the
same id, and the shard gives out the same lease, with the same noise. A lease does not outlive
its shard: rounds with a shard that died are forgotten, ready ones too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ebm_dist.actors.handles import Backend, Handle, PartDied, Ref
from ebm_dist.errors import RunFailed

MAX_ATTEMPTS = 5
"""Starts of one round, and restarts of one worker without a commit between, before giving up."""


@dataclass(slots=True)
class Round:
    """A round in flight."""

    lease_id: int
    shard: int
    worker: int
    num_steps: int
    ready_id: int | None
    """Of a repair: the committed lease whose chains are moved again."""
    version: int
    ref: Ref = None
    attempts: int = 0
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Committed:
    """A lease whose chains are ready to be negatives."""

    lease_id: int
    shard: int
    version: int
    num_steps: int
    num_chains: int
    stats: dict[str, float]


class RoundPool:
    """Keeps workers supplied with rounds, and collects what they committed."""

    def __init__(
        self,
        backend: Backend,
        shards: list[Handle],
        workers: list[Handle],
        *,
        respawn_worker: Callable[[int], Handle],
        respawn_shard: Callable[[int], Handle],
        on_rejected: Callable[[int], None],
        say: Callable[[str], None],
        num_chains: int,
        depth: int,
        hang_s: float,
    ) -> None:
        """
        Args:
            shards, workers: the lists themselves; successors of the dead are put in them.
            on_rejected: is told the shard of a round that it did not accept.
            say: is told what died.
            num_chains: of a round.
            depth: rounds that a worker may have before it.
            hang_s: a worker that holds a round for longer is replaced.
        """
        self._backend = backend
        self._shards = shards
        self._workers = workers
        self._respawn_worker = respawn_worker
        self._respawn_shard = respawn_shard
        self._on_rejected = on_rejected
        self._say = say
        self._num_chains = num_chains
        self._depth = depth
        self._hang_s = hang_s
        self._rounds: dict[Ref, Round] = {}
        self._delayed: list[tuple[float, Round]] = []
        self._load = [0] * len(self._workers)
        self._failures = [0] * len(self._workers)
        self._turn = [0] * len(self._workers)
        self._num_submitted = 0
        self._shard_failures = [0] * len(self._shards)
        self._idle_since: list[float | None] = [time.monotonic()] * len(self._workers)
        self._idle_s = 0.0
        self._weights: Ref = None
        self._version = -1
        self.committed: dict[int, Committed] = {}
        self.counts: dict[int, dict[str, float]] = {}
        self.restarts = 0
        self.num_rejected = 0
        self.mcmc_steps = 0

    @property
    def outstanding(self) -> int:
        """Rounds started and not yet committed."""
        return len(self._rounds) + len(self._delayed)

    @property
    def has_room(self) -> bool:
        """Whether some worker has fewer than `depth` rounds before it, and weights to run them."""
        return self._version >= 0 and min(self._load) < self._depth

    def set_weights(self, weights: Ref, version: int) -> None:
        """Weights of the rounds started from now on. Versions never go back."""
        if version < self._version:
            raise ValueError(f"weights of version {version} after version {self._version}")
        self._weights = weights
        self._version = version

    def start(
        self, lease_id: int, shard: int, num_steps: int, *, ready_id: int | None = None
    ) -> None:
        """Start a round on the worker with the fewest rounds before it."""
        self._submit(Round(lease_id, shard, 0, num_steps, ready_id, self._version))

    def start_together(self, leases: Sequence[tuple[int, int]], num_steps: int) -> None:
        """Start rounds, (lease id, shard) each, whose slots do not depend on timing.

        A shard draws all of its own in one call: drawn one by one, the slots that are free for
        the next would depend on which rounds are back.
        """
        drawn: dict[int, Ref] = {}
        for index, shard in enumerate(self._shards):
            ids = [lease_id for lease_id, at in leases if at == index]
            if len(ids) == 1:
                drawn[ids[0]] = shard.call("checkout", ids[0], self._num_chains)
            elif ids:
                refs = shard.call("checkout_many", ids, self._num_chains, num_returns=len(ids))
                drawn |= zip(ids, refs)
        for lease_id, shard in leases:
            round_ = Round(lease_id, shard, 0, num_steps, None, self._version)
            self._submit(round_, drawn[lease_id])

    def forget_all(self) -> None:
        """Give up all rounds and all that is committed; the shards must refuse what comes back."""
        for index in range(len(self._workers)):
            while self._load[index]:
                self._idle(index)
        self._rounds.clear()
        self._delayed.clear()
        self.committed.clear()

    def _submit(self, round_: Round, lease: Ref = None) -> None:
        if round_.attempts >= MAX_ATTEMPTS:
            raise RunFailed(
                f"round {round_.lease_id} of shard {round_.shard} failed {MAX_ATTEMPTS} times; "
                "see the log of its workers"
            )
        round_.attempts += 1
        # Of equals the one that has waited longest: a newcomer that is never tried would keep the
        # failures of its predecessor on its count.
        round_.worker = min(
            range(len(self._workers)), key=lambda index: (self._load[index], self._turn[index])
        )
        self._num_submitted += 1
        self._turn[round_.worker] = self._num_submitted
        round_.version = self._version
        round_.started = time.monotonic()
        shard, worker = self._shards[round_.shard], self._workers[round_.worker]
        if lease is not None:
            pass
        elif round_.ready_id is None:
            lease = shard.call("checkout", round_.lease_id, self._num_chains)
        else:
            lease = shard.call("checkout_ready", round_.lease_id, round_.ready_id)
        moved = worker.call("run_round", lease, self._weights, round_.version, round_.num_steps)
        round_.ref = shard.call("checkin", moved, round_.lease_id)
        self._rounds[round_.ref] = round_
        self._busy(round_.worker)

    def poll(self, timeout: float, *others: Ref) -> list[Ref]:
        """Wait up to `timeout` for any round or any of `others`; book the finished rounds.

        Returns:
            Those of `others` that are done.
        """
        now = time.monotonic()
        due = [item for item in self._delayed if item[0] <= now]
        if due:
            self._delayed = [item for item in self._delayed if item[0] > now]
            for _, round_ in due:
                self._submit(round_)
        elif self._delayed:
            timeout = min(timeout, max(0.0, min(at for at, _ in self._delayed) - now))
        pending = [*others, *self._rounds]
        if not pending:
            time.sleep(timeout)
            return []
        done = self._backend.wait(pending, timeout)
        finished = [ref for ref in done if ref in self._rounds]
        for ref in finished:
            self._finish(ref)
        if self._rounds:
            oldest = min(self._rounds.values(), key=lambda round_: round_.started)
            if now - oldest.started > self._hang_s:
                self._replace_worker(oldest.worker, f"held a round for {self._hang_s:.0f} s")
        return [ref for ref in others if ref in done]

    def _finish(self, ref: Ref) -> None:
        round_ = self._rounds.pop(ref, None)
        if round_ is None:  # resubmitted meanwhile, with all rounds of a dead worker
            return
        self._idle(round_.worker)
        try:
            reply = self._backend.get(ref, timeout=30.0)
        except PartDied as died:
            self._recover(round_, died)
            return
        self.counts[round_.shard] = reply["counts"]
        if reply["accepted"]:
            self._failures[round_.worker] = 0
            self._shard_failures[round_.shard] = 0
            self.mcmc_steps += reply["num_steps"] * reply["num_chains"]
            self.committed[round_.lease_id] = Committed(
                lease_id=round_.lease_id,
                shard=round_.shard,
                version=reply["version"],
                num_steps=reply["num_steps"],
                num_chains=reply["num_chains"],
                stats=reply["stats"],
            )
            return
        self.num_rejected += 1
        if reply["lease_id"] is not None:
            self._on_rejected(round_.shard)
        if round_.ready_id is not None:
            return  # the repaired chains expired back into the shard: nothing to redo
        if reply["lease_id"] is None:
            round_.attempts -= 1  # too few free chains is no fault: wait for them
        self._delayed.append((time.monotonic() + 0.05, round_))

    def _recover(self, failed: Round, died: PartDied) -> None:
        """Replace the part that took `failed` with it, and start its rounds again."""
        if not self._backend.alive(self._shards[failed.shard]):
            self.replace_shard(failed.shard, str(died))
        elif not self._backend.alive(self._workers[failed.worker]):
            self._rounds[failed.ref] = failed
            self._busy(failed.worker)
            self._replace_worker(failed.worker, str(died))
        else:  # unreachable for a moment
            self._delayed.append((time.monotonic() + 0.25 * 2**failed.attempts, failed))

    def check(self) -> None:
        """Replace the shards and workers that are known to be dead."""
        for index, shard in enumerate(self._shards):
            if not self._backend.alive(shard):
                self.replace_shard(index, "its process is gone")
        for index, worker in enumerate(self._workers):
            if not self._backend.alive(worker):
                self._replace_worker(index, "its process is gone")

    def replace_shard(self, index: int, why: str) -> None:
        """Start another process on the chains of a dead shard, without the rounds it knew of.

        Raises:
            RunFailed: it died `MAX_ATTEMPTS` times without a commit between.
        """
        shard = self._shards[index]
        self._shard_failures[index] += 1
        if self._shard_failures[index] > MAX_ATTEMPTS:
            raise RunFailed(f"{shard.name} died {MAX_ATTEMPTS} times without a commit: {why}")
        self._say(f"{shard.name} died ({why}); another process takes its chains over")
        self.restarts += 1
        for ref in [ref for ref, round_ in self._rounds.items() if round_.shard == index]:
            self._idle(self._rounds.pop(ref).worker)
        self._delayed = [item for item in self._delayed if item[1].shard != index]
        self.committed = {k: v for k, v in self.committed.items() if v.shard != index}
        self._backend.kill(shard)
        self._shards[index] = self._respawn_shard(index)

    def _replace_worker(self, index: int, why: str) -> None:
        worker = self._workers[index]
        self._failures[index] += 1
        if self._failures[index] > MAX_ATTEMPTS:
            raise RunFailed(
                f"{worker.name} died {MAX_ATTEMPTS} times without finishing a round: {why}"
            )
        self._say(f"{worker.name} died ({why}); another one redoes its rounds")
        self.restarts += 1
        lost = [ref for ref, round_ in self._rounds.items() if round_.worker == index]
        again = [self._rounds.pop(ref) for ref in lost]
        while self._load[index]:
            self._idle(index)
        self._backend.kill(worker)
        self._workers[index] = self._respawn_worker(index)
        for round_ in sorted(again, key=lambda item: item.lease_id):
            self._submit(round_)

    def _busy(self, worker: int) -> None:
        self._load[worker] += 1
        since = self._idle_since[worker]
        if since is not None:
            self._idle_s += time.monotonic() - since
            self._idle_since[worker] = None

    def _idle(self, worker: int) -> None:
        self._load[worker] = max(0, self._load[worker] - 1)
        if self._load[worker] == 0:
            self._idle_since[worker] = time.monotonic()

    def take_idle_seconds(self) -> float:
        """Mean seconds a worker had no round since the last call."""
        now = time.monotonic()
        for index, since in enumerate(self._idle_since):
            if since is not None:
                self._idle_s += now - since
                self._idle_since[index] = now
        mean, self._idle_s = self._idle_s / len(self._workers), 0.0
        return mean
