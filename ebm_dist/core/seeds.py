"""Seeds by name: every stream of noise in a run has one, and no two share it.

`generators.seeded` makes a generator of one; torch's `manual_seed` would read half of it on a CPU.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for the stream that `path` names, e.g. `(0, "shard", 3, "lease", 17)`.

    A hash, not `seed + rank`: neighbouring seeds of one stream would be another
    stream's, and one seed on every rank gives N devices the diversity of one.
    """
    text = "/".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
