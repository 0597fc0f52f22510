"""The shard's record of a lease: what a worker is told, and what a checkin is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ebm_dist.buffer.grants import GrantBook
from ebm_dist.buffer.rows import same
from ebm_dist.buffer.storage import SlotStorage
from ebm_dist.core.types import Arrays, Lease, MovedChains, RowGrant


@dataclass(slots=True)
class Outstanding:
    """A lease that is neither committed nor expired."""

    slots: np.ndarray
    rows: np.ndarray  # of the chains at checkout; the rows of a leased slot do not change
    generations: np.ndarray
    chain_id: np.ndarray
    fresh: np.ndarray  # (M,) bool: the chain restarts with this lease
    starts: np.ndarray | None  # the starts of those chains, in storage format
    context: Arrays  # the contexts of those chains
    deadline: float = math.inf  # set when the lease is given out
    grant: RowGrant | None = None

    def lease(
        self,
        storage: SlotStorage,
        grants: GrantBook | None,
        *,
        lease_id: int,
        shard: int,
        shard_epoch: int,
        seed: int,
    ) -> Lease:
        """The lease for a worker; by rows if `grants` is given and has rows to spare."""
        rows = self.rows
        log_weight, version = storage.log_weight[rows], storage.version[rows]
        energy = storage.energy[rows]
        position = None
        if grants is not None:
            # A copy if some entries change below: restarted chains are read from other rows.
            self.grant = grants.issue(rows if self.starts is None else rows.copy())
        if self.grant is None:
            position = storage.positions(rows)
        if self.starts is not None:
            log_weight[self.fresh] = 0.0
            version[self.fresh] = -1
            if position is not None:
                position[self.fresh] = self.starts
            elif self.grant is not None:
                # The worker reads restarted chains from the rows granted for writing.
                target = self.grant.target[self.fresh]
                storage.position[target] = self.starts
                storage.chain_id[target] = self.chain_id[self.fresh]
                self.grant.source[self.fresh] = target
        return Lease(
            lease_id=lease_id,
            shard=shard,
            shard_epoch=shard_epoch,
            slots=self.slots,
            generations=self.generations,
            chain_id=self.chain_id,
            seed=seed,
            deadline=self.deadline,
            position=position,
            log_weight=log_weight,
            version=version,
            energy=energy,
            grant=self.grant,
            context=self._leased_context(storage) if storage.context else {},
        )

    def _leased_context(self, storage: SlotStorage) -> Arrays:
        """What a worker is told beside positions; a condition may lie in the granted rows."""
        names = storage.context.keys() - {"pair"}
        if self.grant is not None and "condition" in names:
            names -= {"condition"}
            if self.starts is not None:
                target = self.grant.target[self.fresh]
                storage.context["condition"][target] = self.context["condition"]
        return {name: self._context_before(storage, name) for name in sorted(names)}

    def _context_before(self, storage: SlotStorage, name: str) -> np.ndarray:
        values = storage.context[name][self.rows]
        if self.starts is not None:
            values[self.fresh] = self.context[name]
        return values

    def context_after(self, storage: SlotStorage, name: str, moved: MovedChains) -> np.ndarray:
        """The context `name` (M, ...) of the moved chains."""
        if name == "level" and moved.level is not None:
            return moved.level
        values = self._context_before(storage, name)
        return values + moved.num_steps if name == "clock" else values

    def ages(self, storage: SlotStorage, ancestors: np.ndarray | None) -> tuple[np.ndarray, int]:
        """The ages (M,) of the moved chains, and the change of their sum.

        Args:
            ancestors: `MovedChains.ancestors`.
        """
        before = storage.age[self.rows]
        if self.starts is None and ancestors is None:
            return before + 1, len(before)
        age = np.where(self.fresh, 0, before)
        if ancestors is not None:
            age = age[ancestors]
        return age + 1, int(age.sum() - before.sum()) + len(age)

    def matches(self, moved: MovedChains) -> bool:
        # A generation changes when its lease ends, so those of an open lease are unchanged.
        return same(moved.slots, self.slots) and same(moved.generations, self.generations)

    def check(self, moved: MovedChains, event_shape: tuple[int, ...], dtype: np.dtype) -> None:
        """
        Raises:
            ValueError: another number of chains, other chains or another event shape.
        """
        if not same(moved.chain_id, self.chain_id):
            raise ValueError(
                f"lease {moved.lease_id} came back with chains {few(moved.chain_id)}, "
                f"{few(self.chain_id)} went out: a worker must keep their order"
            )
        expected = (len(moved.slots), *event_shape)
        if moved.position is not None and (
            moved.position.shape != expected or moved.position.dtype != dtype
        ):
            raise ValueError(
                f"lease {moved.lease_id} came back as chains of shape {moved.position.shape} "
                f"({moved.position.dtype}), {expected} ({dtype}) went out; the event "
                "shape comes from data.source, the type from buffer.storage"
            )


def few(identities: np.ndarray) -> str:
    return f"{identities[:4].tolist()}{' and so on' if len(identities) > 4 else ''}"
