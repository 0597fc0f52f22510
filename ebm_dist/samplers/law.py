"""The law that chains have where it is not exp(-E/T) itself: step size, clipping, clamping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.continuous.annealed_langevin import AnnealedLangevin
from ebm_dist.samplers.continuous.langevin import Langevin
from ebm_dist.samplers.continuous.preconditioned_langevin import PreconditionedLangevin
from ebm_dist.samplers.continuous.sghmc import Sghmc
from ebm_dist.samplers.kernel import Kernel
from ebm_dist.samplers.tempering.parallel_tempering import ParallelTempering

Unadjusted = Langevin | AnnealedLangevin | PreconditionedLangevin | Sghmc


def unadjusted(kernel: Kernel[Any]) -> Unadjusted | None:
    """The kernel, or the one that moves its coldest copies, if it has no accept step."""
    if isinstance(kernel, ParallelTempering):
        kernel = kernel.kernels[0]
    return kernel if isinstance(kernel, Unadjusted) else None


def box(kernel: Kernel[Any]) -> tuple[float, float] | None:
    """The range that every coordinate of the chains is clamped to, None where they are free."""
    return getattr(unadjusted(kernel), "clamp", None)


def curvature(kernel: Unadjusted, energy: EnergyFn, x: Tensor, generator: torch.Generator) -> float:
    """Mean curvature of E at events x (B, *event): trace of the Hessian over its rows.

    By one random sign vector for each event (Hutchinson). In the coordinates x / sqrt(scales)
    that a preconditioned kernel moves in.
    """
    sign = torch.empty(x.shape, device=generator.device).uniform_(-1, 1, generator=generator)
    probe = sign.sign().to(x)
    if isinstance(kernel, PreconditionedLangevin):
        scale = x.new_tensor(kernel.scales).sqrt()
        probe = probe * (scale if len(scale) == 1 else scale.reshape(x.shape[1:]))
    with torch.enable_grad():
        leaf = x.detach().float().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf, create_graph=True)
        along = (grad * probe).sum()
        if not along.requires_grad:  # a gradient that is the same everywhere
            return 0.0
        (product,) = torch.autograd.grad(along, leaf, materialize_grads=True)
    return float((product * probe).sum() / x.numel())


def effective_temperature(kernel: Unadjusted, curvature: float) -> float:
    """T_eff of the chains on a quadratic of that curvature a, infinite where they diverge.

        2T / (2 - a h) under Langevin,    T / (1 - a h^2 / (2 (2 - gamma h))) under SGHMC

    T itself where the energy is not convex: no quadratic with a law is like it.
    """
    step, a = kernel.step_size, max(curvature, 0.0)
    if isinstance(kernel, Sghmc):
        left = 1 - a * step**2 / (2 * (2 - kernel.friction * step))
    else:
        left = 1 - a * step / 2
    return kernel.temperature / left if left > 0 else math.inf
