"""Accuracy of a joint energy-classifier under projected gradient attacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_dist.core.events import energy_at, per_chain

Norm = Literal["l2", "linf"]
Logits = Callable[[Tensor], Tensor]


def robust_accuracy(
    energy: object,
    x: Tensor,
    label: Tensor,
    *,
    batch_size: int = 250,
    **of_attack: Any,
) -> float:
    """Fraction of events that are classified correctly after the attack, in [0, 1].

    It is an upper bound of the true robust accuracy, since a stronger attack can only lower it. The
    attack succeeds on an event if any step of any restart is misclassified.

    Args:
        energy: an object with `logits(x) -> (B, num_classes)`, or such a function.
        x: (N, *event); images are in [-1, 1], so epsilon is twice that for images in [0, 1].
        label: (N,) int64.
        of_attack: the other parameters of `attack`, such as `epsilon`.
    """
    attacked = attack(energy, x, label, batch_size=batch_size, **of_attack)
    logits = _logits_of(energy)
    with torch.no_grad():
        guess = torch.cat([logits(part).argmax(dim=1) for part in attacked.split(batch_size)])
    return float((guess == label).double().mean())


def attack(
    energy: object,
    x: Tensor,
    label: Tensor,
    *,
    epsilon: float,
    norm: Norm = "linf",
    num_steps: int = 40,
    step_size: float | None = None,
    num_restarts: int = 1,
    generator: torch.Generator | None = None,
    clamp: tuple[float, float] | None = (-1.0, 1.0),
    batch_size: int = 250,
) -> Tensor:
    """Events (N, *event) within epsilon of `x`, misclassified where the attack succeeds.

    Projected gradient ascent on the cross entropy (Madry et al. 2018, arXiv:1706.06083). The
    first restart starts at x, the others at random points of the ball. Where the attack fails, its
    last point is returned.

    Args:
        epsilon: radius of the ball; 0 gives the events themselves.
        step_size: by default 2.5 * epsilon / num_steps, so that every point can be reached.
        clamp: the range of events; None if they are unbounded.
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm: expected 'l2' or 'linf', got {norm!r}")
    if epsilon < 0 or num_steps < 1 or num_restarts < 1:
        raise ValueError(
            f"robust_accuracy: needs epsilon >= 0, num_steps >= 1 and num_restarts >= 1, got "
            f"{epsilon}, {num_steps} and {num_restarts}"
        )
    if label.shape != x.shape[:1]:
        raise ValueError(
            f"label: expected shape ({x.shape[0]},), one for each event, got {tuple(label.shape)}"
        )
    if num_restarts > 1 and generator is None:
        raise ValueError("generator: random restarts need one; pass torch.Generator()")
    logits = _logits_of(energy)
    step = 2.5 * epsilon / num_steps if step_size is None else step_size
    done = []
    for part, target in zip(x.split(batch_size), label.split(batch_size)):
        worst = part.detach().clone()
        open_ = _right(logits, worst, target)
        for restart in range(num_restarts):
            if epsilon == 0 or not bool(open_.any()):
                break
            start = _start(part, epsilon, norm, clamp, generator if restart else None)
            found, broken = _ascend(
                logits, part, start, target, epsilon, norm, num_steps, step, clamp
            )
            take = per_chain(open_, part)
            worst = torch.where(take, found, worst)
            open_ = open_ & ~broken
        done.append(worst)
    return torch.cat(done)


def _right(logits: Logits, x: Tensor, label: Tensor) -> Tensor:
    """(B,) bool: whether the classifier is right."""
    with torch.no_grad():
        return logits(x).argmax(dim=1) == label


def _start(
    x: Tensor,
    epsilon: float,
    norm: Norm,
    clamp: tuple[float, float] | None,
    generator: torch.Generator | None,
) -> Tensor:
    """`x` itself, or, with a generator, a uniform random point of the ball around it."""
    if generator is None:
        return x.detach().clone()
    if norm == "linf":
        offset = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
    else:
        offset = torch.empty_like(x).normal_(generator=generator)
        radius = torch.rand(x.shape[0], generator=generator, device=x.device)
        length = epsilon * radius ** (1 / math.prod(x.shape[1:]))
        offset = offset * per_chain(length / _norms(offset), x)
    start = x + offset
    return start.clamp(*clamp) if clamp else start


def _ascend(
    logits: Logits,
    x: Tensor,
    start: Tensor,
    label: Tensor,
    epsilon: float,
    norm: Norm,
    num_steps: int,
    step: float,
    clamp: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    here, found = start, start.clone()
    broken = ~_right(logits, start, label)
    for _ in range(num_steps):
        point = here.detach().requires_grad_(True)
        with torch.enable_grad():
            # Summed, not averaged, so that the step of an event does not depend on its batch.
            loss = F.cross_entropy(logits(point), label, reduction="sum")
            (grad,) = torch.autograd.grad(loss, point)
        if norm == "linf":
            moved = here + step * grad.sign()
            offset = (moved - x).clamp(-epsilon, epsilon)
        else:
            moved = here + step * grad / per_chain(_norms(grad), x)
            offset = moved - x
            offset = offset * per_chain((epsilon / _norms(offset)).clamp_max(1), x)
        here = x + offset
        if clamp is not None:
            # x is inside the range, so clamping cannot leave the ball around it.
            here = here.clamp(*clamp)
        wrong = ~_right(logits, here, label)
        # Keeps the first misclassified point, since later steps may be classified correctly again.
        found = torch.where(per_chain(broken, x), found, here)
        broken = broken | wrong
    return found, broken


def _logits_of(energy: object) -> Logits:
    logits = getattr(energy, "logits", None)
    if callable(logits):
        return partial(energy_at, logits)  # type: ignore[arg-type]
    if callable(energy) and not hasattr(energy, "event_shape"):
        return partial(energy_at, energy)  # type: ignore[arg-type]
    raise ValueError(
        f"robust_accuracy: {type(energy).__name__} has no class logits; train it with objective "
        f"'joint' and energy.num_classes"
    )


def _norms(value: Tensor) -> Tensor:
    return value.flatten(1).norm(dim=1).clamp_min(1e-12)
