"""Tempered transitions: heat a chain, cool it again, and accept or reject the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import FAMILY, Kernel, select
from ebm_dist.samplers.metropolis import MetropolisInfo, decide
from ebm_dist.samplers.tempering.ladder import LadderSection
from ebm_dist.samplers.traits import names_with, trait


@dataclass(frozen=True, slots=True)
class TemperedTransitions:
    """Moves up the temperatures T_1 < ... < T_n and down again, then accepts or rejects the end.

    Let x_0 be the start, x_i the position after the move at T_i on the way up, y_{i-1} the
    position after the move at T_i on the way down, and so y_0 the end. With

        log ratio = sum_i (1/T_i - 1/T_{i+1}) (E(x_i) - E(y_i)),    i = 0 .. n - 1,

    exp(-E/T_0) stays invariant for reversible kernels. Neal (1996), Statistics and Computing 6.
    The temperatures must lie close together: each pair of neighbours adds variance to the ratio.
    One ordinary move at T_0 precedes each transition. Unlike parallel tempering this keeps only
    one copy of each chain.
    """

    kernel: Kernel[Any]
    temperatures: tuple[float, ...]

    leaves_invariant: ClassVar[bool] = True

    @property
    def temperature(self) -> float:
        """T_0, the temperature of the chains."""
        return self.temperatures[0]

    @property
    def kernels(self) -> tuple[Kernel[Any], ...]:
        """The kernel at each temperature."""
        return tuple(replace(self.kernel, temperature=t) for t in self.temperatures)  # type: ignore[type-var]

    def init(self, x: torch.Tensor, energy: EnergyFn) -> Any:
        return self.kernels[0].init(x, energy)

    def step(
        self, state: Any, energy: EnergyFn, generator: torch.Generator
    ) -> tuple[Any, MetropolisInfo]:
        kernels = self.kernels
        state, _ = kernels[0].step(state, energy, generator)
        inverse = [1 / t for t in self.temperatures]
        falls = [cold - hot for cold, hot in pairwise(inverse)]
        there, log_ratio = state, torch.zeros_like(state.energy)
        for fall, kernel in zip(falls, kernels[1:]):
            log_ratio = log_ratio + fall * there.energy
            there, _ = kernel.step(there, energy, generator)
        for fall, kernel in zip(falls[::-1], kernels[:0:-1]):
            there, _ = kernel.step(there, energy, generator)
            log_ratio = log_ratio - fall * there.energy
        accepted, info = decide(log_ratio, generator)
        return select(accepted, there, state), info


@FAMILY.register
class TemperedTransitionsSection(LadderSection):
    """Heats and cools every chain, which carries it over barriers; the law stays exact."""

    name: Literal["tempered_transitions"] = "tempered_transitions"
    example: ClassVar[dict[str, Any]] = {
        "kernel": {"name": "mala", "step_size": 0.5},
        "temperatures": (1.0, 1.5, 2.0),
    }

    @model_validator(mode="after")
    def _reversible(self) -> Self:
        if not trait(self.inner(), "reversible"):
            raise ValueError(
                "kernel: tempered_transitions needs a reversible sampler inside: "
                f"{names_with('reversible')}"
            )
        return self

    def build(self) -> TemperedTransitions:
        return TemperedTransitions(kernel=self.inner(), temperatures=self.temperatures)
