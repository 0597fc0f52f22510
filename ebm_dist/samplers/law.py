"""How the law of unadjusted chains differs from exp(-E/T): by step size and by clamping."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.kernel import Kernel
from ebm_dist.samplers.traits import UnadjustedKernel


def unadjusted(kernel: Kernel[Any]) -> UnadjustedKernel | None:
    """The kernel that moves the chains (or coldest copies) if it has no accept step, else None."""
    kernel = getattr(kernel, "coldest", kernel)
    return kernel if isinstance(kernel, UnadjustedKernel) else None


def at_temperature(kernel: Kernel[Any], temperature: float) -> Kernel[Any]:
    """The same sampler of exp(-E/T) at another T > 0; a ladder keeps its ratios above the new T.

    Raises:
        ValueError: a sampler of the user's that is no dataclass with a field `temperature`.
    """
    names = {field.name for field in fields(kernel)} if is_dataclass(kernel) else set()
    change: dict[str, Any]
    if "temperatures" in names:
        ladder: tuple[float, ...] = getattr(kernel, "temperatures")  # noqa: B009
        change = {"temperatures": tuple(temperature * t / ladder[0] for t in ladder)}
    elif "temperature" in names:
        change = {"temperature": temperature}
    elif "kernel" in names:
        change = {"kernel": at_temperature(getattr(kernel, "kernel"), temperature)}  # noqa: B009
    else:
        raise ValueError(f"temperature: {type(kernel).__name__} has none that could be set")
    return replace(kernel, **change)  # pyright: ignore[reportArgumentType, reportCallIssue]


def box(kernel: Kernel[Any]) -> tuple[float, float] | None:
    """The bounds that every coordinate of the chains is clamped to; None without clamping."""
    return getattr(unadjusted(kernel), "clamp", None)


def curvature(
    kernel: UnadjustedKernel, energy: EnergyFn, x: Tensor, generator: torch.Generator
) -> float:
    """Mean curvature of E at events x (B, *event): trace of the Hessian over its number of rows.

    Estimated with one random sign vector per event (Hutchinson). A preconditioned kernel moves
    in the coordinates x / sqrt(scales), so its curvature is taken in those.
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
        if not along.requires_grad:  # the gradient does not depend on x
            return 0.0
        (product,) = torch.autograd.grad(along, leaf, materialize_grads=True)
    return float((product * probe).sum() / x.numel())


def effective_temperature(kernel: UnadjustedKernel, curvature: float) -> float:
    """Temperature of the chains on a quadratic of that curvature; infinite where they diverge.

    T itself for a curvature of 0 or less: such a quadratic has no normalisable law.
    """
    ratio = kernel.temperature_ratio(max(curvature, 0.0))
    return kernel.temperature / ratio if ratio > 0 else math.inf
