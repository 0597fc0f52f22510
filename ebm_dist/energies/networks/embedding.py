"""Labels and noise levels as vectors that the blocks of a network read."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseLevels(nn.Module):
    """The noise of each level: level (B,) int64 -> (B,) float32.

    A module of its own, so that a cast of the network to bf16 does not round them: workers and
    learner would then disagree about the noise by up to 0.4%.
    """

    stds: Tensor

    def __init__(self, stds: tuple[float, ...]) -> None:
        super().__init__()
        self._exact = stds
        self.register_buffer("stds", torch.tensor(stds), persistent=False)

    def forward(self, level: Tensor) -> Tensor:
        return self.stds[level]

    def _apply(self, fn, recurse: bool = True):
        moved = super()._apply(fn, recurse)
        self.stds = torch.tensor(self._exact, device=self.stds.device, dtype=torch.float32)
        return moved


class ContextEmbedding(nn.Module):
    """label (B,), noise (B,) -> (B, width): the sum of both embeddings.

    A noise s enters as sines of log(s) / 4 (c_noise in table 1 of EDM, Karras et al. 2022,
    arXiv:2206.00364), through a perceptron of two layers.
    """

    num_frequencies = 32
    lowest, highest = 0.5, 32.0
    """Frequencies of the sines: over noise from .01 to 100 the argument spans 2.3."""

    def __init__(self, width: int, *, num_labels: int | None, levels: bool) -> None:
        super().__init__()
        self.label = None if num_labels is None else nn.Embedding(num_labels, width)
        self.noise = None
        if levels:
            self.noise = nn.Sequential(
                nn.Linear(2 * self.num_frequencies, width), nn.SiLU(), nn.Linear(width, width)
            )

    def forward(self, label: Tensor | None, noise: Tensor | None) -> Tensor:
        parts = []
        if self.label is not None:
            parts.append(self.label(label))
        if self.noise is not None:
            assert noise is not None
            dtype = next(self.noise.parameters()).dtype
            parts.append(self.noise(self._sines(noise).to(dtype)))
        return sum(parts[1:], parts[0])

    def _sines(self, noise: Tensor) -> Tensor:
        """(B,) -> (B, 2 * num_frequencies)."""
        place = torch.arange(self.num_frequencies, device=noise.device) / (self.num_frequencies - 1)
        frequency = self.lowest * (place * math.log(self.highest / self.lowest)).exp()
        angle = 2 * math.pi * (noise.log() / 4)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1)


class Modulation(nn.Module):
    """hidden * (1 + scale) + shift, both linear in the embedding (B, width).

    hidden: images (B, C, H, W), or tokens (B, N, C).
    """

    def __init__(self, width: int, num_channels: int) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.linear = nn.Linear(width, 2 * num_channels)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        both = self.linear(self.act(embedding))
        both = both[:, None, :] if hidden.ndim == 3 else both[:, :, None, None]
        scale, shift = both.chunk(2, 2 if hidden.ndim == 3 else 1)
        return hidden * (1 + scale) + shift


def modulation(width: int | None, num_channels: int) -> Modulation | None:
    """The modulation by an embedding of that width; None for a network without one."""
    return None if width is None else Modulation(width, num_channels)


def modulated(by: Modulation | None, hidden: Tensor, embedding: Tensor | None) -> Tensor:
    """`hidden` modulated by the embedding, where the network has one."""
    return hidden if by is None or embedding is None else by(hidden, embedding)
