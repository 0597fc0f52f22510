"""Random generators that use every bit of their seed.

torch's CPU generator is a Mersenne Twister, and `manual_seed` reads only the low 32 bits of a seed:
among 77,000 leases, two would share their noise with probability 1/2. So its 19,937 bits of state
are filled here from the whole seed. On a GPU, torch's Philox uses all 64 bits.
"""

from __future__ import annotations

import numpy as np
import torch

# torch keeps the state as one block of bytes, in units of 64 bits: the seed; the number of words
# left, with a flag for seeded; the index of the next word; and then the 624 words.
_FIRST_WORD, _NUM_WORDS = 3, 624


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` with `seed`, the 63 bits that `derive_seed` returns."""
    generator = torch.Generator(device).manual_seed(seed)
    if generator.device.type != "cpu":
        return generator
    state = generator.get_state()
    words = np.random.SeedSequence(seed).generate_state(_NUM_WORDS, np.uint32)
    inside = state.view(torch.int64)[_FIRST_WORD : _FIRST_WORD + _NUM_WORDS]
    inside.copy_(torch.from_numpy(words.astype(np.int64)))
    generator.set_state(state)
    return generator
