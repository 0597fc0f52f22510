"""Energy barriers between events: how much energy a path from one to another must climb.

A straight path climbs too much wherever the low energies lie along a curve, so it is relaxed by the
string method (E, Ren and Vanden-Eijnden 2007, arXiv:cond-mat/0605725): the images along it move
down the gradient and are then spaced evenly again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ebm_dist.core.events import energy_at
from ebm_dist.core.types import EnergyFn
from ebm_dist.energies.context import bind
from ebm_dist.evaluation.ood import share

CONNECTED = 5.0
"""Barriers up to this, in units of T, count as none: a chain at T climbs one in about 150 tries."""


def connectivity(
    energy: nn.Module,
    x: Tensor,
    label: Tensor | None = None,
    *,
    temperature: float,
    box: tuple[float, float] | None = None,
    num_pairs: int = 32,
    num_images: int = 17,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Barriers between pairs of the samples `x` (N, *event), in units of the temperature.

    Args:
        label: (N,) int64, for an energy that takes labels; pairs are then of one label each.
        box: the range of the coordinates; None if they are unbounded.
        num_pairs: pairs at most.
        num_images: points of a path.
        on_step: called with the number of evaluations of the paths that are done and of all.

    Returns:
        Medians `connectivity/barrier`, of relaxed paths, and `connectivity/barrier_straight`; the
        share `connectivity/connected` of barriers up to `CONNECTED`, with its 95% interval in
        `connected_low` and `connected_high`. Empty if there is no pair.
    """
    left, right = pairs(len(x), label, num_pairs)
    if len(left) == 0:
        return {}
    given: EnergyFn = energy
    if label is not None:
        given = bind(energy, label=label[left].repeat_interleave(num_images).to(x.device))
    found = barriers(given, x[left], x[right], num_images=num_images, box=box, on_step=on_step)
    straight, relaxed = (height / temperature for height in found)
    connected, low, high = share(relaxed <= CONNECTED)
    return {
        "connectivity/barrier": float(relaxed.median()),
        "connectivity/barrier_straight": float(straight.median()),
        "connectivity/connected": connected,
        "connectivity/connected_low": low,
        "connectivity/connected_high": high,
    }


def barriers(
    energy: EnergyFn,
    start: Tensor,
    end: Tensor,
    *,
    num_images: int = 17,
    num_steps: int = 50,
    step: float = 0.5,
    box: tuple[float, float] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Barriers between `start` and `end` (B, *event), of straight and of relaxed paths.

    A barrier is the highest energy along the path, above the higher of its two ends; 0 if the ends
    are the highest. The relaxed one is the lowest that was found on the way, so an upper bound of
    the true one as far as the images, at which alone the energy is known, follow the path.

    Args:
        energy: takes B * num_images events, those of a path in one piece.
        num_images: points of a path, the ends included.
        num_steps: moves of the images.
        step: the largest move of a path's image, in units of the path's spacing.
        box: the range of the coordinates; None if they are unbounded.
        on_step: called with the number of evaluations of the paths that are done and of all.

    Returns:
        Two tensors (B,), float64 on the CPU, in units of the energy.
    """
    if start.shape != end.shape or num_images < 3:
        raise ValueError(
            f"barriers: needs ends of one shape and 3 images or more, got {tuple(start.shape)}, "
            f"{tuple(end.shape)} and {num_images}"
        )
    event = start.shape[1:]
    along = torch.linspace(0, 1, num_images, device=start.device)
    first, last = start.detach().flatten(1), end.detach().flatten(1)
    path = torch.lerp(first[:, None], last[:, None], along[None, :, None])  # (B, K, D)
    straight = lowest = None
    for index in range(num_steps + 1):
        value, grad = _value_and_grad(energy, path, event)
        ends = torch.maximum(value[:, 0], value[:, -1])
        height = value.amax(1) - ends
        straight = height if straight is None else straight
        lowest = height if lowest is None else torch.minimum(lowest, height)
        grad[:, 0] = grad[:, -1] = 0
        steepest = grad.norm(dim=2).amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
        spacing = path.diff(dim=1).norm(dim=2).sum(1) / (num_images - 1)
        # Smaller and smaller, so that the images settle instead of jumping across a valley.
        size = step * (1 - index / (num_steps + 1)) * spacing / steepest
        path = path - size[:, None, None] * grad
        path = _evenly(path if box is None else path.clamp(*box))
        on_step(index + 1, num_steps + 1)
    assert straight is not None
    assert lowest is not None
    return straight.double().cpu(), lowest.double().cpu()


def pairs(num: int, label: Tensor | None, limit: int) -> tuple[Tensor, Tensor]:
    """Indices of the ends of at most `limit` pairs among `num` events, each pair of one label."""
    order = torch.arange(num) if label is None else label.cpu().argsort(stable=True)
    left, right = order[: num // 2 * 2].view(-1, 2).T
    if label is not None:
        same = label.cpu()[left] == label.cpu()[right]
        left, right = left[same], right[same]
    chosen = torch.linspace(0, len(left) - 1, min(limit, len(left))).round().long()
    return left[chosen], right[chosen]


def _value_and_grad(energy: EnergyFn, path: Tensor, event: torch.Size) -> tuple[Tensor, Tensor]:
    """Energies (B, K) and gradients (B, K, D) at the images of the paths."""
    x = path.reshape(-1, *event).requires_grad_(True)
    with torch.enable_grad():
        value = energy_at(energy, x)
        (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach().reshape(path.shape[:2]), grad.reshape(path.shape)


def _evenly(path: Tensor) -> Tensor:
    """The same polygons (B, K, D), with corners at equal distances along them."""
    length = torch.nn.functional.pad(path.diff(dim=1).norm(dim=2).cumsum(1), (1, 0))  # (B, K)
    share = torch.linspace(0, 1, path.shape[1], device=path.device)
    wanted = length[:, -1:] * share
    right = torch.searchsorted(length, wanted).clamp(1, path.shape[1] - 1)
    left = right - 1
    low, high = length.gather(1, left), length.gather(1, right)
    part = ((wanted - low) / (high - low).clamp_min(torch.finfo(path.dtype).tiny)).clamp(0, 1)

    def corner(index: Tensor) -> Tensor:
        return path.gather(1, index[:, :, None].expand_as(path))

    return torch.lerp(corner(left), corner(right), part[:, :, None])
