"""The chains of one shard, apart from leases: initialisation, inspection, snapshots, restore."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebm_dist.buffer.answers import (
    ChainHealth,
    Distribution,
    Origin,
    ShardCounts,
    ShardStatus,
    WeightedChains,
)
from ebm_dist.buffer.codec import Codec
from ebm_dist.buffer.config import BufferConfig, first_identity
from ebm_dist.buffer.draw import FREE, LEASED, READY
from ebm_dist.buffer.starts import Starts, StartSource, start_log_weight
from ebm_dist.buffer.storage import SlotStorage
from ebm_dist.buffer.trace import ChainTrace, TracePlan
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Arrays, ChainSample, ContextField, EventSpec, ShardMeta, ShardState

_FILL_CHUNK = 4096
CONTEXT = "context/"
"""Begins the names of contexts among the arrays of a snapshot."""

COUNTERS = ("late_checkins", "expired_leases", "reinitialised", "resampled")


class ShardChains:
    """Chains by slot. The subclass `shard.Shard` adds leases."""

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
        directory: Path | str | None = None,
        num_grants: int = 0,
        trace: TracePlan | None = None,
        fields: tuple[ContextField, ...] = (),
    ) -> None:
        self.index = index
        self._config = config
        self._spec = spec
        self._seed = seed
        self._starts = Starts(config, spec, index=index, seed=seed, data=data, fields=fields)
        self._codec = Codec.of(config.storage, spec)
        self._counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self._whole_cuts: dict[int, np.ndarray] = {}  # generations by slot at each full cut
        self._trace = ChainTrace(trace, capacity, spec.shape) if trace is not None else None
        self._restart = np.zeros(capacity, bool)  # slots that restart with their next lease
        self._slots = SlotStorage(
            capacity,
            max_lease,
            spec.shape,
            Path(directory) if directory else None,
            dtype=self._codec.dtype,
            num_grants=num_grants,
            fields=fields,
        )
        if not self._slots.attached:
            self._fill()
            self._slots.finish_init()

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    @property
    def epoch(self) -> int:
        """Counts the restarts of this shard; a lease of an earlier epoch is void."""
        return int(self._slots.epoch[0])

    @property
    def attached(self) -> bool:
        """Whether the chains were found in the mapped files of an earlier process."""
        return self._slots.attached

    def _fill(self) -> None:
        first = first_identity(self._config.capacity, self._config.num_shards, self.index)
        for start in range(0, self.capacity, _FILL_CHUNK):
            slots = np.arange(start, min(start + _FILL_CHUNK, self.capacity))
            x, context = self._starts.draw(len(slots), "fill", start)
            self._slots.position[slots] = self._codec.from_numpy(x)
            for name, value in context.items():
                self._slots.context[name][slots] = value
            if self._config.jarzynski:
                self._slots.log_weight[slots] = start_log_weight(self._config, self._spec, x)
            self._slots.chain_id[slots] = first + slots
            self._slots.version[slots] = -1

    def _positions(self, rows: np.ndarray) -> np.ndarray:
        """Copies of the chains in `rows`, (M, *event) float32."""
        return self._codec.to_numpy(self._slots.positions(rows))

    # --- inspection ---------------------------------------------------------------------------

    def status(self) -> ShardStatus:
        return ShardStatus(self.attached, self.epoch, self.counts())

    def counts(self) -> ShardCounts:
        num = self._slots.num_in
        return ShardCounts(
            free=num[FREE],
            leased=num[LEASED],
            ready=num[READY],
            capacity=self.capacity,
            age_mean=self._slots.total_age / self.capacity,
            **self._counters,
        )

    def identities(self) -> np.ndarray:
        """The identity of each slot's chain, (capacity,) int64.

        Identities are numbered over all shards of a run when it starts, and never change: not by a
        lease, a checkpoint, another number of shards or a restart of the chain (which resets its
        age). So the union of the identities of all shards is always the same set.
        """
        return self._slots.chain_id[self._slots.row_of_slot]

    def distribution(self) -> Distribution:
        """Energies and ages of all chains that have moved.

        Each energy was recorded when its chain last moved, under the weights of that time.
        """
        rows = self._slots.row_of_slot
        rows = rows[self._slots.version[rows] >= 0]
        return Distribution(energy=self._slots.energy[rows], age=self._slots.age[rows])

    def extremes(self, num: int) -> dict[str, np.ndarray]:
        """Copies of the `num` oldest, newest and lowest chains that have moved, or fewer, by the
        name of their picture."""
        rows = self._slots.row_of_slot
        rows = rows[self._slots.version[rows] >= 0]
        age = self._slots.age[rows]
        by = {
            "samples/oldest": -age,
            "samples/newest": age,
            "samples/lowest_energy": self._slots.energy[rows],
        }
        first = {key: np.argsort(value, kind="stable")[:num] for key, value in by.items()}
        return {key: self._positions(rows[index]) for key, index in first.items()}

    def peek(self, num: int, key: int) -> ChainSample:
        """Copies of `num` chains of the older half, drawn at random under `key`; fewer if fewer
        exist."""
        rng = np.random.default_rng(derive_seed(self._seed, "shard", self.index, "peek", key))
        # The first rounds of a chain are its burn-in: it still resembles its start.
        age = self._slots.age[self._slots.row_of_slot]
        older = np.flatnonzero((age > 0) & (age >= np.median(age)))
        pool = older if len(older) >= num else np.argsort(-age, kind="stable")[:num]
        slots = rng.choice(pool, size=min(num, len(pool)), replace=False)
        rows = self._slots.rows(slots)
        return ChainSample(self._positions(rows), self._slots.contexts(rows))

    def health(self, reseed: bool = False) -> ChainHealth | None:
        """Diagnostics of the traced chains (`ChainTrace.report`); None if there is nothing new.

        Args:
            reseed: on an alarm, restart the stuck chains with their next lease.
        """
        report = self._trace.report(f"shard {self.index}") if self._trace is not None else None
        if report is None:
            return None
        num_reseeded = 0
        if reseed and report.alarm is not None:
            self._restart[report.stuck] = True
            num_reseeded = len(report.stuck)
        return ChainHealth(report.values, report.alarm, num_reseeded)

    def weighted(self) -> WeightedChains:
        rows = self._slots.row_of_slot
        return WeightedChains(
            x=self._positions(rows),
            energy=self._slots.energy[rows],
            log_weight=self._slots.log_weight[rows],
        )

    # --- checkpoint ---------------------------------------------------------------------------

    def snapshot(self, slots: np.ndarray | None = None, *, since: int | None = None) -> ShardState:
        """Every slot at its last committed generation, as arrays by slot, and the data cursor.

        Leased chains appear as they were before the lease, ready ones as committed. A restore
        frees all of them, so no chain is lost or duplicated. Positions keep their stored format.

        Args:
            slots: the slots to include; all when left out.
            since: the full cut after which these slots have changed.
        """
        which = np.arange(self.capacity) if slots is None else slots
        rows = self._slots.row_of_slot[which]
        arrays = {name: getattr(self._slots, name)[rows] for name in SlotStorage.row_fields}
        arrays |= {CONTEXT + name: value for name, value in self._slots.contexts(rows).items()}
        return ShardState(
            ShardMeta(self.index, self.capacity, self._starts.state(), since),
            {**arrays, "generation": self._slots.generation[which]},
        )

    def cut(self, number: int, since: int | None = None) -> tuple[ShardMeta, Arrays]:
        """The snapshot of cut `number`, as its meta and its arrays.

        The snapshot is incremental if this process remembers the full cut `since` and fewer than
        half of the slots have changed after it: the arrays then hold the changed slots alone,
        with slot numbers in `row`, and meta's `since` names the full cut. A slot has changed if its
        generation has, since every commit increments it. A new process of this shard remembers no
        cut, because the old one may have been killed between a commit and a cut.
        """
        generation = np.array(self._slots.generation)
        before = None if since is None else self._whole_cuts.get(since)
        self._whole_cuts = {} if before is None or since is None else {since: before}
        if before is not None:
            changed = np.flatnonzero(generation != before)
            if 2 * len(changed) < self.capacity:
                part = self.snapshot(changed, since=since)
                return part.meta, {**part.arrays, "row": changed}
        self._whole_cuts[number] = generation
        whole = self.snapshot()
        return whole.meta, whole.arrays

    def restore(self, arrays: Arrays, origin: Origin) -> None:
        """Load the chains of a snapshot into the first slots; all slots are free afterwards.

        The remaining slots keep their initial chains, renumbered from `origin.next_chain` on,
        since their first identities may be among the restored ones. Positions may be stored in
        another format than today's `buffer.storage`.

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
        missing = [name for name in self._slots.context if CONTEXT + name not in arrays]
        if missing:
            raise ValueError(
                f"the snapshot's chains have no {missing[0]}; leave buffer.context.{missing[0]} out"
            )
        # If this process is killed half-way, no other may attach to a mixture of two states.
        self._slots.begin_init()
        self._slots.epoch[0] = max(self.epoch, origin.epoch) + 1
        self._whole_cuts.clear()
        # A shard may receive no chain at all if the capacity has grown.
        if (next_chain := origin.next_chain) is None:
            next_chain = int(arrays["chain_id"].max()) + 1
        rows = self._slots.row_of_slot
        for name in SlotStorage.row_fields:
            array = arrays[name]
            if name == "position":
                array = self._codec.converted(array)
            getattr(self._slots, name)[rows[:num]] = array
        for name, values in self._slots.context.items():
            values[rows[:num]] = arrays[CONTEXT + name]
        self._slots.chain_id[rows[num:]] = next_chain + np.arange(self.capacity - num)
        self._slots.generation[:num] = arrays["generation"]
        self._slots.free_all()
        self._counters.update(origin.counters)
        if origin.restart is not None:
            self._restart[:] = origin.restart
        self._starts.load_state(origin.data)
        self._slots.finish_init()

    def hand_over(self) -> tuple[Origin, Arrays]:
        """The origin and the arrays for `restore` in a successor on another node.

        Every chain is as last committed. The leases of this process become void, and those of the
        successor have a later epoch.
        """
        whole = self.snapshot()
        self._slots.free_all()
        self._slots.epoch[0] += 1
        origin = Origin(
            data=whole.meta.data,
            epoch=self.epoch,
            counters=dict(self._counters),
            restart=self._restart.copy(),
        )
        return origin, whole.arrays

    def remove_files(self) -> None:
        """Remove the mapped files, after the chains have moved to another node."""
        self._slots.remove_files()
