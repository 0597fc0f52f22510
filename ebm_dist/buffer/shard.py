"""A shard: persistent chains in slots, and the lease protocol that moves them.

Every slot is free, leased or ready, and `free + leased + ready == capacity` always. A
lease takes slots from free to leased; a checkin commits their new chains and makes them
ready; taking them as negatives makes them free again. Lease ids come from the caller, and
every operation can be repeated: a checkout under a known id returns the same lease, a second
checkin of one changes nothing. The noise of a lease is seeded by its id alone.

Under a `directory` the chains outlive the process. A shard that finds them there takes them
over, free and as last committed, under the next epoch: the leases of its predecessor are void.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ebm_dist.buffer.jarzynski import start_log_weight, start_noise
from ebm_dist.buffer.policy import BufferConfig, first_identity
from ebm_dist.buffer.storage import FREE, LEASED, READY, SlotStorage
from ebm_dist.buffer.trace import ChainTrace, TracePlan
from ebm_dist.seeds import derive_seed
from ebm_dist.types import Batch, EventSpec, Lease, MovedChains

_FILL_CHUNK = 4096


class StartSource(Protocol):
    """Where chains that start from data take them; `data.DataStream` is one."""

    def next_batch(self, num: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(slots=True)
class _Outstanding:
    lease: Lease
    fresh: np.ndarray  # (M,) bool: the chain started afresh with this lease


class Shard:
    """Chains of one shard. Plain Python: `actors/ray_backend.py` puts it behind Ray."""

    def __init__(
        self,
        config: BufferConfig,
        spec: EventSpec,
        *,
        index: int,
        capacity: int,
        max_lease: int,
        seed: int,
        data: StartSource | None = None,
        directory: str | None = None,
        trace: TracePlan | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if config.init == "data" and data is None:
            raise ValueError("buffer.init is 'data', but the shard was given no data to start from")
        self.index = index
        self._config = config
        self._spec = spec
        self._seed = seed
        self._data = data
        self._clock = clock
        self._leases: dict[int, _Outstanding] = {}
        self._ready: dict[int, np.ndarray] = {}
        self._shown: dict[int, dict[str, np.ndarray]] = {}  # negatives of ready leases, if apart
        self._done: dict[int, dict[str, Any]] = {}
        self._counters = {"late_checkins": 0, "expired_leases": 0, "reinitialised": 0}
        self._whole_cuts: dict[int, np.ndarray] = {}  # generations by slot at those cuts
        self._trace = ChainTrace(trace, capacity, spec.shape) if trace is not None else None
        self._restart = np.zeros(capacity, bool)  # slots whose next lease starts afresh
        self._slots = SlotStorage(
            capacity, max_lease, spec.shape, Path(directory) if directory else None
        )
        if self._slots.attached:
            # The leases of the process before died with its memory: their slots still hold
            # the chains as they were, and the new epoch refuses its late checkins.
            self._slots.state[:] = FREE
        else:
            self._fill()
            self._slots.finish_init()

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    @property
    def epoch(self) -> int:
        """Counts the lives of this shard; a lease of an earlier one is void."""
        return int(self._slots.epoch[0])

    @property
    def attached(self) -> bool:
        """Whether the chains are those that a process before this one left."""
        return self._slots.attached

    def _fill(self) -> None:
        first = first_identity(self._config.capacity, self._config.num_shards, self.index)
        for start in range(0, self.capacity, _FILL_CHUNK):
            slots = np.arange(start, min(start + _FILL_CHUNK, self.capacity))
            x = self._slots.position[slots] = self._start(len(slots), "fill", start)
            if self._config.jarzynski:
                self._slots.log_weight[slots] = start_log_weight(self._config, self._spec, x)
            self._slots.chain_id[slots] = first + slots
            self._slots.version[slots] = -1

    def _start(self, num: int, *path: str | int) -> np.ndarray:
        generator = torch.Generator().manual_seed(
            derive_seed(self._seed, "shard", self.index, *path)
        )
        if self._config.init == "noise":
            return start_noise(self._config, self._spec, num, generator).numpy()
        assert self._data is not None
        x = self._data.next_batch(num).x
        if self._config.data_noise_std > 0 and not self._spec.discrete:
            x = x + self._config.data_noise_std * torch.empty_like(x).normal_(generator=generator)
        return x.numpy()

    # --- the protocol ---------------------------------------------------------------------

    def checkout(self, lease_id: int, num: int) -> Lease | None:
        """Lease `num` free chains drawn without replacement, or None if fewer are free.

        Repeating a checkout of an outstanding `lease_id` gives the same lease again, so that
        another worker can redo the round of a dead one; one that was committed gives None,
        and `checkin(None, lease_id)` then repeats the reply.
        """
        self.expire()
        if lease_id in self._leases:
            return self._renew(self._leases[lease_id])
        if lease_id in self._done:
            return None
        free = np.flatnonzero(self._slots.state == FREE)
        if len(free) < num:
            return None
        rng = np.random.default_rng(derive_seed(self._seed, "shard", self.index, "pick", lease_id))
        slots = free[rng.choice(len(free), size=num, replace=False, shuffle=False)]
        fresh = (rng.random(num) < self._config.reinit_prob) | self._restart[slots]
        rows = self._slots.rows(slots)
        position = self._slots.position[rows]  # fancy indexing copies
        log_weight = self._slots.log_weight[rows]
        version = self._slots.version[rows]
        if fresh.any():
            # Only the lease sees the fresh start: should it expire, the old chain is still there.
            position[fresh] = self._start(int(fresh.sum()), "fresh", lease_id)
            log_weight[fresh] = 0.0
            version[fresh] = -1
        return self._issue(lease_id, slots, position, log_weight, version, fresh)

    def checkout_many(self, lease_ids: Sequence[int], num: int) -> list[Lease | None]:
        """Leases drawn one after the other, in this order whatever else is under way."""
        return [self.checkout(lease_id, num) for lease_id in lease_ids]

    def checkout_ready(self, lease_id: int, ready_id: int) -> Lease | None:
        """Lease the ready chains of `ready_id` again, to move them under newer weights."""
        self.expire()
        if lease_id in self._leases:
            return self._renew(self._leases[lease_id])
        slots = self._ready.pop(ready_id, None)
        self._shown.pop(ready_id, None)
        if slots is None:
            return None
        rows = self._slots.rows(slots)
        return self._issue(
            lease_id,
            slots,
            self._slots.position[rows],
            self._slots.log_weight[rows],
            self._slots.version[rows],
            np.zeros(len(slots), bool),
        )

    def _issue(
        self,
        lease_id: int,
        slots: np.ndarray,
        position: np.ndarray,
        log_weight: np.ndarray,
        version: np.ndarray,
        fresh: np.ndarray,
    ) -> Lease:
        self._slots.state[slots] = LEASED
        lease = Lease(
            lease_id=lease_id,
            shard=self.index,
            shard_epoch=self.epoch,
            slots=slots,
            generations=self._slots.generation[slots],
            seed=derive_seed(self._seed, "lease", lease_id),
            deadline=self._clock() + self._config.lease_timeout_s,
            chain_id=self._slots.chain_id[self._slots.rows(slots)],
            position=position,
            log_weight=log_weight,
            version=version,
            energy=self._slots.energy[self._slots.rows(slots)],
        )
        self._leases[lease_id] = _Outstanding(lease, fresh)
        return lease

    def _renew(self, outstanding: _Outstanding) -> Lease:
        old = outstanding.lease
        fields = {name: getattr(old, name) for name in Lease.__slots__}
        fields["deadline"] = self._clock() + self._config.lease_timeout_s
        outstanding.lease = Lease(**fields)
        return outstanding.lease

    def checkin(self, moved: MovedChains | None, lease_id: int | None = None) -> dict[str, Any]:
        """Commit the chains of a lease, unless the lease is void.

        Args:
            moved: what the worker returned; None if it was given no lease.
            lease_id: the lease that was asked for, to repeat its reply where it was committed
                before and the first reply was lost.

        Returns:
            `accepted`; `lease_id`, `version`, `num_steps` and `stats` of the round; and
            `counts` of the shard after it. A void lease (expired, of another epoch, or of
            chains moved since) changes nothing but a count.

        Raises:
            ValueError: chains of another event shape, not as many as were leased, or others.
        """
        self.expire()
        if moved is None:
            known = self._done.get(-1 if lease_id is None else lease_id)
            reply = known or {"accepted": False, "lease_id": None}
            return {**reply, "counts": self.counts()}
        reply = {
            "lease_id": moved.lease_id,
            "version": moved.version,
            "num_steps": moved.num_steps,
            "num_chains": len(moved.slots),
            "stats": moved.stats,
        }
        if moved.lease_id in self._done and moved.shard_epoch == self.epoch:
            return {**self._done[moved.lease_id], "counts": self.counts()}
        outstanding = self._leases.get(moved.lease_id)
        if outstanding is None or not self._holds(outstanding.lease, moved):
            self._counters["late_checkins"] += 1
            return {"accepted": False, **reply, "counts": self.counts()}
        expected = (len(moved.slots), *self._slots.position.shape[1:])
        if moved.position.shape != expected:
            raise ValueError(
                f"lease {moved.lease_id} came back as chains of shape {moved.position.shape}, "
                f"{expected} went out; the event shape comes from data.source"
            )
        if not np.array_equal(moved.chain_id, outstanding.lease.chain_id):
            raise ValueError(
                f"lease {moved.lease_id} came back with chains {_few(moved.chain_id)}, "
                f"{_few(outstanding.lease.chain_id)} went out: a worker must keep their order"
            )
        slots, fresh = outstanding.lease.slots, outstanding.fresh
        rows = self._slots.rows(slots)
        age = np.where(fresh, 0, self._slots.age[rows])
        if moved.ancestors is not None:
            age = age[moved.ancestors]
            self._counters["resampled"] = self._counters.get("resampled", 0) + 1
        self._slots.commit(
            slots,
            position=moved.position,
            energy=moved.energy,
            version=np.full(len(slots), moved.version, np.int64),
            age=age + 1,
            log_weight=moved.log_weight,
            chain_id=moved.chain_id,
        )
        if self._trace is not None:
            self._trace.record(slots, moved.position, fresh)
        self._restart[slots[fresh]] = False
        self._slots.generation[slots] += 1
        self._slots.state[slots] = READY
        self._ready[moved.lease_id] = slots
        if moved.negatives is not None:
            self._shown[moved.lease_id] = moved.negatives
        del self._leases[moved.lease_id]
        self._remember(moved.lease_id, {"accepted": True, **reply})
        self._counters["reinitialised"] += int(fresh.sum())
        return {"accepted": True, **reply, "counts": self.counts()}

    def _holds(self, lease: Lease, moved: MovedChains) -> bool:
        return (
            moved.shard_epoch == self.epoch
            and np.array_equal(moved.slots, lease.slots)
            and np.array_equal(moved.generations, self._slots.generation[moved.slots])
        )

    def _remember(self, lease_id: int, reply: dict[str, Any]) -> None:
        self._done[lease_id] = reply
        while len(self._done) > 4096:
            self._done.pop(next(iter(self._done)))

    def take(self, lease_id: int) -> tuple[bool, dict[str, np.ndarray] | None]:
        """The negatives of a committed lease, whose slots become free.

        Returns:
            Whether the lease was ready, and if so its negatives. The first can be read where
            the second goes to a learner unread.
        """
        slots = self._ready.pop(lease_id, None)
        if slots is None:
            return False, None
        rows = self._slots.rows(slots)
        self._slots.state[slots] = FREE
        negatives = {
            "x": self._slots.position[rows],
            "energy": self._slots.energy[rows],
            "version": self._slots.version[rows],
            "log_weight": self._slots.log_weight[rows],
        }
        return True, self._shown.pop(lease_id, negatives)

    def release(self, lease_id: int) -> int:
        """Free the ready chains of `lease_id` unused (a drop); returns how many."""
        slots = self._ready.pop(lease_id, None)
        self._shown.pop(lease_id, None)
        if slots is None:
            return 0
        self._slots.state[slots] = FREE
        return len(slots)

    def expire(self) -> list[int]:
        """Give the chains of overdue leases back as they were; returns the lease ids."""
        now = self._clock()
        overdue = [k for k, v in self._leases.items() if v.lease.deadline < now]
        for lease_id in overdue:
            self.cancel(lease_id)
            self._counters["expired_leases"] += 1
        return overdue

    def cancel(self, lease_id: int) -> bool:
        """Void a lease: its slots keep the chains they had before it."""
        outstanding = self._leases.pop(lease_id, None)
        if outstanding is None:
            return False
        # The generation moves so that a late checkin of this lease cannot be mistaken
        # for a checkin of the next one on the same slots.
        self._slots.generation[outstanding.lease.slots] += 1
        self._slots.state[outstanding.lease.slots] = FREE
        return True

    def status(self) -> dict[str, Any]:
        """Whether the chains were taken over, the epoch, and the counts."""
        return {"attached": self.attached, "epoch": self.epoch, "counts": self.counts()}

    # --- looking in -------------------------------------------------------------------------

    def counts(self) -> dict[str, int | float]:
        """free, leased, ready, capacity, counters, and the mean age of chains in rounds."""
        states = np.bincount(self._slots.state, minlength=3)
        return {
            "free": int(states[FREE]),
            "leased": int(states[LEASED]),
            "ready": int(states[READY]),
            "capacity": self.capacity,
            "age_mean": float(self._slots.age[self._slots.row_of_slot].mean()),
            **self._counters,
        }

    def identities(self) -> np.ndarray:
        """The identity of each slot's chain, (capacity,) int64.

        Numbered at the start over all shards of a run, and kept for good: through leases,
        checkpoints and other numbers of shards, and where a chain starts afresh, which its age
        tells. So the identities of all shards together are always the same set.
        """
        return self._slots.chain_id[self._slots.row_of_slot]

    def distribution(self) -> dict[str, np.ndarray]:
        """`energy` as recorded when each chain moved last and `age` in rounds, of moved chains."""
        rows = self._slots.row_of_slot
        rows = rows[self._slots.version[rows] >= 0]
        return {"energy": self._slots.energy[rows], "age": self._slots.age[rows]}

    def peek(self, num: int, key: int) -> np.ndarray:
        """Copies of `num` chains of the older half, chosen by `key`; fewer if fewer exist."""
        rng = np.random.default_rng(derive_seed(self._seed, "shard", self.index, "peek", key))
        # A chain's first rounds are its burn-in: what it shows is still where it started.
        age = self._slots.age[self._slots.row_of_slot]
        older = np.flatnonzero((age > 0) & (age >= np.median(age)))
        pool = older if len(older) >= num else np.argsort(-age, kind="stable")[:num]
        slots = rng.choice(pool, size=min(num, len(pool)), replace=False)
        return self._slots.position[self._slots.rows(slots)]

    def health(self, reseed: bool = False) -> dict[str, Any] | None:
        """What the followed chains show, by `ChainTrace.report`; None where nothing is new.

        Args:
            reseed: where the alarm sounds, start its stuck chains afresh with their next lease;
                `num_reseeded` says how many.
        """
        report = self._trace.report(f"shard {self.index}") if self._trace is not None else None
        if report is None:
            return None
        stuck = report.pop("stuck") if reseed and report["alarm"] is not None else []
        self._restart[stuck] = True
        return {**report, "num_reseeded": len(stuck)}

    def weighted(self) -> dict[str, np.ndarray]:
        """Every chain with what its Jarzynski weight is carried on from, by slot."""
        rows = self._slots.row_of_slot
        return {
            "x": self._slots.position[rows],
            "energy": self._slots.energy[rows],
            "log_weight": self._slots.log_weight[rows],
        }

    # --- checkpoint ---------------------------------------------------------------------------

    def snapshot(self, slots: np.ndarray | None = None) -> dict[str, Any]:
        """Every slot at its last committed generation, as arrays by slot, and the cursor.

        Leased chains are there as they were before the lease, ready ones as committed: a
        restore frees them all, and no chain is lost or doubled.

        Args:
            slots: those alone, all when left out.
        """
        which = np.arange(self.capacity) if slots is None else slots
        rows = self._slots.row_of_slot[which]
        arrays = {name: getattr(self._slots, name)[rows] for name in SlotStorage.row_fields}
        return {
            "arrays": {**arrays, "generation": self._slots.generation[which]},
            "meta": {
                "index": self.index,
                "capacity": self.capacity,
                "data": self._data.state() if self._data is not None else None,
            },
        }

    def cut(
        self, number: int, since: int | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The snapshot of cut `number`, as its meta and its arrays.

        Where this process remembers cut `since`, as a whole one, and fewer than half of the slots
        have changed after it, the arrays are of those slots alone, with their numbers as `row`;
        meta's `since` says so. A slot has changed where its generation has: every commit moves it.
        A successor of this process remembers nothing, since a kill may fall between the two.
        """
        generation = np.array(self._slots.generation)
        before = None if since is None else self._whole_cuts.get(since)
        self._whole_cuts = {} if before is None or since is None else {since: before}
        if before is not None:
            changed = np.flatnonzero(generation != before)
            if 2 * len(changed) < self.capacity:
                part = self.snapshot(changed)
                return {**part["meta"], "since": since}, {**part["arrays"], "row": changed}
        self._whole_cuts[number] = generation
        whole = self.snapshot()
        return {**whole["meta"], "since": None}, whole["arrays"]

    def restore(self, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        """Take the chains of a snapshot into the first slots; every slot is free after it.

        Slots beyond them keep the fresh chains they were filled with, under the identities
        from `meta["next_chain"]` on: those of the fill may be among the ones restored.

        Raises:
            ValueError: the snapshot holds more chains than slots, or another event shape.
        """
        num = len(arrays["generation"])
        if num > self.capacity or arrays["position"].shape[1:] != self._spec.shape:
            raise ValueError(
                f"the snapshot's chains have shape {arrays['position'].shape}, this shard holds "
                f"{(self.capacity, *self._spec.shape)}; keep data.source, and buffer.capacity at "
                "least as it was"
            )
        # Killed half-way through, the mixture must not pass for a shard.
        self._slots.begin_init()
        self._slots.epoch[0] += 1
        self._leases.clear()
        self._ready.clear()
        self._shown.clear()
        self._done.clear()
        self._whole_cuts.clear()
        next_chain = int(meta.get("next_chain", arrays["chain_id"].max() + 1))
        rows = self._slots.row_of_slot
        for name in SlotStorage.row_fields:
            getattr(self._slots, name)[rows[:num]] = arrays[name]
        self._slots.chain_id[rows[num:]] = next_chain + np.arange(self.capacity - num)
        self._slots.generation[:num] = arrays["generation"]
        self._slots.state[:] = FREE
        if self._data is not None and meta.get("data") is not None:
            self._data.load_state(meta["data"])
        self._slots.finish_init()


def _few(identities: np.ndarray) -> str:
    return f"{identities[:4].tolist()}{' and so on' if len(identities) > 4 else ''}"
