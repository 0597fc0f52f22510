"""Events (B, *event): their energies, and arithmetic on each of them."""

from __future__ import annotations

from torch import Tensor

from ebm_dist.core.types import EnergyFn


def energy_at(energy: EnergyFn, x: Tensor) -> Tensor:
    """`energy(x)` for x (B, *event).

    Raises:
        ValueError: the energy changed `x` in place. That would move chains outside the sampler,
            which silently changes the sampled law.
    """
    # torch counts the in-place changes of every tensor, except of those made in inference mode.
    before = None if x.is_inference() else x._version
    try:
        out = energy(x)
    except RuntimeError as error:
        if "in-place operation" not in str(error):
            raise
        raise ValueError(f"{_IN_PLACE}; torch says: {str(error).splitlines()[0]}") from error
    if before is not None and x._version != before:
        raise ValueError(_IN_PLACE)
    return out


_IN_PLACE = (
    "energy: changes its argument x in place (x.mul_, x -= ..., x[...] = ...); work on a copy, "
    "such as 2 * x in place of x.mul_(2), or begin with x = x.clone()"
)


def per_chain(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped so that it broadcasts against `like` (B, *event)."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def sum_event(x: Tensor) -> Tensor:
    """(B, *event) -> (B,): the sum over each event's own numbers."""
    return x.flatten(1).sum(1)
