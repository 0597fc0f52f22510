"""Free slots drawn at random, in time that goes with the lease and not with the shard."""

from __future__ import annotations

import numpy as np

FREE, LEASED, READY = np.uint8(0), np.uint8(1), np.uint8(2)


def draw_free(state: np.ndarray, num_free: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """`num` slots whose `state` is FREE, without replacement, each set of them equally likely.

    Depends on `state` and `rng` alone: a list of the free slots, kept up to date, would come out
    in the order of the leases before, and a resumed run would draw others than the one it resumes.

    Args:
        num_free: how many are, at least `num`.
    """
    capacity = len(state)
    if num_free * 8 < capacity or num * 2 > num_free:
        free = np.flatnonzero(state == FREE)
        return free[rng.choice(len(free), size=num, replace=False, shuffle=False)]
    # Slots at random, without those that are taken or came before: what remains is uniform.
    slots = np.empty(0, np.int64)
    while len(slots) < num:
        more = rng.integers(capacity, size=num + num // 4 + 8)
        slots = np.concatenate([slots, more[state[more] == FREE]])
        order = slots.argsort(kind="stable")
        ordered = slots[order]
        first = np.concatenate([order[:1], order[1:][ordered[1:] != ordered[:-1]]])
        first.sort()
        slots = slots[first]
    return slots[:num]
