"""Gibbs sampling of discrete events: redraws sites from their law given all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from pydantic import PositiveFloat
from torch import Tensor

from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.samplers.discrete.events import Kind, draw, one_hot_like, start_discrete
from ebm_dist.samplers.frozen import for_rows
from ebm_dist.samplers.kernel import (
    FAMILY,
    KernelSection,
    as_float,
    uniform,
    value,
    value_and_grad,
)


class LatentConditionals(Protocol):
    """An energy that is the marginal of a joint law with latent units, as an RBM's is."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def sample_hidden(self, v: Tensor, generator: torch.Generator) -> Tensor:
        """The latent units given v (B, *event), from the joint law at temperature 1."""
        ...

    def sample_visible(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """v (B, *event) given the latent units, from the joint law at temperature 1."""
        ...


@runtime_checkable
class SharedInput(LatentConditionals, Protocol):
    """Latent conditionals that share their most expensive part with the energy.

    An RBM's energy and the law of its hidden units both need c + W v. A sweep computes it once,
    at its end, and the next sweep starts from it: two matrix products a sweep instead of three.
    """

    def latent_input(self, v: Tensor) -> Tensor:
        """The input of the latent units from v (B, *event); any shape (B, ...)."""
        ...

    def draw_latent(self, latent_input: Tensor, generator: torch.Generator) -> Tensor:
        """As `sample_hidden(v, generator)`, bit for bit, from `latent_input(v)`."""
        ...

    def energy_given(self, v: Tensor, latent_input: Tensor) -> Tensor:
        """E(v), (B,), bit for bit, from v and `latent_input(v)`."""
        ...


class LinearBlocks(Protocol):
    """An energy that is linear in the sites of each block while all other sites are fixed.

    The sites of a block are then independent given the rest, and the gradient in x holds their
    exact conditional log-odds. Example: the two colours of an Ising or Potts lattice.
    """

    def __call__(self, x: Tensor, /) -> Tensor: ...

    @property
    def gibbs_blocks(self) -> tuple[Tensor, ...]:
        """Boolean masks that together cover every site once. A mask has the event's shape,
        without the last axis if the event is categorical."""
        ...


Scan = Literal["latent", "blocks", "sites"]


@dataclass(frozen=True, slots=True)
class GibbsState:
    """Chains and their energies."""

    position: Tensor  # (B, *event), {0, 1} floats
    energy: Tensor  # (B,), E(position)
    categorical: bool  # one-hot in the last axis, else binary
    scan: Scan
    latent_input: Tensor | None = None  # at position, if the energy is a `SharedInput`


@dataclass(frozen=True, slots=True)
class GibbsInfo:
    """Reported for each sweep."""

    changed: Tensor  # (B,), fraction of the sites that changed their value


@dataclass(frozen=True, slots=True)
class Gibbs:
    """Redraws every site once a step, from its law given all others. Geman & Geman (1984).

    The energy decides how:

    - with `sample_hidden` and `sample_visible`: all latent units, then all visible ones; cheaper
      if it is also a `SharedInput`;
    - with `gibbs_blocks`: block by block, at one gradient a block;
    - any other callable: site by site, at one evaluation a site, of q times the batch for sites
      with q values.
    """

    temperature: float = 1.0
    kind: Kind = "auto"

    leaves_invariant: ClassVar[bool] = True

    def init(self, x: Tensor, energy: EnergyFn) -> GibbsState:
        position, categorical = start_discrete(x, energy, self.kind)
        scan = self._scan(energy)
        current = value(energy, position, first=True)
        shared = None
        if scan == "latent" and isinstance(energy, SharedInput):
            with torch.no_grad():
                shared = energy.latent_input(position)
        return GibbsState(position, current, categorical, scan, shared)

    def step(
        self, state: GibbsState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[GibbsState, GibbsInfo]:
        shared = None
        if state.latent_input is not None:
            sharing = cast(SharedInput, energy)
            with torch.no_grad():
                hidden = sharing.draw_latent(state.latent_input, generator)
                position = sharing.sample_visible(hidden, generator).to(state.position.dtype)
                shared = sharing.latent_input(position)
                current = as_float(sharing.energy_given(position, shared))
        elif state.scan == "latent":
            joint = cast(LatentConditionals, energy)
            hidden = joint.sample_hidden(state.position, generator)
            position = joint.sample_visible(hidden, generator).to(state.position.dtype)
            current = value(energy, position)
        elif state.scan == "blocks":
            position = state.position
            for mask in cast(LinearBlocks, energy).gibbs_blocks:
                position = self._redraw(position, energy, mask, state.categorical, generator)
            current = value(energy, position)
        else:
            sweep = _sweep_categorical if state.categorical else _sweep_binary
            position, current = sweep(
                state.position, state.energy, energy, self.temperature, generator
            )
        new = GibbsState(position, current, state.categorical, state.scan, shared)
        return new, GibbsInfo(_changed(state.position, position, state.categorical))

    def _scan(self, energy: EnergyFn) -> Scan:
        # The latent conditionals hold at temperature 1 only: a power of the marginal is not the
        # marginal of that joint law, so they would sample another model.
        if self.temperature == 1.0 and hasattr(energy, "sample_hidden"):
            return "latent" if hasattr(energy, "sample_visible") else "sites"
        return "blocks" if hasattr(energy, "gibbs_blocks") else "sites"

    def _redraw(
        self,
        x: Tensor,
        energy: EnergyFn,
        mask: Tensor,
        categorical: bool,
        generator: torch.Generator,
    ) -> Tensor:
        """`x` with the sites of one block drawn anew, all at once."""
        _, grad = value_and_grad(energy, x)
        if categorical:
            drawn = one_hot_like(draw(-grad / self.temperature, generator), x)
            return torch.where(mask[None, ..., None], drawn, x)
        # E(site = 1) - E(site = 0) is the gradient, so minus it is the log-odds of a one.
        ones = uniform(x, generator) < torch.sigmoid(-grad / self.temperature)
        return torch.where(mask[None], ones.to(x.dtype), x)


def _sweep_binary(
    position: Tensor,
    current: Tensor,
    energy: EnergyFn,
    temperature: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    shape = position.shape
    x = position.reshape(shape[0], -1).clone()
    u = uniform(x, generator)
    for site in range(x.shape[1]):
        held = x[:, site].clone()
        x[:, site] = 1 - held
        flipped = value(energy, x.reshape(shape))
        flip = u[:, site] < torch.sigmoid((current - flipped) / temperature)
        x[:, site] = torch.where(flip, 1 - held, held)
        current = torch.where(flip, flipped, current)
    return x.reshape(shape), current


def _sweep_categorical(
    position: Tensor,
    current: Tensor,
    energy: EnergyFn,
    temperature: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    shape = position.shape
    batch, num_values = shape[0], shape[-1]
    x = position.reshape(batch, -1, num_values).clone()
    eye = torch.eye(num_values, dtype=x.dtype, device=x.device)
    of_trials = for_rows(energy, lambda t: t.repeat(num_values, *[1] * (t.ndim - 1)))
    for site in range(x.shape[1]):
        # Every value of the site at once: (values, chains, sites, values).
        trial = x.expand(num_values, *x.shape).clone()
        trial[:, :, site] = eye[:, None]
        energies = value(of_trials, trial.reshape(num_values * batch, *shape[1:]))
        energies = energies.reshape(num_values, batch).T
        index = draw(-energies / temperature, generator)
        x[:, site] = eye[index]
        current = energies.gather(1, index[:, None]).squeeze(1)
    return x.reshape(shape), current


def _changed(old: Tensor, new: Tensor, categorical: bool) -> Tensor:
    # A site that changes its category changes two entries of its one-hot code: the mean over the
    # entries times q/2 is the mean over the sites. A difference of zeros and ones, since a
    # comparison and its cast take three times as long.
    moved = (old - new).abs_().flatten(1).mean(1)
    return moved * (old.shape[-1] / 2) if categorical else moved


class DiscreteSection(KernelSection):
    """What the configs of all discrete samplers share."""

    discrete: ClassVar[bool] = True

    temperature: PositiveFloat = 1.0
    """T of the law exp(-E/T)."""

    kind: Kind = "auto"
    """Whether events are binary or one-hot. `auto` reads it from the energy; if the energy does not
    say, events are categorical where all chains are one-hot along the last axis."""

    def bind(self, spec: EventSpec) -> DiscreteSection:
        bound = super().bind(spec)
        if self.kind not in ("auto", spec.kind):
            raise ValueError(
                f"sampler.kind: {self.kind}, but the data is {spec.kind}; leave sampler.kind out"
            )
        return bound.model_copy(update={"kind": spec.kind})


@FAMILY.register
class GibbsSection(DiscreteSection):
    """Gibbs sampling: in blocks where the energy offers them, else site by site."""

    name: Literal["gibbs"] = "gibbs"
    example: ClassVar[dict[str, Any]] = {}

    def build(self) -> Gibbs:
        return Gibbs(temperature=self.temperature, kind=self.kind)
