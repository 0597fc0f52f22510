"""Energies E(x, level) for kernels that move a chain from one noise level to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.events import per_chain
from ebm_dist.core.types import EnergyFn
from ebm_dist.energies.context import Given
from ebm_dist.energies.context import trait as context_trait
from ebm_dist.samplers.frozen import Autocast
from ebm_dist.samplers.kernel import Kernel
from ebm_dist.samplers.traits import trait as kernel_trait


def level_of(energy: EnergyFn) -> Tensor | None:
    """The level (B,) that `energy` has been given; None for an energy without levels."""
    bound = _bound(energy)
    return bound.tensors.get("level") if isinstance(bound, Given) else None


def stds_of(energy: EnergyFn) -> tuple[float, ...]:
    """The noise of each level; of one level for an energy without."""
    bound = _bound(energy)
    if level_of(energy) is None:
        return (1.0,)
    assert isinstance(bound, Given)
    return context_trait(bound.energy, "noise_stds")


def at_level(energy: EnergyFn, level: Tensor, unit: Tensor | None = None) -> EnergyFn:
    """u -> E(unit u, level), for chains at other levels than those that `energy` was given.

    Args:
        unit: (B,), the length in units of which each chain moves; 1 where left out.
    """
    if level_of(energy) is None:
        return energy
    if isinstance(energy, Autocast):
        return Autocast(at_level(energy.energy, level, unit))
    bound = _bound(energy)
    assert isinstance(bound, Given)
    call: Callable[..., Tensor] = bound.energy
    others = {**bound.tensors, "level": level}
    if unit is None:
        return lambda x: call(x, **others)
    return lambda u: call(per_chain(unit, u) * u, **others)


def highest_level(kernel: Kernel[Any], energy: object) -> int | None:
    """The level at which chains of a kernel that descends begin; None for other kernels, and for an
    energy without levels."""
    stds = context_trait(energy, "noise_stds")
    return len(stds) - 1 if stds is not None and kernel_trait(kernel, "descends") else None


def noise_of(
    energy: object, level: int, size: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """Noise of that level about the mean of the data, `data_mean` of the energy, or else 0.

    The mean counts: that of an image of many pixels is as far from 0 as noise of 10 reaches.
    """
    noise = torch.empty(size).normal_(generator=generator)
    mean = getattr(energy, "data_mean", 0.0)
    return mean + context_trait(energy, "noise_stds")[level] * noise


def _bound(energy: EnergyFn) -> EnergyFn:
    return _bound(energy.energy) if isinstance(energy, Autocast) else energy
