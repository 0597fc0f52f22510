"""The law that chains have where it is not exp(-E/T) itself: step size, clipping, clamping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import Kernel
from ebm_dist.samplers.traits import UnadjustedKernel


def unadjusted(kernel: Kernel[Any]) -> UnadjustedKernel | None:
    """The kernel, or the one that moves its coldest copies, if it has no accept step."""
    kernel = getattr(kernel, "coldest", kernel)
    return kernel if isinstance(kernel, UnadjustedKernel) else None


def box(kernel: Kernel[Any]) -> tuple[float, float] | None:
    """The range that every coordinate of the chains is clamped to, None where they are free."""
    return getattr(unadjusted(kernel), "clamp", None)


def curvature(
    kernel: UnadjustedKernel, energy: EnergyFn, x: Tensor, generator: torch.Generator
) -> float:
    """Mean curvature of E at events x (B, *event): trace of the Hessian over its rows.

    By one random sign vector for each event (Hutchinson). In the coordinates x / sqrt(scales)
    that a preconditioned kernel moves in.
    """
    sign = torch.empty(x.shape, device=generator.device).uniform_(-1, 1, generator=generator)
    probe = sign.sign().to(x)
    if (scales := getattr(kernel, "scales", None)) is not None:
        scale = x.new_tensor(scales).sqrt()
        probe = probe * (scale if len(scale) == 1 else scale.reshape(x.shape[1:]))
    with torch.enable_grad():
        leaf = x.detach().float().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf, create_graph=True)
        along = (grad * probe).sum()
        if not along.requires_grad:  # a gradient that is the same everywhere
            return 0.0
        (product,) = torch.autograd.grad(along, leaf, materialize_grads=True)
    return float((product * probe).sum() / x.numel())


def effective_temperature(kernel: UnadjustedKernel, curvature: float) -> float:
    """T_eff of the chains on a quadratic of that curvature, infinite where they diverge.

    T itself where the energy is not convex: no quadratic with a law is like it.
    """
    ratio = kernel.temperature_ratio(max(curvature, 0.0))
    return kernel.temperature / ratio if ratio > 0 else math.inf
