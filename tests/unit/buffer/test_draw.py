"""The draw of a lease: what its shortcuts give is, to the bit, what the plain rule gives."""

from __future__ import annotations

import numpy as np
import pytest

from ebm_dist.buffer.draw import KeyedGenerator, draw_free


def philox(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def plainly(state: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Slots at random, each taken where it is free and comes for the first time."""
    slots: dict[int, None] = {}
    while len(slots) < num:
        more = rng.integers(len(state), size=num + num // 4 + 8)
        slots |= dict.fromkeys(more[state[more] == 0].tolist())
    return np.array(list(slots)[:num])


@pytest.mark.parametrize("taken", [0.0, 0.3, 0.8])
@pytest.mark.parametrize(("capacity", "num"), [(100, 1), (100, 8), (1000, 64), (100_000, 64)])
def test_slots_are_those_of_the_plain_rule_and_so_is_what_is_drawn_next(capacity, num, taken):
    state = (np.random.default_rng(0).random(capacity) < taken).astype(np.uint8)
    for key in range(50):
        quick, plain = philox(key), philox(key)
        slots = draw_free(state, int((state == 0).sum()), num, quick)
        assert slots.tolist() == plainly(state, num, plain).tolist()
        assert quick.random() == plain.random()


def test_a_generator_with_another_key_is_a_new_one_of_that_key():
    keyed = KeyedGenerator()
    for key in (0, 1, 2**63 - 1, 1):
        # An odd number of halves of a word: one is left over for the next draw.
        drawn, expected = keyed(key), philox(key)
        assert np.array_equal(drawn.integers(1024, size=7), expected.integers(1024, size=7))
        assert np.array_equal(drawn.random(5), expected.random(5))
