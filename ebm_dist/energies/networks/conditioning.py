"""What a network energy is conditioned on, and how its network reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.events import per_chain
from ebm_dist.energies.context import CONTEXT
from ebm_dist.energies.family import Energy
from ebm_dist.energies.networks.embedding import ContextEmbedding, NoiseLevels


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a network is built for; the fields of `ConditionedSection`, checked."""

    num_labels: int | None = None
    embeds_labels: bool = False
    noise_stds: tuple[float, ...] | None = None
    condition_shape: tuple[int, ...] | None = None
    embedding_width: int = 128
    data_std: float | None = None
    data_mean: float = 0.0

    @property
    def width(self) -> int | None:
        """Width of the embedding that the blocks read; None for a network without one."""
        return self.embedding_width if self.embeds_labels or self.noise_stds is not None else None


class ContextEnergy(Energy):
    """An energy whose network reads labels, noise levels and conditions."""

    def __init__(self, event_shape: tuple[int, ...], by: Conditioning) -> None:
        super().__init__(event_shape)
        self.num_labels = by.num_labels
        self.noise_stds = by.noise_stds
        self.condition_shape = by.condition_shape
        has = {
            "label": by.num_labels is not None,
            "level": by.noise_stds is not None,
            "condition": by.condition_shape is not None,
        }
        self.context = frozenset(name for name in CONTEXT if has[name])
        # Logits without a label give the marginal over the classes.
        self.needs_context = self.context - (set() if by.embeds_labels else {"label"})
        self.data_std, self.data_mean = by.data_std, by.data_mean
        if by.width is not None:
            self.embedding = ContextEmbedding(
                by.width,
                num_labels=by.num_labels if by.embeds_labels else None,
                levels=by.noise_stds is not None,
            )
        if by.noise_stds is not None:
            self.levels = NoiseLevels(by.noise_stds)

    def noise(self, level: Tensor | None, x: Tensor) -> Tensor | None:
        """The noise (B, 1, ...) of each event's level, float32 at least; None without levels."""
        if self.noise_stds is None or level is None:
            return None
        std = self.levels(level).to(torch.promote_types(x.dtype, torch.float32))
        return per_chain(std, x)

    def embedded(self, label: Tensor | None, noise: Tensor | None) -> tuple[Tensor, ...]:
        """The embedding (B, width) as the second argument of the body, or none."""
        if not hasattr(self, "embedding"):
            return ()
        return (self.embedding(label, None if noise is None else noise.flatten()),)

    def network_input(
        self, x: Tensor, noise: Tensor | None, condition: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """What the body reads: x in units of about 1, and the condition as further channels."""
        if self.data_std is not None:
            x = (x - self.data_mean) / total_std(self.data_std, noise)
        if condition is None:
            return x.to(dtype)
        if condition.shape[2:] != x.shape[2:]:  # a perceptron reads numbers without a shape
            x, condition = x.flatten(1), condition.flatten(1)
        return torch.cat([x.to(dtype), condition.to(dtype)], 1)


def total_std(data_std: float, noise: Tensor | None) -> Any:
    """sqrt(data_std^2 + noise^2), the scale of noisy data."""
    return data_std if noise is None else (data_std**2 + noise.square()).sqrt()
