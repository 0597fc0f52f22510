"""Objectives for discrete events that compare each one with its neighbours, one site changed."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from einops import rearrange, repeat
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_dist.core.types import Batch, EnergyFn, EventKind, EventSpec, Negatives
from ebm_dist.objectives.objective import (
    FAMILY,
    Metrics,
    Objective,
    ObjectiveSection,
    energies_of,
    given,
    uniform,
)


class NeighbourSection(ObjectiveSection):
    """The config that objectives on neighbours share."""

    far_modes: ClassVar[str] = (
        "not seen: states that differ in many sites at once are never compared with each other"
    )

    num_sites: PositiveInt | None = None
    """Sites compared for each datum, drawn without replacement; all when left out. A site costs one
    evaluation of the energy for each other state: 784 per datum for all bits of 28x28."""


@FAMILY.register
class PseudoLikelihoodSection(NeighbourSection):
    """-log p(each site | all others): no negatives, no Z."""

    name: Literal["pseudo_likelihood"] = "pseudo_likelihood"
    kinds: ClassVar[tuple[EventKind, ...]] = ("binary", "categorical")
    example: ClassVar[dict[str, Any]] = {"one_hot": False}

    one_hot: bool | None = None
    """Whether events are one-hot in the last axis; taken from the data when left out."""

    @property
    def takes_negatives(self) -> bool:
        return False  # asked before the events are known, without which it cannot be built

    def bind(self, spec: EventSpec) -> Self:
        bound = super().bind(spec)
        one_hot = spec.kind == "categorical"
        if bound.one_hot not in (None, one_hot):
            raise ValueError(
                f"objective.one_hot: {bound.one_hot}, but the data is {spec.kind}; leave it out"
            )
        return bound.model_copy(update={"one_hot": one_hot})

    def module(self) -> Objective:
        if self.one_hot is None:
            raise ValueError(
                "objective.one_hot: left to the data, but the section is not bound to any; give "
                "false for binary events, true for categorical ones"
            )
        return PseudoLikelihood(self.num_sites, self.fitted_temperature, one_hot=self.one_hot)


@FAMILY.register
class RatioMatchingSection(NeighbourSection):
    """Match the ratios p(x) / p(x with one bit flipped): score matching for bits."""

    name: Literal["ratio_matching"] = "ratio_matching"
    kinds: ClassVar[tuple[EventKind, ...]] = ("binary",)
    example: ClassVar[dict[str, Any]] = {}

    def module(self) -> Objective:
        return RatioMatching(self.num_sites, self.fitted_temperature, one_hot=False)


class NeighbourObjective(Objective):
    """A loss of log p(neighbour) - log p(x), summed over sites.

    Does not see the weights of far modes: it compares states that differ in one site.
    """

    def __init__(self, num_sites: int | None, temperature: float, *, one_hot: bool) -> None:
        super().__init__()
        self.num_sites = num_sites
        self.temperature = temperature
        self.one_hot = one_hot
        self.needs_generator = num_sites is not None

    def of_log_ratios(self, log_ratio: Tensor) -> Tensor:
        """Loss (B, S) from log p(neighbour) - log p(x), (B, S, K - 1)."""
        raise NotImplementedError

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        x = batch.x.detach()
        if self.one_hot and x.ndim < 2:
            raise ValueError(
                f"batch.x: shape {tuple(x.shape)} has no class axis; categorical events are "
                "one-hot, (B, *sites, K)"
            )
        num = math.prod(x.shape[1:-1] if self.one_hot else x.shape[1:])
        sites = choose_sites(num, self.num_sites, x, generator)
        others = neighbours(x, sites, one_hot=self.one_hot)
        values = energies_of(energy, torch.cat([x, others.flatten(0, 2)]))
        here, there = values[: len(x)], values[len(x) :].reshape(others.shape[:3])
        log_ratio = (rearrange(here, "b -> b 1 1") - there) / self.temperature
        # Scaled up for the sites left out: the mean of the loss is that over all sites.
        loss = self.of_log_ratios(log_ratio).sum(1).mean() * (num / sites.shape[1])
        return loss, {"energy/positive": here.detach().mean(), "loss/total": loss.detach()}


class PseudoLikelihood(NeighbourObjective):
    """mean over data of -sum over sites of log p(x_i | the others), in nats. Besag (1975)."""

    def of_log_ratios(self, log_ratio: Tensor) -> Tensor:
        return F.pad(log_ratio, (1, 0)).logsumexp(2)


class RatioMatching(NeighbourObjective):
    """mean over data of sum over bits of sigmoid(log p(flipped) - log p(x))^2.

    Hyvarinen (2007), "Some extensions of score matching", eq. 17.
    """

    def of_log_ratios(self, log_ratio: Tensor) -> Tensor:
        return torch.sigmoid(log_ratio).square().squeeze(2)


def choose_sites(
    num: int, wanted: int | None, x: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Sites (B, S) int64 of each event, all `num` of them or `wanted` without replacement."""
    if wanted is None:
        return repeat(torch.arange(num, device=x.device), "s -> b s", b=len(x))
    if wanted > num:
        raise ValueError(
            f"objective.num_sites: {wanted}, but an event has {num} sites; lower it, or leave it "
            "out for all"
        )
    return uniform((len(x), num), x, given(generator)).argsort(1)[:, :wanted]


def neighbours(x: Tensor, sites: Tensor, *, one_hot: bool) -> Tensor:
    """x with each of `sites` (B, S) in each other state: (B, S, K - 1, *event); K = 2 for bits."""
    num_chosen = sites.shape[1]
    if not one_hot:
        copies = repeat(x.flatten(1), "b d -> b s d", s=num_chosen).clone()
        index = rearrange(sites, "b s -> b s 1")
        copies.scatter_(2, index, 1 - copies.gather(2, index))
        return copies.reshape(len(x), num_chosen, 1, *x.shape[1:])
    num_states = x.shape[-1]
    flat = x.reshape(len(x), -1, num_states)
    copies = repeat(flat, "b d k -> b s m d k", s=num_chosen, m=num_states - 1).clone()
    state = flat.gather(1, repeat(sites, "b s -> b s k", k=num_states)).argmax(2)
    # The other states, in cyclic order: m states after the current one, m = 1 .. K - 1.
    shift = torch.arange(1, num_states, device=x.device)
    other = (rearrange(state, "b s -> b s 1") + shift) % num_states
    new = F.one_hot(other, num_states).to(x.dtype)
    index = repeat(sites, "b s -> b s m 1 k", m=num_states - 1, k=num_states)
    copies.scatter_(3, index, rearrange(new, "b s m k -> b s m 1 k"))
    return copies.reshape(len(x), num_chosen, num_states - 1, *x.shape[1:])
