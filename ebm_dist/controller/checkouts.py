"""How a round gets its lease: by rows where its worker is on the shard's node, else by value."""

from __future__ import annotations

from collections.abc import Sequence

from ebm_dist.cluster.backend import Backend, Handle, Ref
from ebm_dist.controller.rounds.round import Round
from ebm_dist.controller.workers.load import Seat


class Checkouts:
    """Asks shards for leases. Of each, the same may be asked for again, for another worker: what
    the one before had by rows is void then."""

    def __init__(self, backend: Backend, shards: Sequence[Handle], num_chains: int) -> None:
        self._shards = shards
        self._num_chains = num_chains
        self._one_machine = not backend.scattered

    def beside(self, shard: Handle, seat: Seat) -> bool:
        """Whether the worker can read and write what the shard has mapped."""
        node = getattr(shard, "node", None)
        return self._one_machine or (node is not None and node == seat.node)

    def draw(self, leases: Sequence[tuple[int, int]]) -> dict[int, Ref]:
        """Have each shard draw its leases of (lease id, shard) in one call, and so in this order.

        Returns:
            For each lease id what `lease` needs to know of it.
        """
        drawn: dict[int, Ref] = {}
        for index, shard in enumerate(self._shards):
            ids = [lease_id for lease_id, at in leases if at == index]
            if not ids:
                continue
            if not self._one_machine:
                # Who takes them is not known yet, nor then how they go to him.
                drawn |= dict.fromkeys(ids, shard.call("draw", ids, self._num_chains))
            elif len(ids) == 1:
                drawn[ids[0]] = shard.call("checkout", ids[0], self._num_chains, True)
            else:
                refs = shard.call(
                    "checkout_many", ids, self._num_chains, True, num_returns=len(ids)
                )
                drawn |= zip(ids, refs)
        return drawn

    def lease(self, round_: Round, seat: Seat) -> Ref:
        """The lease of `round_`, for the worker of `seat`; what was drawn ahead is used up."""
        shard = self._shards[round_.shard]
        drawn, round_.lease = round_.lease, None
        by_rows = self.beside(shard, seat)
        if round_.ready_id is not None:
            return shard.call("checkout_ready", round_.lease_id, round_.ready_id, by_rows)
        if drawn is None:
            return shard.call("checkout", round_.lease_id, self._num_chains, by_rows)
        if self._one_machine:
            return drawn
        # A shard runs its calls in any order; one that is given the answer of another comes after.
        return shard.call("checkout", round_.lease_id, self._num_chains, by_rows, drawn)
