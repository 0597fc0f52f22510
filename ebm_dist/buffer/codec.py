"""What the numbers of a stored chain are kept as: float32, or fewer bits rounded at random.

Chains move in float32; what is rounded is where a round leaves them. To the nearest stored number
would be wrong: with a quantum of 2/255 a chain that moves by less than .004 in a round would not
move at all. So a number goes to one of its two neighbours at random, by how near they are: its
mean is kept, and a stored number that has not moved stays where it is, to the bit.

What is left is noise, once a round: of a quantum q, a variance of q^2/6 on average (uint8: 1.0e-5,
a standard deviation of .0032; bfloat16 near 1: 2.5e-6, .0016). A round of K Langevin steps of
noise s adds K s^2 of its own: 4e-3 for K = 40, s = .01, beside which it is nothing, but 2.5e-5
for K = 1, s = .005, which it makes 1.4 times as much. Count it as temperature.
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
"""Of a quantum, to which a uint8 is told from its neighbours: 2^-13 of one is the largest bias,
and the rounding of float32 is a thirtieth of the step, so that a stored number is a fixed point."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Stored numbers of one kind for events of one kind."""

    name: StorageName
    discrete: bool

    @classmethod
    def of(cls, name: StorageName, spec: EventSpec) -> Codec:
        """
        Raises:
            ValueError: events without bounds, of which a stored number could not hold them all.
        """
        if name != "float32" and spec.kind == "real":
            raise ValueError(
                f"buffer.storage: {name} holds numbers of [-1, 1], and real events have no bounds; "
                "set buffer.storage: float32"
            )
        return cls(name, spec.discrete)

    @property
    def dtype(self) -> np.dtype:
        """Of the stored array; the bits of a bfloat16 as uint16, which numpy has no name for."""
        return _STORED[self.name]

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x (M, *event) float32 as it is stored, on the device of x.

        Args:
            generator: rounds at random; without it to the nearest, for what is not a move.
        """
        if self.name == "float32":
            return x
        if self.name == "bfloat16":
            bits = x.contiguous().view(torch.int32)
            # Adding sixteen random bits to those that are cut off carries as often as it should.
            low = 0x7FFF if generator is None else _random_bits(x, generator) & 0xFFFF
            return ((bits + low) >> 16).to(torch.int16).view(torch.uint16)
        if self.discrete:
            return x.round().to(torch.uint8)
        steps = x.clamp(-1, 1).add(1).mul_(127.5 * (1 << _FRACTION_BITS)).round_().to(torch.int32)
        mask = (1 << _FRACTION_BITS) - 1
        low = (mask + 1) // 2 if generator is None else _random_bits(x, generator) & mask
        return steps.add_(low).bitwise_right_shift_(_FRACTION_BITS).to(torch.uint8)

    def decode(self, stored: Tensor) -> Tensor:
        """Stored numbers as float32; the same tensor where they are."""
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
        """Numbers that another run stored, of whichever kind, as this one stores them."""
        if stored.dtype == self.dtype:
            return stored
        other = Codec(_NAMES[stored.dtype], self.discrete)  # type: ignore[arg-type]
        return self.from_numpy(other.to_numpy(stored))


def as_float32(stored: np.ndarray, spec: EventSpec) -> np.ndarray:
    """Positions of a checkpoint, of whichever kind they were stored as."""
    return Codec(_NAMES[stored.dtype], spec.discrete).to_numpy(stored)  # type: ignore[arg-type]


def _random_bits(like: Tensor, generator: torch.Generator) -> Tensor:
    """Sixteen random bits for each number of `like`, as int32."""
    num = like.numel()
    # Four numbers to a draw: the draws are what this costs.
    words = torch.empty(-(-num // 4), dtype=torch.int64, device=like.device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:num].view(like.shape).to(torch.int32)
