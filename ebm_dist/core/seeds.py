"""Seeds derived from names: every stream of noise in a run has its own.

Use `generators.seeded` to make a generator; torch's `manual_seed` reads half of the seed on a CPU.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for the stream that `path` names, e.g. `(0, "shard", 3, "lease", 17)`.

    It is a hash and not `seed + rank`, which would give streams of neighbouring run seeds the same
    seed. One seed for all ranks would give N devices the diversity of one.
    """
    text = "/".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
