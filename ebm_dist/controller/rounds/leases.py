"""Gets the lease of a round: by rows if the worker is on the shard's node, else by value."""

from __future__ import annotations

from collections.abc import Sequence

from ebm_dist.cluster.backend import Backend, Ref
from ebm_dist.controller.clients import ShardClient
from ebm_dist.controller.rounds.round import Drawn, Round
from ebm_dist.controller.shards import Shards
from ebm_dist.controller.workers.load import Member
from ebm_dist.core.types import Lease


class LeaseSource:
    """Asks the shards for leases.

    A lease may be requested again for another worker; the rows granted to the first are then void.
    """

    def __init__(self, backend: Backend, shards: Shards, num_chains: int) -> None:
        self._shards = shards
        self._num_chains = num_chains
        self._one_machine = not backend.scattered

    def draw(self, leases: Sequence[tuple[int, int]]) -> dict[int, Drawn]:
        """Draw the leases (lease id, shard), those of a shard in one call and in this order.

        Returns:
            By lease id, what `Round.drawn` is to be.
        """
        drawn: dict[int, Drawn] = {}
        for index, shard in enumerate(self._shards):
            ids = [lease_id for lease_id, at in leases if at == index]
            if not ids:
                continue
            if not self._one_machine:
                # By rows or by value is decided later, when the worker is known.
                drawn |= dict.fromkeys(ids, Drawn(after=shard.draw(ids, self._num_chains)))
            else:
                leases_of_shard = shard.checkout_many(ids, self._num_chains, True)
                drawn |= {i: Drawn(lease=ref) for i, ref in zip(ids, leases_of_shard)}
        return drawn

    def lease(self, round_: Round, member: Member) -> Ref[Lease | None]:
        """The lease of `round_` for the worker of `member`. Uses `round_.drawn` up."""
        shard = self._shards[round_.shard]
        drawn, round_.drawn = round_.drawn, Drawn()
        by_rows = self._shares_memory(shard, member)
        if round_.ready_id is not None:
            return shard.checkout_ready(round_.lease_id, round_.ready_id, by_rows)
        if drawn.lease is not None:
            return drawn.lease
        # A shard runs its calls in any order; the argument `drawn.after` makes it draw first.
        return shard.checkout(round_.lease_id, self._num_chains, by_rows, drawn.after)

    def _shares_memory(self, shard: ShardClient, member: Member) -> bool:
        """Whether the worker can map the files of the shard."""
        return self._one_machine or (shard.node is not None and shard.node == member.node)
