"""Binary and categorical events: tells which of them x holds, and draws categories."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ebm_dist.core.types import EnergyFn, EventSpec
from ebm_dist.samplers.kernel import start, uniform

Kind = Literal["auto", "binary", "categorical"]


def start_discrete(x: Tensor, energy: EnergyFn, kind: Kind) -> tuple[Tensor, bool]:
    """`x` as positions of a discrete sampler, and whether they are categorical.

    With `auto` the energy's own `event` decides. For an energy that names none, events
    are categorical if every chain is one-hot along the last axis, else binary.

    Raises:
        ValueError: entries other than 0 and 1, or categorical events that are not one-hot.
    """
    position = start(x, energy)
    if not bool(((position == 0) | (position == 1)).all()):
        raise ValueError(
            "x: a discrete sampler moves {0, 1} floats (spins s are (s + 1) / 2, categories are "
            f"one-hot in the last axis), got values in [{position.min():g}, {position.max():g}]; "
            "for real events use langevin, mala or hmc"
        )
    one_hot = position.shape[-1] > 1 and bool((position.sum(-1) == 1).all())
    event = getattr(energy, "event", None)
    if kind == "auto" and isinstance(event, EventSpec) and event.discrete:
        kind = "categorical" if event.kind == "categorical" else "binary"
    categorical = one_hot if kind == "auto" else kind == "categorical"
    if categorical and not one_hot:
        raise ValueError(
            "x: categorical events are one-hot in the last axis, but some entries of x have not "
            "exactly one 1 there; encode them with torch.nn.functional.one_hot(index, q).float()"
        )
    return position, categorical


def draw(log_weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index (...,) from each row of log-weights (..., N), by inversion.

    Uses one uniform number a draw, where torch.multinomial uses one for every weight.
    """
    # Not a softmax: torch's takes ten times as long on rows of a few values, and the
    # weights need not sum to 1.
    weight = (log_weight - log_weight.amax(-1, keepdim=True)).exp_()
    cdf = weight.cumsum(-1)
    # u is at most 1 - 2**-24 in float32, so u * total rounds to below the total; with
    # `right`, an index of zero weight has an empty interval and is never drawn.
    u = uniform(cdf[..., :1], generator).mul_(cdf[..., -1:])
    return torch.searchsorted(cdf, u, right=True).squeeze(-1)


def one_hot_like(index: Tensor, like: Tensor) -> Tensor:
    """(...,) -> (..., K) one-hot in the dtype of `like` (..., K)."""
    return torch.zeros_like(like).scatter_(-1, index.unsqueeze(-1), 1.0)
