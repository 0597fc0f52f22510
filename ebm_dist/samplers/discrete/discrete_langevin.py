"""Discrete Langevin: every site moves at once by a gradient-informed proposal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.discrete.events import Kind, draw, one_hot_like, start_discrete
from ebm_dist.samplers.discrete.gibbs import DiscreteSection
from ebm_dist.samplers.discrete.gibbs_with_gradients import (
    GradientState,
    change_log_ratio,
)
from ebm_dist.samplers.kernel import FAMILY, select, uniform, value_and_grad
from ebm_dist.samplers.metropolis import MetropolisInfo, decide


@dataclass(frozen=True, slots=True)
class DiscreteLangevin:
    """q(x' | x) ~ prod_i exp(-(x'_i - x_i) . g_i / (2 T) - |x'_i - x_i|^2 / (2 h)), accepted.

    The Langevin proposal restricted to discrete events: it treats the sites as independent, so
    many change in one step. The accept step makes the law exp(-E/T) exact. Zhang, Liu &
    Liu (2022), arXiv:2206.09914 (DMALA). |x' - x|^2 is 1 for a changed bit and 2 for a changed
    one-hot code.
    """

    step_size: float
    """h: a larger h proposes more changes; where the gradient is 0 a bit flips with probability
    sigmoid(-1 / (2 h))."""
    temperature: float = 1.0
    kind: Kind = "auto"

    tunable: ClassVar[str] = "step_size"
    reversible: ClassVar[bool] = True
    leaves_invariant: ClassVar[bool] = True
    target_acceptance: ClassVar[float] = 0.574
    """Optimal for factorised discrete proposals (Sun et al. 2022, arXiv:2206.14897)."""

    def init(self, x: Tensor, energy: EnergyFn) -> GradientState:
        position, categorical = start_discrete(x, energy, self.kind)
        value, grad = value_and_grad(energy, position, first=True)
        return GradientState(position, value, grad, categorical)

    def step(
        self, state: GradientState, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[GradientState, MetropolisInfo]:
        logit = self._logit(state)
        if state.categorical:
            code = state.position.flatten(1, -2)
            drawn = one_hot_like(draw(logit, generator), code)
            position = drawn.reshape(state.position.shape)
        else:
            flip = (
                uniform(state.position, generator) < logit.reshape(state.position.shape).sigmoid()
            )
            position = torch.where(flip, 1 - state.position, state.position)
        value, grad = value_and_grad(energy, position)
        new = GradientState(position, value, grad, state.categorical)
        log_ratio = (state.energy - value) / self.temperature
        log_ratio = log_ratio + move_log_ratio(logit, self._logit(new), state, new)
        accepted, info = decide(log_ratio, generator)
        return select(accepted, new, state), info

    def _logit(self, state: GradientState) -> Tensor:
        """Binary: log-odds of each flip (B, sites, 1). Categorical: log-weight of each value
        (B, sites, q)."""
        half = 0.5 * change_log_ratio(
            state.position, state.grad, self.temperature, state.categorical
        )
        if state.categorical:
            return half - (1 - state.position.flatten(1, -2)) / self.step_size
        return half - 0.5 / self.step_size


def move_log_ratio(
    forward: Tensor, backward: Tensor, old: GradientState, new: GradientState
) -> Tensor:
    """log q(x | x') - log q(x' | x), (B,), from the logits at x and at x'."""
    if old.categorical:
        to = (forward.log_softmax(-1) * new.position.flatten(1, -2)).flatten(1).sum(1)
        fro = (backward.log_softmax(-1) * old.position.flatten(1, -2)).flatten(1).sum(1)
        return fro - to
    # +1 where the site flips, -1 where it stays, in both directions.
    sign = 2 * (old.position != new.position).flatten(1).to(forward.dtype) - 1
    to = F.logsigmoid(sign * forward.squeeze(-1)).sum(1)
    fro = F.logsigmoid(sign * backward.squeeze(-1)).sum(1)
    return fro - to


@FAMILY.register
class DiscreteLangevinSection(DiscreteSection):
    """Changes many sites in one step by a gradient-informed proposal, with an exact accept step."""

    name: Literal["discrete_langevin"] = "discrete_langevin"
    example: ClassVar[dict[str, Any]] = {"step_size": 0.5}

    step_size: PositiveFloat
    """h: a larger h changes more sites at once. Aim at an acceptance near .57."""

    def build(self) -> DiscreteLangevin:
        return DiscreteLangevin(
            step_size=self.step_size, temperature=self.temperature, kind=self.kind
        )
