"""How a round gets its lease: by rows where its worker is on the shard's node, else by value."""

from __future__ import annotations

from collections.abc import Sequence

from ebm_dist.cluster.backend import Backend, Ref
from ebm_dist.controller.clients import ShardClient
from ebm_dist.controller.rounds.round import Drawn, Round
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.load import Member
from ebm_dist.core.types import Lease


class Checkouts:
    """Asks shards for leases. Of each, the same may be asked for again, for another worker: what
    the one before had by rows is void then."""

    def __init__(self, backend: Backend, shards: Shards, num_chains: int) -> None:
        self._shards = shards
        self._num_chains = num_chains
        self._one_machine = not backend.scattered

    def beside(self, shard: ShardClient, member: Member) -> bool:
        """Whether the worker can read and write what the shard has mapped."""
        return self._one_machine or (shard.node is not None and shard.node == member.node)

    def draw(self, leases: Sequence[tuple[int, int]]) -> dict[int, Drawn]:
        """Have each shard draw its leases of (lease id, shard) in one call, and so in this order.

        Returns:
            For each lease id what `lease` needs to know of it.
        """
        drawn: dict[int, Drawn] = {}
        for index, shard in enumerate(self._shards):
            ids = [lease_id for lease_id, at in leases if at == index]
            if not ids:
                continue
            if not self._one_machine:
                # Who takes them is not known yet, nor then how they go to him.
                drawn |= dict.fromkeys(ids, Drawn(after=shard.draw(ids, self._num_chains)))
            else:
                leases_of_shard = shard.checkout_many(ids, self._num_chains, True)
                drawn |= {i: Drawn(lease=ref) for i, ref in zip(ids, leases_of_shard)}
        return drawn

    def lease(self, round_: Round, member: Member) -> Ref[Lease | None]:
        """The lease of `round_`, for the worker of `member`; what was drawn ahead is used up."""
        shard = self._shards[round_.shard]
        drawn, round_.drawn = round_.drawn, Drawn()
        by_rows = self.beside(shard, member)
        if round_.ready_id is not None:
            return shard.checkout_ready(round_.lease_id, round_.ready_id, by_rows)
        if drawn.lease is not None:
            return drawn.lease
        # A shard runs its calls in any order; one that is given the answer of another comes after.
        return shard.checkout(round_.lease_id, self._num_chains, by_rows, drawn.after)
