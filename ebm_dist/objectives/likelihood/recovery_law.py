"""The law p(x | x~) of recovery likelihood: its pairs, its energy, and the loss on its samples."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from ebm_dist.core.events import per_chain, sum_event
from ebm_dist.core.types import EnergyFn, LevelNoise
from ebm_dist.energies.context import ContextTraits, trait
from ebm_dist.objectives.likelihood.joint import logits_of
from ebm_dist.objectives.objective import Metrics, energies_of

Conditioning = Literal["none", "level"]


def pair_noise(stds: tuple[float, ...], by: Conditioning) -> tuple[LevelNoise, LevelNoise]:
    """The noise that makes a pair of a datum, and x~ of the pair, by level.

    none: the pair is the datum itself. level: the pair is sqrt(1 - s^2) x_t, where x_t has kept the
    share prod_{r<t} (1 - s_r^2) of the datum's variance.
    """
    further = LevelNoise((1.0,) * len(stds), stds)
    if by == "none":
        return LevelNoise((1.0,) * len(stds), (0.0,) * len(stds)), further
    keep = [1 - s**2 for s in stds]
    kept = accumulate(keep[:-1], lambda a, b: a * b, initial=1.0)
    parts = [(k * share, k * (1 - share)) for k, share in zip(keep, kept)]
    scale, std = zip(*[(a**0.5, b**0.5) for a, b in parts])
    return LevelNoise(scale, std), further


def level_energies(
    energy: nn.Module | EnergyFn,
    x: Tensor,
    level: Tensor,
    stds: tuple[float, ...],
    by: Conditioning,
) -> Tensor:
    """E_t(x) (B,) at the level t of each event: one energy, E(x, level), or -logits[:, t].

    Raises:
        ValueError: the energy has not as many levels as there are `stds`.
    """
    if by == "none":
        return energies_of(energy, x)
    if "level" in trait(energy, "context"):
        _check_levels("energy.num_levels", len(trait(energy, "noise_stds") or stds), len(stds))
        return energies_of(partial(energy, level=level), x)
    logits = logits_of(energy, x)
    _check_levels("energy.num_classes", logits.shape[1], len(stds))
    return -logits.gather(1, level[:, None]).squeeze(1)


def _check_levels(key: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"{key}: {found}, but objective.noise_std has {expected} levels and "
            f"objective.conditioning is level; set {key}: {expected}"
        )


def recovery_loss(
    energy_pos: Tensor, energy_neg: Tensor, std: Tensor, smallest: float | None
) -> tuple[Tensor, Metrics]:
    """mean[ w (E(x) - E(x-)) ] and metrics, of pairs and their chains at noise `std`, (B,) each.

    Args:
        smallest: w is this noise over `std`; None for equal weights.
    """
    weight = torch.ones_like(std) if smallest is None else smallest / std
    loss = (weight * (energy_pos - energy_neg)).mean()
    positive, negative = energy_pos.detach().mean(), energy_neg.detach().mean()
    return loss, {
        "energy/positive": positive,
        "energy/negative": negative,
        "energy/gap": positive - negative,
        "loss/total": loss.detach(),
    }


class TiedEnergy(ContextTraits, nn.Module):
    """The energy of chains that sample p(x | x~) at temperature T, given level and x~.

        E_t(x) + T |x~ - x|^2 / (2 s_t^2),    x = unit_t u,    x~ the condition

    It is called with u: each chain moves in a unit proportional to the width of p(x | x~) at its
    level, s or s sqrt(1 - s^2) under `level`, so that one step size serves every level. The unit of
    level 0 is 1, so the step size of a sampler is the one of level 0 in squared data units.
    """

    context = needs_context = frozenset({"level", "condition"})

    def __init__(
        self, energy: nn.Module, stds: tuple[float, ...], by: Conditioning, temperature: float
    ) -> None:
        super().__init__()
        self.energy = energy
        self.by: Conditioning = by
        self.stds = self.noise_stds = stds
        self.event = getattr(energy, "event", None)
        self.event_shape = getattr(energy, "event_shape", None)
        self.condition_shape = self.event_shape
        std = torch.tensor(stds)
        width = std if by == "none" else std * (1 - std.square()).sqrt()
        self.register_buffer("stiffness", temperature / std.square(), persistent=False)
        self.register_buffer("units", width / width[0], persistent=False)

    def chain_unit(self, level: Tensor, condition: Tensor) -> Tensor:
        """The length (B,) in units of which the chains move."""
        del condition
        return self.get_buffer("units")[level]

    def forward(self, u: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        x = per_chain(self.chain_unit(level, condition), u) * u
        own = level_energies(self.energy, x, level, self.stds, self.by)
        return own + 0.5 * self.get_buffer("stiffness")[level] * sum_event((condition - x).square())
