"""Number formats of stored chains: float32, or fewer bits by stochastic rounding.

Chains move in float32; their positions are rounded at the end of a round. Rounding to nearest would
be wrong: with a quantum of 2/255, a chain that moves by less than .004 in a round would not move at
all. Stochastic rounding picks one of the two neighbours with a probability that keeps the mean, and
a stored number that has not moved keeps its bits.

It adds noise once per round, of variance q^2/6 on average for a quantum q (uint8: 1.0e-5, a
standard deviation of .0032; bfloat16 near 1: 2.5e-6, .0016). K Langevin steps of noise_std s add
K s^2 themselves: 4e-3 for K = 40, s = .01, where rounding is negligible, but 2.5e-5 for K = 1,
s = .005, where rounding makes the variance 1.4 times as large. Count it as temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ebm_dist.core.types import EventSpec

StorageName = Literal["float32", "bfloat16", "uint8"]

_STORED = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "uint8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _STORED.items()}

_FRACTION_BITS = 12
"""Resolution of stochastic rounding to uint8: a quantum has 2^12 fractions. The largest bias is
2^-13 of a quantum. The error of float32 is a thirtieth of a fraction, so a stored number is a fixed
point."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Converts between float32 and one storage format, for continuous or discrete events."""

    name: StorageName
    discrete: bool

    @classmethod
    def of(cls, name: StorageName, spec: EventSpec) -> Codec:
        """
        Raises:
            ValueError: the events are unbounded, and the format holds [-1, 1] only.
        """
        if name != "float32" and spec.kind == "real":
            raise ValueError(
                f"buffer.storage: {name} holds numbers of [-1, 1], and real events have no bounds; "
                "set buffer.storage: float32"
            )
        return cls(name, spec.discrete)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the stored array; uint16 holds the bits of bfloat16, which numpy lacks."""
        return _STORED[self.name]

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x (M, *event) float32 in the storage format, on the device of x.

        Args:
            generator: for stochastic rounding; None rounds to nearest, for chains that did not
                move.
        """
        if self.name == "float32":
            return x
        if self.name == "bfloat16":
            bits = x.contiguous().view(torch.int32)
            # Adding 16 random bits to the truncated ones carries with the right probability.
            low = 0x7FFF if generator is None else _random_bits(x, generator) & 0xFFFF
            return ((bits + low) >> 16).to(torch.int16).view(torch.uint16)
        if self.discrete:
            return x.round().to(torch.uint8)
        steps = x.clamp(-1, 1).add(1).mul_(127.5 * (1 << _FRACTION_BITS)).round_().to(torch.int32)
        mask = (1 << _FRACTION_BITS) - 1
        low = (mask + 1) // 2 if generator is None else _random_bits(x, generator) & mask
        return steps.add_(low).bitwise_right_shift_(_FRACTION_BITS).to(torch.uint8)

    def decode(self, stored: Tensor) -> Tensor:
        """Stored numbers as float32; the same tensor if they are float32 already."""
        if self.name == "float32":
            return stored
        if self.name == "bfloat16":
            return stored.view(torch.bfloat16).float()
        return stored.float() if self.discrete else stored.float().div_(127.5).sub_(1)

    def to_numpy(self, stored: np.ndarray) -> np.ndarray:
        """`decode` of an array."""
        return stored if self.name == "float32" else self.decode(torch.from_numpy(stored)).numpy()

    def from_numpy(self, x: np.ndarray) -> np.ndarray:
        """`encode` of a float32 array to the nearest."""
        return x if self.name == "float32" else self.encode(torch.from_numpy(x)).numpy()

    def converted(self, stored: np.ndarray) -> np.ndarray:
        """Positions stored by another run, in any format, in the format of this codec."""
        if stored.dtype == self.dtype:
            return stored
        other = Codec(_NAMES[stored.dtype], self.discrete)  # type: ignore[arg-type]
        return self.from_numpy(other.to_numpy(stored))


def as_float32(stored: np.ndarray, spec: EventSpec) -> np.ndarray:
    """Positions of a checkpoint, stored in any format, as float32."""
    return Codec(_NAMES[stored.dtype], spec.discrete).to_numpy(stored)  # type: ignore[arg-type]


def _random_bits(like: Tensor, generator: torch.Generator) -> Tensor:
    """Sixteen random bits for each number of `like`, as int32."""
    num = like.numel()
    # Each 64-bit draw serves four numbers, since the draws dominate the cost.
    words = torch.empty(-(-num // 4), dtype=torch.int64, device=like.device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:num].view(like.shape).to(torch.int32)
