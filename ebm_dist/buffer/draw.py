"""Free slots drawn at random, in time that goes with the lease and not with the shard."""

from __future__ import annotations

from typing import Any

import numpy as np

FREE, LEASED, READY = 0, 1, 2

_ZEROS = (0, 0, 0, 0)


class KeyedGenerator:
    """One generator for many keys, each time as `Generator(Philox(key=key))` begins.

    Philox takes its key as it is; others spread a seed first, for longer than the draw. A Philox
    made anew asks the system for entropy, which its key then takes the place of: for longer still.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)

    def __call__(self, key: int) -> np.random.Generator:
        """The generator of `key`, below 2^64, which the one of the key before has become."""
        # Plain numbers, which numpy takes at once and its stubs not at all.
        state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": _ZEROS, "key": (key, 0)},
            "buffer": _ZEROS,
            "buffer_pos": 4,  # at its end: nothing is left of the key before
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._philox.state = state
        return self._generator


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
        more = more[state[more] == FREE]
        slots = np.concatenate([slots, more]) if len(slots) else more
        # That one comes twice is rare in a large shard, and soon ruled out.
        ordered = np.sort(slots[:num])
        if len(ordered) == num and np.count_nonzero(ordered[1:] == ordered[:-1]) == 0:
            break
        # Each with its place in the low bits: numpy sorts whole numbers several times as fast as
        # it finds the order that sorts them.
        bits = len(slots).bit_length()
        placed = np.sort(slots << bits | np.arange(len(slots)))
        ordered = placed >> bits
        first = np.concatenate([placed[:1], placed[1:][ordered[1:] != ordered[:-1]]])
        slots = slots[np.sort(first & (1 << bits) - 1)]
    return slots[:num]
