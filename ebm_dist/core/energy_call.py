"""Calling an energy that somebody else wrote: it must leave the events that it is given alone."""

from __future__ import annotations

from torch import Tensor

from ebm_dist.core.types import EnergyFn


def energy_at(energy: EnergyFn, x: Tensor) -> Tensor:
    """`energy(x)` for x (B, *event).

    Raises:
        ValueError: the energy changed `x` in place. Chains would then stand where nobody moved
            them, and the law would be wrong without a word.
    """
    # torch counts the changes of every tensor, except of those made in inference mode.
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
