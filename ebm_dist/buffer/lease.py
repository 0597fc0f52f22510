"""The shard's record of a lease, and the checks of a checkin against it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ebm_dist.buffer.rows import same
from ebm_dist.core.types import Arrays, MovedChains, RowGrant


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
