"""Generators of noise that every bit of a seed decides.

torch's own on the CPU is a Mersenne Twister, and `manual_seed` gives it the low 32 bits: of 77,000
leases two would draw the same numbers at even odds. Its state takes 19,937 bits, which are spread
from the whole seed here. On a GPU torch's Philox takes 64 bits as they are.
"""

from __future__ import annotations

import numpy as np
import torch

# torch keeps the state as one block of bytes: the seed as given, how many of the words are left
# and whether it was seeded, which one is next, and then the 624 words, each in 64 bits.
_FIRST_WORD, _NUM_WORDS = 3, 624


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` whose numbers `seed`, 63 bits from `derive_seed`, decides."""
    generator = torch.Generator(device).manual_seed(seed)
    if generator.device.type != "cpu":
        return generator
    state = generator.get_state()
    words = np.random.SeedSequence(seed).generate_state(_NUM_WORDS, np.uint32)
    inside = state.view(torch.int64)[_FIRST_WORD : _FIRST_WORD + _NUM_WORDS]
    inside.copy_(torch.from_numpy(words.astype(np.int64)))
    generator.set_state(state)
    return generator
