"""Draws free slots at random, in time proportional to the lease and not to the shard."""

from __future__ import annotations

from typing import Any

import numpy as np

FREE, LEASED, READY = 0, 1, 2

_ZEROS = (0, 0, 0, 0)


class KeyedGenerator:
    """One generator object for many keys; for each it gives what `Generator(Philox(key=key))` does.

    Philox uses its key unchanged; other generators hash their seed first, which takes longer than
    the draw. Constructing a Philox is slower still: it reads system entropy, only to replace it by
    the key. So the state of one object is overwritten.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)

    def __call__(self, key: int) -> np.random.Generator:
        """The generator of `key` (below 2^64). It is the same object at every call."""
        # numpy reads plain Python numbers fastest; its type stubs do not accept them.
        state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": _ZEROS, "key": (key, 0)},
            "buffer": _ZEROS,
            "buffer_pos": 4,  # the end: no buffered number of the previous key remains
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._philox.state = state
        return self._generator


def draw_free(state: np.ndarray, num_free: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """`num` slots whose `state` is FREE, without replacement; all subsets are equally likely.

    The result depends on `state` and `rng` alone. A list of free slots, updated by each lease,
    would depend on the order of past leases, and a resumed run would then draw other slots than an
    uninterrupted one.

    Args:
        num_free: the number of FREE slots, at least `num`.
    """
    capacity = len(state)
    if num_free * 8 < capacity or num * 2 > num_free:
        free = np.flatnonzero(state == FREE)
        return free[rng.choice(len(free), size=num, replace=False, shuffle=False)]
    # Rejection sampling: uniform slots, less the occupied and the repeated ones, stay uniform.
    slots = np.empty(0, np.int64)
    while len(slots) < num:
        more = rng.integers(capacity, size=num + num // 4 + 8)
        more = more[state[more] == FREE]
        slots = np.concatenate([slots, more]) if len(slots) else more
        # Repeats are rare in a large shard, and this check for them is cheap.
        ordered = np.sort(slots[:num])
        if len(ordered) == num and np.count_nonzero(ordered[1:] == ordered[:-1]) == 0:
            break
        # The low bits hold each slot's index: numpy's sort of integers is several times as fast
        # as argsort.
        bits = len(slots).bit_length()
        placed = np.sort(slots << bits | np.arange(len(slots)))
        ordered = placed >> bits
        first = np.concatenate([placed[:1], placed[1:][ordered[1:] != ordered[:-1]]])
        slots = slots[np.sort(first & (1 << bits) - 1)]
    return slots[:num]
