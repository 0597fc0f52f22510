"""A schedule by the age of chains has to fit the rounds, the starts and the negatives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec

if TYPE_CHECKING:
    from ebm_dist.config.run_config import RunConfig

FEWEST_ARRIVED = 0.05
"""Smallest share of the chains that may be old enough to be negatives."""


def check_clock(config: RunConfig) -> Iterator[str]:
    objective, buffer, sampler = config.objective, config.buffer, config.sampler
    min_clock, length = _min_clock(config), sampler.num_scheduled_steps
    if min_clock and not buffer.context.clock:
        yield (
            f"objective.min_clock: {min_clock}, but chains carry no clock; set "
            "buffer.context.clock: true, or objective.min_clock: 0"
        )
        return
    if not length or not objective.takes_negatives:
        return
    name = f"sampler.name: {sampler.name}"  # type: ignore[attr-defined]
    if buffer.init not in ("noise", "gaussian"):
        yield (
            f"buffer.init: {buffer.init}, but {name} flows from noise to the data; set "
            "buffer.init: noise, or sampler.name: langevin"
        )
    steps, one_round = sampler.num_steps, sampler.num_steps >= length
    if not buffer.context.clock:
        if not (one_round and buffer.reinit_prob == 1):
            yield (
                f"buffer.context.clock: false, but {name} takes {length} steps from noise to the "
                "data, which every round would begin anew; set buffer.context.clock: true, or "
                f"sampler.num_steps: {length} and buffer.reinit_prob: 1"
            )
        return
    if config.evaluation.audit_every is not None:
        yield (
            f"evaluation.audit_every: {config.evaluation.audit_every}, but an audit does not know "
            f"the clock of chains, by which {name} moves them; leave it out"
        )
    if one_round:
        return
    if min_clock < length:
        remedy = f"set objective.min_clock: {length}"
        if not hasattr(objective, "min_clock"):
            remedy = f"set objective.name: energy_matching and objective.min_clock: {length}"
        yield (
            f"{name}: chains are no samples of the model before step {length}, and all of them "
            f"would be negatives; {remedy}"
        )
        return
    rounds = math.ceil(min_clock / steps)
    if (1 - buffer.reinit_prob) ** (rounds - 1) < FEWEST_ARRIVED:
        most = 1 - 0.5 ** (1 / rounds)
        yield (
            f"buffer.reinit_prob: {buffer.reinit_prob:g}, but hardly a chain lives for the "
            f"{rounds} rounds that objective.min_clock: {min_clock} takes; lower it to "
            f"{math.floor(1000 * most) / 1000:g}"
        )


def check_flow(config: RunConfig, spec: EventSpec) -> None:
    """Refuse chains that start elsewhere than the flow that the energy is trained to be.

    Raises:
        UserError: the start noise of chains is not that of the objective.
    """
    std = getattr(config.objective, "noise_std", None)
    if not config.sampler.num_scheduled_steps or not config.objective.takes_negatives:
        return
    if spec.kind == "image" and config.buffer.init == "noise":
        raise UserError(
            "buffer.init: noise starts images uniformly on [-1, 1], but the flow of "
            f"sampler.name: {config.sampler.name} starts from Gaussian noise; set "  # type: ignore[attr-defined]
            "buffer.init: gaussian"
        )
    if isinstance(std, float) and not math.isclose(std, config.buffer.init_std):
        raise UserError(
            f"buffer.init_std: expected objective.noise_std = {std:g}, from which the flow starts, "
            f"got {config.buffer.init_std:g}; set it to {std:g}"
        )


def _min_clock(config: RunConfig) -> int:
    return getattr(config.objective, "min_clock", 0)
