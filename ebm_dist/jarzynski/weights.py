"""Jarzynski correction: log-weights that keep persistent chains exact while the energy changes.

Each chain has a log-weight A. At version k the chains X with weights exp A represent
p_k = exp(-E_k/T)/Z_k however far they are from equilibrium: sum exp(A) f(X) / sum exp(A) estimates
E_k[f], and the mean of exp A estimates Z_k / Z_0, if the chains started from p_0 with A = 0.
Carbone et al. (2023), arXiv:2305.19414. It is annealed importance sampling along the path of
training.

The path consists of two kinds of step, in any order:

    the energy changes, the chain is fixed     `weights_moved`: needs recorded and new energy only
    the chain moves, the energy is fixed       `kernel.weighted`; no correction for an exact kernel

or of both together (`ula_step`, the paper's form). A chain that skipped versions takes one step
of the first kind from its own version to the current one.

`ula_step` does not hold for clipped gradients and clamped positions, whose kernel densities
differ, and a chain that starts anew has not followed the path. `check_sampler` and `check_buffer`
refuse these.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ebm_dist.core.errors import UserError
from ebm_dist.core.events import sum_event
from ebm_dist.core.generators import seeded
from ebm_dist.objectives.weighting import ess_ratio
from ebm_dist.samplers import KernelSection, Langevin
from ebm_dist.samplers.traits import names_with, trait


def ula_action(
    energy: Tensor, grad: Tensor, displacement: Tensor, *, step_size: float, temperature: float
) -> Tensor:
    """alpha(x, y) of the Langevin step x' = x - h dE/dx + sqrt(2 T h) xi, (M,).

        alpha(x, y) = [ E(x) + 1/2 (y - x).dE/dx + h/4 |dE/dx|^2 ] / T

    exp(-alpha(x, y) - |y - x|^2 / (4 T h)) is exp(-E(x)/T) times the density of a step from x
    to y, up to a constant.

    Args:
        energy: (M,), E(x).
        grad: (M, *event), dE/dx at x.
        displacement: (M, *event), y - x.
    """
    along = 0.5 * sum_event(displacement * grad)
    return (energy + along + 0.25 * step_size * sum_event(grad.square())) / temperature


def ula_step(
    log_weight: Tensor,
    position: Tensor,
    energy: Tensor,
    grad: Tensor,
    new_position: Tensor,
    new_energy: Tensor,
    new_grad: Tensor,
    *,
    step_size: float,
    temperature: float = 1.0,
) -> Tensor:
    """Log-weights (M,) after one Langevin step under version k, then the move to k + 1.

        A' = A + alpha_k(X, X') - alpha_{k+1}(X', X)

    If both versions have the same energy, this corrects the discretisation alone; a kernel that
    keeps exp(-E/T) needs no correction.

    Args:
        log_weight: (M,), A.
        position, energy, grad: X, E_k(X), dE_k/dx at X; the step must have used this gradient
            unclipped.
        new_position, new_energy, new_grad: X', E_{k+1}(X'), dE_{k+1}/dx at X'.
    """
    displacement = new_position - position
    forward = ula_action(energy, grad, displacement, step_size=step_size, temperature=temperature)
    backward = ula_action(
        new_energy, new_grad, -displacement, step_size=step_size, temperature=temperature
    )
    return log_weight + forward - backward


def weights_moved(
    log_weight: Tensor, energy: Tensor, new_energy: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Log-weights (M,) after the energy changed, by one version or many, at fixed positions.

        A' = A + [E_old(X) - E_new(X)] / T

    Args:
        log_weight: (M,), A.
        energy: (M,) under the weights that A belongs to, as the worker recorded it.
        new_energy: (M,) of the same positions under the new weights.
    """
    return log_weight + (energy - new_energy) / temperature


def log_z_ratio(log_weight: Tensor) -> Tensor:
    """Estimate of log(Z_now / Z_0) from log-weights (M,), 0-d, in nats.

    The mean weight is unbiased; its log is too low by about half its relative variance. The
    estimate stays valid after resampling, because `resample` keeps the mean weight.
    """
    return log_weight.logsumexp(0) - math.log(log_weight.shape[0])


def log_z_standard_error(log_weight: Tensor) -> Tensor:
    """Standard error of `log_z_ratio` by the delta method, 0-d, for independent chains.

    sqrt((1/ESS ratio - 1) / (M - 1)). It is too small after resampling, when chains have common
    ancestors.
    """
    count = log_weight.shape[0]
    return ((1 / ess_ratio(log_weight) - 1).clamp_min(0) / max(count - 1, 1)).sqrt()


def systematic_resample(log_weight: Tensor, generator: torch.Generator) -> Tensor:
    """Indices (M,) int64, ascending; chain i is drawn M w_i times on average.

    One uniform number places M equidistant points on the weights' cumulative sum, so that
    the count of each chain is M w_i rounded up or down. Kitagawa (1996).
    """
    count = log_weight.shape[0]
    cumulative = torch.softmax(log_weight.double(), 0).cumsum(0)
    start = torch.rand((), dtype=torch.float64, generator=generator, device=generator.device)
    points = (torch.arange(count, device=log_weight.device) + start.to(log_weight.device)) / count
    # By rounding the last sum may be below 1, and a point above it would belong to no chain.
    return torch.searchsorted(cumulative, points).clamp(max=count - 1)


def resample(
    log_weight: Tensor, generator: torch.Generator, *, min_ess_ratio: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Resample if the weights have degenerated: which chain each slot copies, and A'.

    If ESS/M is below `min_ess_ratio` in (0, 1], chains are resampled systematically and every A'
    is the log of the mean weight, so that `log_z_ratio` keeps its value. Otherwise each slot keeps
    its chain and its weight.

    Returns:
        Indices (M,) int64 and log-weights (M,).
    """
    if not 0 < min_ess_ratio <= 1:
        raise ValueError(f"min_ess_ratio: {min_ess_ratio}, expected a ratio in (0, 1]")
    if ess_ratio(log_weight) >= min_ess_ratio:
        return torch.arange(log_weight.shape[0], device=log_weight.device), log_weight
    index = systematic_resample(log_weight, generator)
    return index, log_z_ratio(log_weight).expand_as(log_weight).clone()


def check_sampler(sampler: KernelSection) -> None:
    """Refuse samplers whose transition density the correction does not know.

    Raises:
        UserError: the key to change and why.
    """
    kernel = sampler.build()
    if trait(kernel, "leaves_invariant"):
        return
    if not isinstance(kernel, Langevin):
        name = type(sampler).model_fields["name"].default
        raise UserError(
            f"sampler.name: {name} has no Jarzynski correction; use langevin (unclipped), or "
            f"{names_with('leaves_invariant')}, or turn the correction off"
        )
    for key in ("grad_clip", "grad_norm_clip", "clamp"):
        value = getattr(kernel, key)
        if value is not None:
            raise UserError(
                f"sampler.{key}: {value}, but the Jarzynski correction knows the density of an "
                f"unclipped Langevin step only; remove sampler.{key}, or turn the correction off"
            )
    if kernel.temperature == 0:
        raise UserError(
            "sampler.temperature: 0, but a move without noise has no density, which the Jarzynski "
            "correction needs; raise it, or turn the correction off"
        )


def check_buffer(reinit_prob: float) -> None:
    """Refuse chains that start anew: their log-weight would belong to a path they did not follow.

    Raises:
        UserError: the key to change and why.
    """
    if reinit_prob > 0:
        raise UserError(
            f"buffer.reinit_prob: {reinit_prob}, but a chain that starts anew has no Jarzynski "
            "weight; set buffer.reinit_prob: 0, or turn the correction off"
        )


def resampling(
    log_weight: np.ndarray, threshold: float, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Which chain each slot copies and the new log-weights (M,); None if the ESS is large enough.

    All chains must be of one version. Between versions log-weights also differ by the change of
    log Z, and resampling would replace old chains rather than unlikely ones.
    """
    generator = seeded(seed)
    old = torch.from_numpy(log_weight.astype(np.float64))
    index, new = resample(old, generator, min_ess_ratio=threshold)
    if new is old:
        return None
    return index.numpy(), new.numpy().astype(np.float32)
