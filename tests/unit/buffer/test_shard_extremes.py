"""The oldest, newest and lowest chains of a shard, for the pictures of a run."""

from __future__ import annotations

import numpy as np
from shards import make_shard, move


def test_extremes_are_of_moved_chains_by_age_and_energy() -> None:
    shard = make_shard(capacity=12, max_lease=4)
    assert all(len(chains) == 0 for chains in shard.extremes(4).values()), "none has moved"
    for lease_id in range(5):
        lease = shard.checkout(lease_id, 4)
        assert lease is not None
        shard.checkin(move(lease), lease_id)
        shard.release(lease_id)
    distribution = shard.distribution()
    # Of a chain that `move` has moved, the energy is the sum of its position.
    ages = {round(float(e), 3): int(a) for e, a in zip(distribution.energy, distribution.age)}
    assert len(set(ages.values())) > 1
    found = shard.extremes(3)
    assert set(found) == {"samples/oldest", "samples/newest", "samples/lowest_energy"}
    assert all(chains.shape == (3, 3) for chains in found.values())
    energy = {name.removeprefix("samples/"): chains.sum(1) for name, chains in found.items()}
    np.testing.assert_allclose(energy["lowest_energy"], np.sort(distribution.energy)[:3], rtol=1e-5)
    in_order = sorted(ages.values())
    assert [ages[round(float(e), 3)] for e in energy["newest"]] == in_order[:3]
    assert [ages[round(float(e), 3)] for e in energy["oldest"]] == in_order[::-1][:3]
    assert all(len(chains) == len(ages) for chains in shard.extremes(100).values())
