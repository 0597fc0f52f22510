"""Adapts the step size during warm-up, by dual averaging towards an acceptance rate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.frozen import frozen
from ebm_dist.samplers.kernel import Kernel
from ebm_dist.samplers.traits import names_with

K = TypeVar("K", bound=Kernel)

# Hoffman & Gelman (2014), arXiv:1111.4246, section 3.2.1, with more shrinkage (their gamma is
# .05): the acceptance here is a mean over the batch, not that of one chain.
_GAMMA, _T0, _KAPPA = 0.1, 10.0, 0.75


def adapt_step_size(
    kernel: K,
    x: Tensor,
    energy: EnergyFn,
    num_steps: int,
    generator: torch.Generator,
    target_acceptance: float | None = None,
) -> K:
    """The kernel with the step size at which its proposals are accepted at the target rate.

    Runs `num_steps` warm-up steps from `x` (B, *event), which stays unchanged, and discards the
    chains. The step size is then fixed: a kernel that kept adapting would depend on the past of
    its chains and no longer leave exp(-E/T) invariant.

    Args:
        target_acceptance: mean over the chains, in (0, 1); by default the kernel's
            `target_acceptance`.

    Raises:
        ValueError: the kernel has no accept step or no step size, or the target is not in (0, 1).
    """
    name = getattr(kernel, "tunable", None)
    target = target_acceptance
    if target is None:
        target = getattr(kernel, "target_acceptance", None)
    if name is None or not hasattr(kernel, "target_acceptance") or target is None:
        raise ValueError(
            f"kernel: {type(kernel).__name__} has no step size with an acceptance to aim at; use "
            f"{names_with('target_acceptance')}"
        )
    if not 0 < target < 1:
        raise ValueError(f"target_acceptance: expected a rate between 0 and 1, got {target!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps!r}")
    # Shrinks towards ten times the first step size, as in the paper: a step that is too large
    # is detected sooner than one that is too small.
    centre = math.log(10 * getattr(kernel, name))
    error, averaged = 0.0, 0.0
    current = kernel
    with frozen(energy):
        state = kernel.init(x, energy)
        for k in range(1, num_steps + 1):
            state, info = current.step(state, energy, generator)
            error += (target - float(info.acceptance.mean()) - error) / (k + _T0)
            log_step = centre - math.sqrt(k) / _GAMMA * error
            weight = k**-_KAPPA
            averaged = weight * log_step + (1 - weight) * averaged
            current = replace(kernel, **{name: math.exp(log_step)})  # type: ignore[type-var]
    return replace(kernel, **{name: math.exp(averaged)})  # type: ignore[type-var]
