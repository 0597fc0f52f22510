"""Gibbs with gradients: the gradient chooses which site to change, Metropolis decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.discrete.events import Kind, draw, start_discrete
from ebm_dist.samplers.discrete.gibbs import DiscreteSection
from ebm_dist.samplers.kernel import FAMILY, select, value_and_grad
from ebm_dist.samplers.metropolis import MetropolisInfo, decide


@dataclass(frozen=True, slots=True)
class GradientState:
    """Discrete chains, with the gradient that their next proposal follows."""

    position: Tensor  # (B, *event), {0, 1} floats
    energy: Tensor  # (B,), E(position)
    grad: Tensor  # (B, *event), dE/dx of the energy's continuous extension at position
    categorical: bool  # one-hot in the last axis, else binary


def change_log_ratio(
    position: Tensor, grad: Tensor, temperature: float, categorical: bool
) -> Tensor:
    """First-order log pi(x') / pi(x) of each change of one site, (B, sites, values).

    Binary: one value, for the flip. Categorical: q values, 0 for the current one.
    """
    if categorical:
        x, g = position.flatten(1, -2), grad.flatten(1, -2)
        return (torch.linalg.vecdot(x, g).unsqueeze(-1) - g) / temperature
    return ((2 * position - 1) * grad / temperature).flatten(1).unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class GibbsWithGradients:
    """Proposes one change of one site from softmax(log-ratio / 2), then accepts or rejects it.

    The gradient estimates the log-ratios of all changes at once. The accept step makes the law
    exp(-E/T) exact for any energy that has a gradient in x. Grathwohl et al. (2021),
    arXiv:2102.04509, algorithm 1.
    """

    temperature: float = 1.0
    kind: Kind = "auto"

    reversible: ClassVar[bool] = True
    leaves_invariant: ClassVar[bool] = True

    def init(self, x: Tensor, energy: EnergyFn) -> GradientState:
        position, categorical = start_discrete(x, energy, self.kind)
        value, grad = value_and_grad(energy, position, first=True)
        return GradientState(position, value, grad, categorical)

    def step(
        self, state: GradientState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[GradientState, MetropolisInfo]:
        forward = self._log_weight(state)
        change = draw(forward, generator)
        position, back = _changed(state, change)
        value, grad = value_and_grad(energy, position)
        new = GradientState(position, value, grad, state.categorical)
        log_ratio = (state.energy - value) / self.temperature
        log_ratio = log_ratio + proposal_log_ratio(forward, change, self._log_weight(new), back)
        accepted, info = decide(log_ratio, generator)
        return select(accepted, new, state), info

    def _log_weight(self, state: GradientState) -> Tensor:
        """(B, changes): half the log-ratio of each change; -inf for no change."""
        half = 0.5 * change_log_ratio(
            state.position, state.grad, self.temperature, state.categorical
        )
        if state.categorical:
            half = half.masked_fill(state.position.flatten(1, -2) > 0, -torch.inf)
        return half.flatten(1)


def proposal_log_ratio(forward: Tensor, change: Tensor, backward: Tensor, back: Tensor) -> Tensor:
    """log q(x | x') - log q(x' | x), (B,), from the log-weights (B, changes) at both ends."""
    to = forward.gather(1, change[:, None]).squeeze(1) - forward.logsumexp(1)
    fro = backward.gather(1, back[:, None]).squeeze(1) - backward.logsumexp(1)
    return fro - to


def _changed(state: GradientState, change: Tensor) -> tuple[Tensor, Tensor]:
    """The position after `change` (B,), and the change that undoes it (B,)."""
    x = state.position
    if not state.categorical:
        flat = x.flatten(1).clone()
        old = flat.gather(1, change[:, None])
        return flat.scatter_(1, change[:, None], 1 - old).reshape(x.shape), change
    num_values = x.shape[-1]
    flat = x.flatten(1, -2).clone()
    site = change.div(num_values, rounding_mode="floor")
    chain = torch.arange(len(x), device=x.device)
    old = flat[chain, site].argmax(-1)
    flat[chain, site] = torch.nn.functional.one_hot(change % num_values, num_values).to(x.dtype)
    return flat.reshape(x.shape), site * num_values + old


@FAMILY.register
class GibbsWithGradientsSection(DiscreteSection):
    """Changes one site a step, chosen by the gradient, with an exact accept step."""

    name: Literal["gibbs_with_gradients"] = "gibbs_with_gradients"
    example: ClassVar[dict[str, Any]] = {}

    def build(self) -> GibbsWithGradients:
        return GibbsWithGradients(temperature=self.temperature, kind=self.kind)
